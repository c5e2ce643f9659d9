"""Trees of kernel modules: ``/lib/modules/RELEASE`` or any directory of module files, resolved as modprobe does.

``open_tree`` is where to begin. What a tree says is judged against the real kmod, version 30.
"""

from __future__ import annotations

from loader_svc.trees.errors import (
    BadModuleName,
    OutsideTree,
    TreeError,
    TreeNotFound,
    TreeTooBig,
    UnknownModule,
    UnreadableModule,
)
from loader_svc.trees.resolve import LoadStep, ModuleRef
from loader_svc.trees.tree import ModuleEntry, ModuleTree, Softdeps, open_tree

__all__ = [
    "BadModuleName",
    "LoadStep",
    "ModuleEntry",
    "ModuleRef",
    "ModuleTree",
    "OutsideTree",
    "Softdeps",
    "TreeError",
    "TreeNotFound",
    "TreeTooBig",
    "UnknownModule",
    "UnreadableModule",
    "open_tree",
]
