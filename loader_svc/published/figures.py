"""The published figures, as their file has them: facts to compare with, which no simulation reads."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

from loader_svc.sweep.summary import Fit, Reference

GRAPH_BYTES: Final = 1 << 30
"""Bytes of what the graph calls a GB: its last point is the boot whose report says 14588526272 bytes, 13.6 of these."""


@dataclass(frozen=True, slots=True)
class Boot:
    """What the stats file of one published boot said."""

    title: str
    machine: str
    """The bundled machine that describes it."""

    cpus: int
    policy: str
    modules: int
    becoming: int
    load: int
    wasted_bytes: int
    duplicates: dict[str, int]
    """How many times each module was a duplicate."""

    total_mod_size: int | None = None
    """None where it was not published, as for the next."""

    total_text_size: int | None = None
    becoming_bytes: int | None = None
    """What of the wasted bytes is that of duplicates found at ``becoming``."""


@dataclass(frozen=True, slots=True)
class Stress:
    """The published stress test."""

    title: str
    machine: str
    module: str
    workers: int
    as_cpus: int
    """The CPUs of a machine whose boot it was said to resemble."""

    used_kib: dict[str, int]
    """By policy: most memory that the whole guest used."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A published graph of waste against CPUs."""

    title: str
    machine: str
    cpus: tuple[int, ...]
    bounds: dict[str, tuple[tuple[float, float], ...]]
    """By policy: least and most GB that can be read off for each number of CPUs."""

    def middle(self, policy: str) -> list[tuple[int, float]]:
        """Return pairs of CPUs and GB, the middle of what can be read off."""
        return [(cpus, (low + high) / 2) for cpus, (low, high) in zip(self.cpus, self.bounds[policy], strict=True)]

    def reference(self, policy: str) -> Reference:
        """Return what a picture shows of a policy."""
        bounds = zip(self.cpus, self.bounds[policy], strict=True)
        return Reference(f"{policy} as published", tuple((cpus, low, high) for cpus, (low, high) in bounds))

    def fit(self, policy: str) -> Fit:
        """Return the line through those."""
        fit = Fit.of(self.middle(policy))
        assert fit is not None
        return fit


@dataclass(frozen=True, slots=True)
class Figures:
    """All that was published."""

    source: str
    late: Boot
    early: Boot
    shared: Boot
    stress: Stress
    graph: Graph


@cache
def published_figures() -> Figures:
    """Return the bundled figures."""
    text = resources.files("loader_svc.published").joinpath("figures.toml").read_text(encoding="utf-8")
    document: dict[str, Any] = tomllib.loads(text)
    graph = document["graph"]
    bounds = {
        policy: tuple((float(low), float(high)) for low, high in pairs) for policy, pairs in graph["gigabytes"].items()
    }
    late, early, shared = (Boot(**document[name]) for name in ("late", "early", "shared"))
    graph_ = Graph(graph["title"], graph["machine"], tuple(graph["cpus"]), bounds)
    return Figures(document["source"], late, early, shared, Stress(**document["stress"]), graph_)
