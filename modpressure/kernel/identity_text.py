"""The text of a kernel identity (TOML), and what a kernel's own ``.config`` says of one.

::

    release = "6.12.1-example"                 what is left out is as in the identity that ``base`` names, or as in any
    vermagic = "6.12.1-example SMP preempt mod_unload modversions "
    struct_module_bytes = 1280
    decompressors = ["zstd"]
    blacklist = ["pcspkr"]
    symvers = "Module.symvers"                 the exported symbols, relative to this file
    base = "debian-12"                         has the symbols where there is no symvers line
    origins = ["linux-image-6.12.1 1.0"]       where all this is from; of no consequence

    [config]
    MODVERSIONS = true                         switches under their names in the kernel's configuration
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from modpressure.kernel.identity import ANY, KernelIdentity

_FIELDS: Final = {
    "name": "name",
    "release": "release",
    "vermagic": "vermagic",
    "struct_module_bytes": "this_module_bytes",
    "page_bytes": "page_bytes",
    "percpu_reserve_bytes": "percpu_reserve_bytes",
    "decompressors": "decompressors",
    "blacklist": "blacklist",
    "trust_signatures": "trust_signatures",
    "signatures_enforced": "module_sig_force",
}
"""Keys of the text, and the fields that they are."""

_OTHER_KEYS: Final = ("base", "symvers", "origins", "config")

_WHOLE_NUMBERS: Final = ("struct_module_bytes", "page_bytes", "percpu_reserve_bytes")
_LISTS: Final = {"decompressors": tuple, "blacklist": frozenset, "origins": tuple}
_SWITCHES: Final = ("trust_signatures", "signatures_enforced")

_CONFIG: Final = {
    "KALLSYMS": "kallsyms",
    "KALLSYMS_ALL": "kallsyms_all",
    "LIVEPATCH": "livepatch",
    "MODULE_ALLOW_MISSING_NAMESPACE_IMPORTS": "allow_missing_namespace_imports",
    "MODULE_DEBUG_AUTOLOAD_DUPS": "merges_autoloads",
    "MODULE_FORCE_LOAD": "module_force_load",
    "MODULE_FORCE_UNLOAD": "module_force_unload",
    "MODULE_SIG": "module_sig",
    "MODULE_SIG_FORCE": "module_sig_force",
    "MODULE_UNLOAD": "module_unload",
    "MODVERSIONS": "modversions",
    "SMP": "smp",
    "STRICT_MODULE_RWX": "strict_module_rwx",
}

_COMPRESSIONS: Final = {"GZIP": "gzip", "XZ": "xz", "ZSTD": "zstd"}


class IdentityError(ValueError):
    """A text that describes no kernel; one sentence that names the value."""


def any_alone(name: str) -> KernelIdentity:
    """Return the one identity that needs no file. IdentityError for any other name."""
    if name != ANY.name:
        raise IdentityError(f"there is no kernel identity {name!r} to start from; there is {ANY.name}")
    return ANY


def parse_identity(text: str, *, base_named: Callable[[str], KernelIdentity] = any_alone) -> tuple[KernelIdentity, str]:
    """Return the identity that a text describes, and the file of its symbols ("" for none).

    Without such a file it has the symbols of its base, which ``base_named`` gives by name, or raises IdentityError.
    IdentityError for anything that is not TOML, an unknown key or a value of the wrong type.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise IdentityError(f"the kernel identity is not TOML: {error}") from None
    for key, value in document.items():
        _check(key, value)
    base = base_named(document.get("base", ANY.name))
    fields = {_CONFIG[option]: value for option, value in document.get("config", {}).items() if option in _CONFIG}
    if document.get("release"):
        fields["name"] = document["release"]
    fields |= {_FIELDS[key]: _value(key, value) for key, value in document.items() if key in _FIELDS}
    return replace(base, **fields), document.get("symvers", "")


def _check(key: str, value: Any) -> None:
    """Raise IdentityError unless this is a key with a value of its kind."""
    if key not in _FIELDS and key not in _OTHER_KEYS:
        raise IdentityError(f"a kernel identity has no {key!r}; it has {', '.join([*_FIELDS, *_OTHER_KEYS])}")
    if key == "config":
        _check_config(value)
    elif key in _LISTS:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise IdentityError(f"{key} = {value!r} is not a list of texts")
        if key == "decompressors" and (unknown := set(value) - set(_COMPRESSIONS.values())):
            raise IdentityError(f"decompressors names {min(unknown)!r}; there are gzip, xz, zstd")
    elif key in _WHOLE_NUMBERS:
        if type(value) is not int or value < 0:
            raise IdentityError(f"{key} = {value!r} is not a whole number from 0 on")
        if key == "page_bytes" and (value < 512 or value & (value - 1)):
            raise IdentityError(f"page_bytes = {value} is not a power of two from 512 on")
    elif key in _SWITCHES:
        if not isinstance(value, bool):
            raise IdentityError(f"{key} = {value!r} is not true or false")
    elif not isinstance(value, str):
        raise IdentityError(f"{key} = {value!r} is not a text")


def _check_config(options: Any) -> None:
    if not isinstance(options, dict):
        raise IdentityError(f"config = {options!r} is not a table")
    for option, value in options.items():
        if option in _CONFIG and not isinstance(value, bool):
            raise IdentityError(f"config: {option} = {value!r} is not true or false")


def _value(key: str, value: Any) -> Any:
    return _LISTS[key](value) if key in _LISTS else value


def render_identity(identity: KernelIdentity, *, symvers: str = "", base: str = "") -> str:
    """Return the text of an identity, its symbols aside: ``symvers`` names their file, ``base`` who else has them."""
    lines = ["# What a simulated kernel is to the modules that are loaded into it."]
    if base:
        lines.append(f"base = {_toml(base)}")
    for key, field in _FIELDS.items():
        value = getattr(identity, field)
        if value is None or field in _CONFIG.values():
            continue
        lines.append(f"{key} = {_toml(sorted(value) if isinstance(value, frozenset) else value)}")
    if symvers:
        lines.append(f"symvers = {_toml(symvers)}")
    lines += ["", "[config]", *(f"{option} = {_toml(getattr(identity, field))}" for option, field in _CONFIG.items())]
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
    switches = {field: options.get(option) == "y" for option, field in _CONFIG.items()}
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
