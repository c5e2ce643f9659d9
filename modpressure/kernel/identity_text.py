"""The text of a kernel identity (TOML), and what a kernel's own ``.config`` says of one.

The text has the fields of ``KernelIdentity`` under their own names; what it leaves out is as in the identity that its
``base`` names, or as in ``any``. The exported symbols are in a file of their own, a Module.symvers.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Final

from modpressure.kernel.identity import ANY, BUILT_IN, KernelIdentity

SYMVERS_KEY: Final = "symvers"
"""Names the file with the exported symbols, relative to the text's own."""

_FIELDS: Final = tuple(field.name for field in fields(KernelIdentity) if field.name != "symbols")
_KINDS: Final[dict[str, tuple[type, ...]]] = {
    name: (str,) if name == "vermagic" else (int,) if name == "this_module_bytes" else (type(getattr(ANY, name)),)
    for name in _FIELDS
}

_CONFIG: Final = {
    "kallsyms": "KALLSYMS",
    "kallsyms_all": "KALLSYMS_ALL",
    "module_unload": "MODULE_UNLOAD",
    "strict_module_rwx": "STRICT_MODULE_RWX",
    "modversions": "MODVERSIONS",
    "module_force_load": "MODULE_FORCE_LOAD",
    "allow_missing_namespace_imports": "MODULE_ALLOW_MISSING_NAMESPACE_IMPORTS",
    "livepatch": "LIVEPATCH",
    "module_sig": "MODULE_SIG",
    "module_sig_force": "MODULE_SIG_FORCE",
    "smp": "SMP",
}

_COMPRESSIONS: Final = {"GZIP": "gzip", "XZ": "xz", "ZSTD": "zstd"}


class IdentityError(ValueError):
    """A text that describes no kernel; one sentence that names the value."""


def parse_identity(text: str) -> tuple[KernelIdentity, str]:
    """Return the identity that a text describes, without symbols, and the file of those ("" for none).

    IdentityError for anything that is not TOML, an unknown key or a value of the wrong type.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise IdentityError(f"the kernel identity is not TOML: {error}") from None
    symvers = document.pop(SYMVERS_KEY, "")
    if not isinstance(symvers, str):
        raise IdentityError(f"{SYMVERS_KEY} = {symvers!r} is not the name of a file")
    base = document.pop("base", ANY.name)
    if base not in BUILT_IN:
        raise IdentityError(f"there is no kernel identity {base!r}; there are {', '.join(BUILT_IN)}")
    return replace(BUILT_IN[base], **{name: _value(name, value) for name, value in document.items()}), symvers


def _value(name: str, value: Any) -> Any:
    if name not in _KINDS:
        raise IdentityError(f"a kernel identity has no {name!r}; it has {', '.join(_FIELDS)}")
    kinds = _KINDS[name]
    if kinds[0] in (tuple, frozenset):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            if name == "decompressors" and (unknown := set(value) - set(_COMPRESSIONS.values())):
                raise IdentityError(f"decompressors names {min(unknown)!r}; there are gzip, xz, zstd")
            return kinds[0](value)
        raise IdentityError(f"{name} = {value!r} is not a list of texts")
    if type(value) not in kinds:
        raise IdentityError(f"{name} = {value!r} is not {_KIND_WORDS[kinds[0]]}")
    if type(value) is int and value < 0:
        raise IdentityError(f"{name} = {value} is negative")
    if name == "page_bytes" and (value < 512 or value & (value - 1)):
        raise IdentityError(f"page_bytes = {value} is not a power of two from 512 on")
    return value


_KIND_WORDS: Final = {str: "a text", bool: "true or false", int: "a whole number"}


def render_identity(identity: KernelIdentity, *, symvers: str = "") -> str:
    """Return the text of an identity, its symbols aside; ``symvers`` names the file that has them."""
    lines = ["# What a simulated kernel is to the modules that are loaded into it."]
    for name in _FIELDS:
        value = getattr(identity, name)
        if value is None:
            continue
        if isinstance(value, frozenset):
            value = sorted(value)
        lines.append(f"{name} = {_toml(value)}")
    if symvers:
        lines.append(f"{SYMVERS_KEY} = {_toml(symvers)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # JSON's texts, numbers, booleans and lists of texts are TOML, too, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def identity_of_config(lines: Iterable[str], *, release: str = "", name: str = "") -> KernelIdentity:
    """Return the identity of a kernel built with a ``.config`` (``/boot/config-RELEASE``).

    ``release`` is what ``uname -r`` prints; without one, the version in the file's heading can't stand in for it, since
    distributions append to that, and vermagic is compared without its first word.
    """
    options = _options(lines)
    if not options:
        raise IdentityError("the kernel configuration sets no option (CONFIG_...=)")
    if options.get("MODULES") != "y":
        raise IdentityError("the kernel is built without modules (CONFIG_MODULES is not y)")
    switches = {field: options.get(option) == "y" for field, option in _CONFIG.items()}
    decompressors = tuple(
        algorithm for option, algorithm in _COMPRESSIONS.items() if options.get(f"MODULE_COMPRESS_{option}") == "y"
    )
    if options.get("MODULE_DECOMPRESS") != "y":
        decompressors = ()
    vermagic = _vermagic(options)
    return replace(
        ANY,
        name=name or release or "configured",
        release=release,
        vermagic=f"{release} {vermagic}" if release else vermagic,
        decompressors=decompressors,
        **switches,  # type: ignore[arg-type]
    )


def _options(lines: Iterable[str]) -> dict[str, str]:
    options = {}
    for line in lines:
        option, separator, value = line.strip().partition("=")
        if separator and option.startswith("CONFIG_"):
            options[option.removeprefix("CONFIG_")] = value
    return options


def _vermagic(options: Mapping[str, str]) -> str:
    """Return vermagic without the release: include/linux/vermagic.h, Linux 6.12, x86-64."""

    def on(option: str) -> bool:
        return options.get(option) == "y"

    words = ["SMP"] if on("SMP") else []
    if on("PREEMPT_RT"):
        words.append("preempt_rt")
    elif on("PREEMPT_BUILD"):
        words.append("preempt")
    if on("MODULE_UNLOAD"):
        words.append("mod_unload")
    if on("MODVERSIONS"):
        words.append("modversions")
    # Every part of the macro brings its own blank, the last one, too.
    return "".join(f"{word} " for word in words)
