"""What there is to know of a tree before anyone asks for a module: the contents of ``modules.*``, however come by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loader_svc.trees.names import module_name


@dataclass(frozen=True, slots=True)
class TreeIndex:
    """The modules of a tree and what leads to them, in depmod's order. Made from texts or from files, kept in a cache.

    All fields are plain lists of strings and numbers; lists that belong together have the same length.
    """

    paths: list[str] = field(default_factory=list)
    """The modules' files, relative to the root."""
    sizes_bytes: list[int] = field(default_factory=list)
    """Lengths of these files; -1 where ``modules.dep`` names a file that there is not."""
    depends: list[list[int]] = field(default_factory=list)
    """For each module, the places in ``paths`` of all that it needs, nearest first (a line of ``modules.dep``)."""
    alias_patterns: list[str] = field(default_factory=list)
    """Patterns of ``modules.alias``, in its order, as written in the modules."""
    alias_modules: list[str] = field(default_factory=list)
    symbols: list[str] = field(default_factory=list)
    """Exported symbols."""
    symbol_modules: list[str] = field(default_factory=list)
    softdeps: list[str] = field(default_factory=list)
    """The lines of ``modules.softdep``."""
    builtin: list[str] = field(default_factory=list)
    """Names of what is built into the kernel."""
    builtin_alias_patterns: list[str] = field(default_factory=list)
    builtin_alias_modules: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    """Module files, of those in ``paths`` and others, that would be found only by leaving the tree."""

    def names(self) -> list[str]:
        """Names of the modules, in the order of ``paths``."""
        return [module_name(path) for path in self.paths]


def is_index(fields: dict[str, Any]) -> bool:
    """Whether ``fields`` is what a TreeIndex can be made of: right names, right types, and they fit together."""
    if set(fields) != set(TreeIndex.__slots__):
        return False
    for name, value in fields.items():
        if not isinstance(value, list):
            return False
        kind = {"sizes_bytes": int, "depends": list}.get(name, str)
        if any(type(item) is not kind for item in value):
            return False
    count = len(fields["paths"])
    return (
        len(fields["sizes_bytes"]) == len(fields["depends"]) == count
        and all(type(place) is int and 0 <= place < count for line in fields["depends"] for place in line)
        and len(fields["alias_patterns"]) == len(fields["alias_modules"])
        and len(fields["symbols"]) == len(fields["symbol_modules"])
        and len(fields["builtin_alias_patterns"]) == len(fields["builtin_alias_modules"])
    )
