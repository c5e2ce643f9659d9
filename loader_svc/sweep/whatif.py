"""Remedies held against the boot without them, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from loader_svc.boot import BootSpec
from loader_svc.remedies import Remedy, applied, usual_remedies
from loader_svc.sweep.finished import Finished
from loader_svc.sweep.point import Point, grid
from loader_svc.sweep.summary import Spread

NONE: Final = "none"
By = Literal["bytes", "seconds", "peak"]

Run = Callable[[list[Point]], list[Finished]]
"""Simulates points and returns what they came to, in their order."""


@dataclass(frozen=True, slots=True)
class Saving:
    """What one remedy saves: less than 0 where it costs. Each is the spread over pairs of boots with equal seeds."""

    name: str
    sentence: str
    wasted_bytes: Spread
    duration_ns: Spread
    peak_held_bytes: Spread
    duplicates: Spread
    modules: Spread
    """How many modules more are loaded: a remedy that leaves modules out has that for its price."""

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        spreads = ("wasted_bytes", "duration_ns", "peak_held_bytes", "duplicates", "modules")
        return {
            "remedy": self.name,
            "sentence": self.sentence,
            **{
                f"{name}_{'gained' if name == 'modules' else 'saved'}": getattr(self, name)._asdict()
                for name in spreads
            },
        }


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Remedies for one boot, best first."""

    base: list[Finished]
    """The boots without a remedy, one for each seed."""

    savings: list[Saving]
    unchanged: list[Remedy]
    """Remedies that the boot has already, or that have nothing to act on."""


def what_if(spec: BootSpec, run: Run, *, seeds: int, remedies: Sequence[Remedy] = (), by: By = "bytes") -> WhatIf:
    """Boot without and with each remedy, with the same seeds, and rank what they save.

    No remedies stands for the usual ones and the user's own. RemedyError if one can't be applied.
    """
    numbers = range(1, seeds + 1)
    cpus, policies = [spec.machine.cpus], [spec.policy]
    base = run(list(grid(spec, cpus=cpus, policies=policies, remedies=[None], seeds=numbers)))
    remedies = remedies or usual_remedies(spec, _worst(base))
    changing = [remedy for remedy in remedies if applied(remedy, spec) != spec]
    points = list(grid(spec, cpus=cpus, policies=policies, remedies=changing, seeds=numbers))
    done = run(points)
    savings = [
        _saving(remedy, base, done[number * seeds : (number + 1) * seeds]) for number, remedy in enumerate(changing)
    ]
    spread = {"bytes": "wasted_bytes", "seconds": "duration_ns", "peak": "peak_held_bytes"}[by]
    savings.sort(key=lambda saving: (getattr(saving, spread).mean, saving.wasted_bytes.mean), reverse=True)
    return WhatIf(base, savings, [remedy for remedy in remedies if remedy not in changing])


def _saving(remedy: Remedy, base: Sequence[Finished], with_it: Sequence[Finished]) -> Saving:
    def saved(value: Callable[[Finished], int]) -> Spread:
        return Spread.of([value(before) - value(after) for before, after in zip(base, with_it, strict=True)])

    return Saving(
        remedy.name,
        remedy.sentence,
        saved(lambda boot: boot.wasted_bytes),
        saved(lambda boot: boot.duration_ns),
        saved(lambda boot: boot.peak_held_bytes),
        saved(lambda boot: boot.becoming + boot.load),
        saved(lambda boot: -boot.modules),
    )


def _worst(base: Sequence[Finished]) -> str:
    """Return the module that wastes most, empty if none wastes anything."""
    wasted: dict[str, int] = {}
    for boot in base:
        for module, (_, _, wasted_bytes) in boot.duplicates.items():
            wasted[module] = wasted.get(module, 0) + wasted_bytes
    return max(wasted, key=lambda module: wasted[module], default="")
