"""From a name or alias to what modprobe would load, step by step.

The rules are libkmod's of kmod 30: where a text is looked up and in which order, and in which order a module's
dependencies and soft dependencies are loaded. Repeats are kept, for libkmod keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from loader_svc.trees.config import ModprobeConfig
from loader_svc.trees.index import TreeIndex
from loader_svc.trees.names import module_name, normal_alias
from loader_svc.trees.patterns import FirstMatch, PatternTable, matches


class ModuleRef(NamedTuple):
    """One result of a lookup: a module by its name, which need not be in the tree, and how it was found."""

    name: str
    alias: str | None = None
    """The alias that led to it; None if it was asked for by its name. modprobe applies blacklists to aliases only."""
    builtin: bool = False
    """Found among the aliases of what is built into the kernel."""


@dataclass(frozen=True, slots=True)
class LoadStep:
    """One thing that modprobe does: load a file, find that a module is built in, or run a command instead."""

    kind: Literal["insmod", "builtin", "install"]
    module: str
    path: str = ""
    """The module's file, relative to the root; empty if there is none."""
    options: str = ""
    """What the kernel is given, letter by letter: behind options of the configuration there is a blank."""
    command: str = ""
    """The command of ``install``, as configured."""
    required: bool = True
    """False if it is there by a soft dependency only: its failure is passed over."""


