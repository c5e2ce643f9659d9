"""What can go wrong with a tree of modules.

    TreeError
    ├── TreeNotFound        no tree at that path, or not one that can be read
    ├── TreeTooBig          more files, or longer ones, than a tree of modules has
    ├── BadModuleName       not a name or alias that a module could have
    ├── UnknownModule       nothing in the tree goes by that name or alias
    ├── OutsideTree         the file would be found only by leaving the tree
    └── UnreadableModule    there is no regular file to read where the module should be

Each is one sentence that names the value, and one of the requests' errors of ``modpressure.errors`` too, so that a
server needs no table of its own for them.
"""

from __future__ import annotations

from modpressure.errors import BadRequest, Forbidden, ModpressureError, NotFound, OverLimit


class TreeError(ModpressureError):
    """Something is wrong with a tree of modules, or with what was asked of it."""


class TreeNotFound(TreeError, NotFound):
    """There is no tree at that path, or it can't be read."""


class TreeTooBig(TreeError, OverLimit):
    """There are more files, or longer ones, than a tree of modules has."""


class BadModuleName(TreeError, BadRequest):
    """No module could have that name or alias."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{_shown(name)} is no module name: {why}")
        self.name = name


class UnknownModule(TreeError, NotFound):
    """Nothing in the tree goes by that name or alias."""

    def __init__(self, name: str, release: str, *, builtin: bool = False) -> None:
        what = "is built into the kernel and has no file" if builtin else "is not a module or alias"
        super().__init__(f"{_shown(name)} {what} in the module tree {release}")
        self.name = name


class OutsideTree(TreeError, Forbidden):
    """The file would be found only by leaving the tree."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{_shown(path)} leads out of the module tree")
        self.path = path


class UnreadableModule(TreeError, NotFound):
    """There is no regular file to read where the module should be."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{_shown(path)} can't be read: {why}")
        self.path = path


def _shown(text: str) -> str:
    """``text`` quoted for a sentence: control characters escaped, cut where it gets too long to read."""
    return repr(text if len(text) <= 100 else text[:97] + "...")
