"""Names: of modules, of their files, and of the aliases that lead to them.

To the kernel and to kmod ``-`` and ``_`` in a module's name are one (libkmod of kmod 30; modprobe(8)).
"""

from __future__ import annotations

import re

from loader_svc.trees.errors import BadModuleName

SUFFIXES = {".ko": "", ".ko.gz": "gz", ".ko.xz": "xz", ".ko.zst": "zst"}
"""What a module file's name ends with, and how its contents are packed then."""

MAX_NAME_LENGTH = 255
"""Longest name of a file on Linux (NAME_MAX); bytes. A module's name is a part of one."""

MAX_ALIAS_LENGTH = 4095
"""Longest text that libkmod looks up (PATH_MAX - 1); bytes."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BRACKETS = re.compile(r"(\[[^\]]*\])")


def module_name(path: str) -> str:
    """Name of the module in the file ``path``: its last part up to the first dot, with ``_`` for ``-``."""
    return path[path.rfind("/") + 1 :].split(".", 1)[0].replace("-", "_")


def compression(path: str) -> str | None:
    """How the module file ``path`` is packed: "" (not), "gz", "xz", "zst"; None if its name is not a module's."""
    file_name = path[path.rfind("/") + 1 :]
    for suffix, packing in SUFFIXES.items():
        if file_name.endswith(suffix) and len(file_name) > len(suffix):
            return packing
    return None


def normal_alias(text: str) -> str | None:
    """``text`` with ``_`` for each ``-`` outside of brackets; None if its brackets don't match.

    A range such as ``[0-9]`` keeps its dash. kmod ignores a pattern with unmatched brackets, and finds nothing for such
    a text.
    """
    if "[" not in text:
        return None if "]" in text else text.replace("-", "_")
    parts = _BRACKETS.split(text)
    for i in range(0, len(parts), 2):
        if "[" in parts[i] or "]" in parts[i]:
            return None
        parts[i] = parts[i].replace("-", "_")
    return "".join(parts)


def checked_name(name: str) -> str:
    """``name`` with ``_`` for ``-``, if a module of a tree could have it; BadModuleName if not."""
    if not name:
        raise BadModuleName(name, "it is empty")
    _check_text(name, MAX_NAME_LENGTH)
    if "/" in name:
        raise BadModuleName(name, 'a name has no "/"')
    if ".." in name:
        raise BadModuleName(name, 'a name has no ".."')
    return name.replace("-", "_")


def checked_alias(text: str) -> str:
    """``text`` itself, if it could be a module's name or alias; BadModuleName if not.

    A MODALIAS (it has a colon) may hold nearly anything: a mainboard's name has slashes and dots as its maker likes.
    It is only ever compared with patterns, never used as a path.
    """
    if ":" in text:
        _check_text(text, MAX_ALIAS_LENGTH)
    else:
        checked_name(text)
    return text


def _check_text(text: str, limit: int) -> None:
    if _CONTROL.search(text):
        raise BadModuleName(text, "it has control characters")
    if len(text.encode("utf-8", "surrogatepass")) > limit:
        raise BadModuleName(text, f"it is longer than {limit} bytes")
