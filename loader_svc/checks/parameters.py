"""Module parameters, parsed as the kernel parses them: only what a parameter's type refuses is an error.

Sources: ``parse_args``, ``parse_one``, the ``param_set_`` functions in kernel/params.c, ``next_arg`` in lib/cmdline.c,
``_kstrtoull`` and ``kstrtobool`` in lib/kstrtox.c, Linux 6.12. The loop goes on after an error; the last error wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from loader_svc.image.modinfo import ARRAY_PREFIX, Parameter
from loader_svc.steps import Failure

_SPACES: Final = " \t\n\v\f\r\xa0"
"""The kernel's isspace(), Latin-1's no-break space included."""

_WITHOUT_VALUE: Final = frozenset({"bool", "bint"})
"""Types that stand for themselves: a name alone means true."""

LONGEST_CHARP: Final = 1024


@dataclass(frozen=True, slots=True)
class Argument:
    """One word of a parameter text."""

    name: str
    value: str | None


def split_arguments(text: str) -> Iterator[Argument]:
    """Yield the words of a parameter text, up to ``--``; quotes keep blanks together and are dropped."""
    text = text.lstrip(_SPACES)
    while text:
        word, text = _next_word(text)
        name, equals, value = word.partition("=")
        if not equals and name == "--":
            return
        yield Argument(name, value if equals else None)


def _next_word(text: str) -> tuple[str, str]:
    """Return the first word without its quotes, and what follows it."""
    quoted_all = text.startswith('"')
    text = text.removeprefix('"')
    in_quotes, equals, end = quoted_all, -1, len(text)
    for at, char in enumerate(text):
        if char in _SPACES and not in_quotes:
            end = at
            break
        if char == "=" and equals < 0:
            equals = at
        elif char == '"':
            in_quotes = not in_quotes
    word, rest = text[:end], text[end:].lstrip(_SPACES)
    if equals >= 0 and word[equals + 1 : equals + 2] == '"':
        word = (word[: equals + 1] + word[equals + 2 :]).removesuffix('"')
    elif quoted_all:
        word = word.removesuffix('"')
    return word, rest


def parameters_failure(text: str, parameters: Iterable[Parameter]) -> Failure | None:
    """Return why a parameter text is refused; None if it is not. Names that the module lacks are passed over."""
    known = {_key(parameter.name): parameter for parameter in parameters}
    failure: Failure | None = None
    for argument in split_arguments(text):
        errno = _errno_of(argument, known)
        if errno:
            value = argument.name if argument.value is None else f"{argument.name}={argument.value}"
            failure = Failure(errno, "parameters", value)
    return failure


def arguments(text: str) -> dict[str, str]:
    """Return the values by name, the last one of a name, for whoever runs the module."""
    return {_key(argument.name): argument.value or "" for argument in split_arguments(text)}


def _key(name: str) -> str:
    return name.replace("-", "_")


def _errno_of(argument: Argument, known: Mapping[str, Parameter]) -> str:
    parameter = known.get(_key(argument.name))
    if parameter is None:
        return ""
    kind = parameter.type
    if argument.value is None:
        # What a type of the module's own would say is not known.
        return "EINVAL" if kind and kind not in _WITHOUT_VALUE and _is_known(kind) else ""
    if kind == "string" and parameter.most is not None:
        return "ENOSPC" if len(argument.value.encode()) >= parameter.most else ""
    if not kind.startswith(ARRAY_PREFIX):
        return _value_errno(argument.value, kind)
    for taken, element in enumerate(argument.value.split(",")):
        # One by one: what is wrong before the limit counts (param_array).
        if taken == parameter.most:
            return "EINVAL"
        if errno := _value_errno(element, kind.removeprefix(ARRAY_PREFIX)):
            return errno
    return ""


_RANGES: Final = {
    "byte": (0, 2**8 - 1),
    "short": (-(2**15), 2**15 - 1),
    "ushort": (0, 2**16 - 1),
    "int": (-(2**31), 2**31 - 1),
    "uint": (0, 2**32 - 1),
    "hexint": (0, 2**32 - 1),
    "long": (-(2**63), 2**63 - 1),
    "ulong": (0, 2**64 - 1),
    "ullong": (0, 2**64 - 1),
}


def _is_known(kind: str) -> bool:
    return kind in _RANGES or kind in ("bool", "invbool", "bint", "charp", "string") or kind.startswith(ARRAY_PREFIX)


def _value_errno(value: str, kind: str) -> str:
    if kind in _RANGES:
        return _number_errno(value, *_RANGES[kind])
    if kind in ("bool", "invbool", "bint"):
        return "" if _is_bool(value) else "EINVAL"
    if kind == "charp" and len(value.encode()) > LONGEST_CHARP:
        return "ENOSPC"
    return ""


def _is_bool(value: str) -> bool:
    return value[:1].lower() in ("y", "t", "n", "f", "1", "0") or value[:2].lower() in ("on", "of")


_LONGEST_NUMBER: Final = 64
"""Digits that a 64-bit number can't have in any base."""

_NUMBER: Final = re.compile(r"([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))", re.ASCII)


def _number_errno(value: str, lowest: int, highest: int) -> str:
    match = _NUMBER.match(value)
    if match is None or (match[1] == "-" and lowest == 0):
        return "EINVAL"
    digits, base = (match[2], 16) if match[2] else (match[3], 8) if match[3] else (match[4], 10)
    digits = digits.lstrip("0") or "0"
    # Digits that no 64 bits hold are the first thing to be noticed, before anything behind them.
    if len(digits) > _LONGEST_NUMBER or int(digits, base) >= 1 << 64:
        return "ERANGE"
    if value[match.end() :] not in ("", "\n"):
        return "EINVAL"
    number = int(digits, base)
    return "" if lowest <= (-number if match[1] == "-" else number) <= highest else "ERANGE"
