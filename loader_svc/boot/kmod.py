"""What libkmod does for one MODALIAS: the modules in their order, found out once, and the way through them.

``kmod load`` of udev (src/udev/udev-builtin-kmod.c, src/shared/module-util.c, systemd 252) looks the text up and probes
each module of the list in turn (``kmod_module_probe_insert_module``, libkmod/libkmod-module.c, kmod 30).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loader_svc.trees import BadModuleName, LoadStep, ModuleTree
from loader_svc.trees.config import Pair
from modpressure.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Insertion:
    """One module to be inserted on the way to another one."""

    module: str
    options: str = ""
    is_required: bool = True
    """Whether the way ends where its insertion fails; not for what is there by a soft dependency only."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One module that a MODALIAS leads to, with all that it brings along, in order."""

    module: str
    insertions: tuple[Insertion, ...]
    """Empty for what is on a blacklist or has no file."""


@dataclass(frozen=True, slots=True)
class ModaliasPlan:
    """What a MODALIAS leads to, in the order of the tables, repeats kept."""

    modalias: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class KmodConfig:
    """What is different from the tree and its configuration."""

    blacklist: frozenset[str] = frozenset()
    builtin: frozenset[str] = frozenset()
    merged: tuple[tuple[str, str], ...] = ()
    """Modules that are part of another one's file: name, and the other one's."""
    needs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """What modules need besides what the tree says, in loading order."""


class Kmod:
    """Looks texts up in one tree with one configuration, each once."""

    def __init__(self, tree: ModuleTree, config: KmodConfig | None = None) -> None:
        """BadRequest for aliases that lead back to themselves."""
        config = config or KmodConfig()
        self._tree = tree
        self._blacklist = config.blacklist
        self._builtin = config.builtin
        self._merged = dict(config.merged)
        self._needs = dict(config.needs)
        self.places = frozenset(tree.names())
        """The modules that have a file."""
        self._plans: dict[str, ModaliasPlan] = {}
        self._entries: dict[object, Entry] = {}
        _refuse_alias_loops(tree.config.aliases)

    def plan(self, text: str) -> ModaliasPlan:
        """Return what a MODALIAS or a name leads to; no entries if that is nothing. BadRequest for a cycle."""
        plan = self._plans.get(text)
        if plan is None:
            plan = self._plans[text] = ModaliasPlan(text, tuple(self._look_up(text)))
        return plan

    def is_builtin(self, name: str) -> bool:
        """Whether there is nothing to load for a module."""
        return name in self._builtin or self._tree.is_builtin(name)

    def _look_up(self, text: str) -> Iterator[Entry]:
        try:
            refs = self._tree.lookup(text)
        except BadModuleName:
            # A device may call itself what it likes; libkmod finds nothing for it.
            return
        for ref in refs:
            if ref.builtin or self.is_builtin(ref.name):
                continue
            entry = self._entries.get(ref)
            if entry is None:
                steps = () if self._is_blacklisted(ref.name) else self._tree.steps(ref)
                entry = self._entries[ref] = Entry(self._merged.get(ref.name, ref.name), self._insertions(steps))
            yield entry

    def _insertions(self, steps: Iterable[LoadStep]) -> tuple[Insertion, ...]:
        found = []
        for step in steps:
            # A command of an ``install`` line is not run: what it would load, nobody knows.
            if step.kind != "insmod" or self.is_builtin(step.module):
                continue
            self._refuse_cycle(step.module)
            needed = self._needs.get(step.module, ())
            found += [Insertion(name, "", step.required) for name in needed if not self.is_builtin(name)]
            # Of what is part of another file, that file is loaded.
            found.append(Insertion(self._merged.get(step.module, step.module), step.options, step.required))
        return tuple(found)

    def _is_blacklisted(self, name: str) -> bool:
        return name in self._blacklist or self._tree.is_blacklisted(name)

    def _refuse_cycle(self, name: str) -> None:
        depends = self._tree.depends(name)
        for other in depends:
            if other == name or name in self._tree.depends(other):
                raise BadRequest(
                    f"the dependencies in the module tree {self._tree.release} have a cycle: {name} needs {other},"
                    f" which needs {name}",
                    field="tree",
                )


def _refuse_alias_loops(aliases: Sequence[Pair]) -> None:
    """BadRequest if ``alias`` lines of the configuration lead back to where they began."""
    leads: Mapping[str, str] = {pair.name: pair.value for pair in reversed(aliases)}
    for name in dict.fromkeys(pair.name for pair in aliases):
        way = [name]
        while way[-1] in leads and len(way) <= len(leads):
            way.append(leads[way[-1]])
            if way[-1] == name and way[1] != name:
                raise BadRequest(f"the aliases of the configuration have a loop: {' -> '.join(way)}", field="tree")
