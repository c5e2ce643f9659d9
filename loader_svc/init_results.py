"""What only running a module's code could tell: how long its init function takes, and what it returns.

The file is a CSV with the columns ``module``, ``condition``, ``duration_ms`` and ``result``. A condition is ``always``
or ``while NAME is live``; a duration or result is a number or ``parameter NAME (default N)``; a result may also be an
errno such as ``-ENODEV``. The first row that fits decides; without one an init function returns 0 at once.
"""

from __future__ import annotations

import csv
import errno as errnos
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

COLUMNS: Final = ("module", "condition", "duration_ms", "result")

_WHILE_LIVE: Final = re.compile(r"while (\S+) is live\b.*")
_PARAMETER: Final = re.compile(r"parameter (\w+) \(default (-?\d+)\)")
_ERRNO: Final = re.compile(r"-(E[A-Z0-9]+)")


class InitResultsError(ValueError):
    """A file of init results that can't be understood; one sentence that names the value."""


class InitResult(NamedTuple):
    """What running an init function comes to."""

    duration_ns: int = 0
    errno: str = ""
    """Empty for success. A positive result is one, too: the module stays."""


@dataclass(frozen=True, slots=True)
class _Value:
    parameter: str
    default: int

    def of(self, arguments: Mapping[str, str]) -> int:
        text = arguments.get(self.parameter, "") if self.parameter else ""
        try:
            return int(text, 0) if text else self.default
        except ValueError:
            return self.default


@dataclass(frozen=True, slots=True)
class _Row:
    module: str
    while_live: str
    duration_ms: _Value
    result: _Value


class InitResults:
    """The results of all modules that are not plain."""

    def __init__(self, rows: Iterable[Mapping[str, str | None]] = ()) -> None:
        """InitResultsError for a row that can't be understood."""
        self._rows: dict[str, list[_Row]] = {}
        for row in rows:
            parsed = _row(row)
            self._rows.setdefault(parsed.module, []).append(parsed)

    @classmethod
    def parse(cls, text: str) -> InitResults:
        """Read the text of a file. InitResultsError."""
        reader = csv.DictReader(text.splitlines())
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise InitResultsError(f"the init results lack the column {min(missing)!r}")
        return cls(reader)

    def of(self, module: str, arguments: Mapping[str, str], is_live: Callable[[str], bool]) -> InitResult:
        """Return what the init function of ``module`` comes to with these parameters, ``is_live`` telling of others."""
        for row in self._rows.get(module, ()):
            if not row.while_live or is_live(row.while_live):
                result = row.result.of(arguments)
                duration_ns = max(row.duration_ms.of(arguments), 0) * 1_000_000
                return InitResult(duration_ns, errnos.errorcode.get(-result, "EINVAL") if result < 0 else "")
        return InitResult()


def _row(row: Mapping[str, str | None]) -> _Row:
    module, condition, duration, result = (str(row.get(column) or "").strip() for column in COLUMNS)
    match = _WHILE_LIVE.fullmatch(condition)
    if condition != "always" and match is None:
        raise InitResultsError(f"the condition {condition!r} of {module!r} is not 'always' or 'while NAME is live'")
    return _Row(module, match[1] if match else "", _value(module, duration), _value(module, result))


def _value(module: str, text: str) -> _Value:
    if match := _PARAMETER.fullmatch(text):
        return _Value(match[1], int(match[2]))
    if match := _ERRNO.fullmatch(text):
        number = getattr(errnos, match[1], None)
        if isinstance(number, int):
            return _Value("", -number)
    try:
        return _Value("", int(text))
    except ValueError:
        raise InitResultsError(f"{text!r} of {module!r} is no number, errno or parameter") from None