class Resolver:
    """Looks up texts in an index and a configuration."""

    def __init__(self, index: TreeIndex, config: ModprobeConfig) -> None:
        self._index = index
        self._config = config
        self._places = {name: place for place, name in enumerate(index.names())}
        self._builtin = frozenset(index.builtin)
        self._blacklist = frozenset(config.blacklist)
        self._softdep_lines = FirstMatch((line.module, (line.pre, line.post)) for line in config.softdeps)
        self._install_lines = FirstMatch(config.install)
        self._found_by_softdeps: dict[str, tuple[list[ModuleRef], list[ModuleRef]]] = {}

    @property
    def places(self) -> dict[str, int]:
        """Where in the index a module of a name is."""
        return self._places

    @cached_property
    def _aliases(self) -> PatternTable:
        return _table(self._index.alias_patterns, self._index.alias_modules)

    @cached_property
    def _builtin_aliases(self) -> PatternTable:
        return _table(self._index.builtin_alias_patterns, self._index.builtin_alias_modules)

    @cached_property
    def _symbols(self) -> PatternTable:
        return PatternTable([f"symbol:{symbol}" for symbol in self._index.symbols], self._index.symbol_modules)

    def is_builtin(self, name: str) -> bool:
        """Whether ``modules.builtin`` lists ``name``."""
        return name in self._builtin

    def is_blacklisted(self, name: str) -> bool:
        """Whether a ``blacklist`` line names the module ``name``."""
        return name in self._blacklist

    def lookup(self, text: str) -> list[ModuleRef]:
        """List the modules that ``text`` stands for: the first table that has any gives them all. Empty if none has."""
        key = normal_alias(text)
        if key is None:
            return []
        found = [ModuleRef(pair.value, pair.name) for pair in self._config.aliases if matches(pair.name, key)]
        if not found and key in self._places:
            found = [ModuleRef(key)]
        if not found and key.startswith("symbol:"):
            found = [ModuleRef(name, key) for name in self._symbols.find(key)]
        if not found:
            commands = (*self._config.install, *self._config.remove)
            found = [ModuleRef(module_name(pair.name)) for pair in commands if pair.name == key][:1]
        if not found:
            found = [ModuleRef(name, key) for name in self._aliases.find(key)]
        if not found and key in self._builtin:
            found = [ModuleRef(module_name(key))]
        if not found:
            found = [ModuleRef(name, key, True) for name in self._builtin_aliases.find_unranked(key)]
        return found

    def softdeps(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return what the module ``name`` would like loaded before and after it, as written: the first line counts."""
        return self._softdep_lines.find(name) or ((), ())

    def steps(self, ref: ModuleRef, options: str = "") -> list[LoadStep]:
        """List what modprobe does for one result of a lookup, with ``options`` of the caller's for that module."""
        order, required = self._order(ref)
        steps = []
        for item in order:
            own = self._options(item)
            given = f"{own} " if own else ""
            step = self._step(item, given + options if item == ref else given, item in required)
            if step is not None:
                steps.append(step)
        return steps

    def _order(self, ref: ModuleRef) -> tuple[list[ModuleRef], set[ModuleRef]]:
        """List all that ``ref`` brings with it, in loading order with repeats; and what of it must not fail.

        Each module is gone into once, but added as often as another one's dependencies name it. A stack of its own,
        for a chain of soft dependencies can be longer than Python's.
        """
        order: list[ModuleRef] = []
        required = {ref, *self._dependencies(ref)}
        visited: set[ModuleRef] = set()
        todo: list[tuple[Literal["all", "soft", "self"], ModuleRef]] = [("all", ref)]
        while todo:
            what, item = todo.pop()
            if what == "self":
                order.append(item)
            elif what == "soft":
                before, after = self._found_softdeps(item.name)
                todo += [("all", other) for other in reversed(after)]
                todo.append(("self", item))
                todo += [("all", other) for other in reversed(before)]
            elif item not in visited:
                visited.add(item)
                todo.append(("soft", item))
                todo += [("soft", other) for other in reversed(self._dependencies(item))]
        return order, required

    def _dependencies(self, ref: ModuleRef) -> list[ModuleRef]:
        """List what must be loaded before ``ref``, in that order: its line of ``modules.dep`` from right to left."""
        place = self._places.get(ref.name)
        if place is None:
            return []
        return [ModuleRef(module_name(self._index.paths[other])) for other in reversed(self._index.depends[place])]

    def _found_softdeps(self, name: str) -> tuple[list[ModuleRef], list[ModuleRef]]:
        found = self._found_by_softdeps.get(name)
        if found is None:
            pre, post = self.softdeps(name)
            found = (
                [ref for text in pre for ref in self.lookup(text)],
                [ref for text in post for ref in self.lookup(text)],
            )
            self._found_by_softdeps[name] = found
        return found

    def _options(self, ref: ModuleRef) -> str:
        found = (pair.value for pair in self._config.options if pair.name in (ref.name, ref.alias))
        return " ".join(found)

    def _step(self, ref: ModuleRef, options: str, required: bool) -> LoadStep | None:
        """Return the step for one module; None if there is nothing that modprobe could do."""
        place = self._places.get(ref.name)
        path = self._index.paths[place] if place is not None else ""
        # A command stands for the soft dependencies too, so it doesn't run where these are configured.
        if not any(self._found_softdeps(ref.name)):
            command = self._command(ref, found_by_command=ref.alias is None and not path)
            if command is not None:
                return LoadStep("install", ref.name, path, options, command, required)
        if path:
            return LoadStep("insmod", ref.name, path, options, required=required)
        if ref.builtin or ref.name in self._builtin:
            return LoadStep("builtin", ref.name, required=required)
        return None

    def _command(self, ref: ModuleRef, found_by_command: bool) -> str | None:
        """Return the command to run instead of loading ``ref``; None for none. The first that fits counts.

        What has no file but was found by its very name was found by its own line, which counts before any pattern.
        """
        own = (pair.value for pair in self._config.install if found_by_command and pair.name == ref.name)
        return next(own, None) or self._install_lines.find(ref.name)


def _table(patterns: list[str], modules: list[str]) -> PatternTable:
    """Make a table of those patterns whose brackets match, as libkmod compares them."""
    normal = [normal_alias(pattern) for pattern in patterns]
    return PatternTable(
        [pattern for pattern in normal if pattern is not None],
        [module for pattern, module in zip(normal, modules, strict=True) if pattern is not None],
    )
