"""One boot of a sweep: what it is called, what is booted, and how to know it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from loader_svc.boot import BootResult, BootSpec, TreeSource, simulate_boot
from loader_svc.remedies import Remedy
from loader_svc.sweep.finished import Finished
from loader_svc.sweep.version import simulation_version
from modpressure.kernel.policy import Policy


@dataclass(frozen=True, slots=True)
class Point:
    """A boot to be simulated once. Can be pickled."""

    machine: str
    cpus: int
    policy: str
    remedy: str
    seed: int
    spec: BootSpec
    spec_digest: str

    @property
    def key(self) -> str:
        """What its result goes by: the spec, the seed, and the program that simulates. Names do not matter."""
        text = f"{self.spec_digest} {self.seed} {simulation_version()}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def named(self, finished: Finished) -> Finished:
        """Return the result of a point with the same key under this one's names."""
        return replace(
            finished,
            machine=self.machine,
            cpus=self.cpus,
            policy=self.policy,
            remedy=self.remedy,
        )


def grid(
    base: BootSpec,
    *,
    cpus: Sequence[int],
    policies: Sequence[Policy],
    remedies: Sequence[Remedy | None],
    seeds: Iterable[int],
) -> Iterator[Point]:
    """Yield a point for each combination, on the machine of ``base``. None among the remedies stands for none.

    MachineError for a number of CPUs that no machine has; what `remedies.applied` raises.
    """
    from loader_svc.remedies import applied

    seeds = list(seeds)
    trees: dict[TreeSource, Any] = {}
    for policy in policies:
        for remedy in remedies:
            for count in cpus:
                spec = replace(base, policy=policy, machine=base.machine.with_cpus(count))
                if remedy is not None:
                    spec = applied(remedy, spec)
                digest = spec_digest(spec, trees)
                name = remedy.name if remedy is not None else "none"
                for seed in seeds:
                    yield Point(base.machine.name, count, policy.name, name, seed, spec, digest)


def simulate(point: Point) -> Finished:
    """Simulate a point. For the processes of a sweep: a function of a module, with a result that can be pickled."""
    return finished(point, simulate_boot(point.spec, point.seed))


def finished(point: Point, result: BootResult) -> Finished:
    """Return what a boot came to as a row."""
    counters = result.counters
    return Finished(
        machine=point.machine,
        cpus=point.cpus,
        policy=point.policy,
        remedy=point.remedy,
        seed=point.seed,
        wasted_bytes=result.wasted_bytes,
        becoming=counters.failed_becoming,
        load=counters.failed_load_modules,
        modules=counters.modcount,
        finit_calls=result.finit_calls,
        init_calls=result.init_calls,
        gate_joins=result.gate_joins,
        failed_inits=sum(result.init_failures.values()),
        failed_kreads=counters.failed_kreads,
        workers=result.workers,
        duration_ns=result.duration_ns,
        peak_copy_bytes=result.peak_copy_bytes,
        peak_held_bytes=result.peak_held_bytes,
        total_mod_size=counters.total_mod_size,
        total_text_size=counters.total_text_size,
        duplicates={
            each.module: (each.becoming_count, each.load_count, each.wasted_bytes) for each in result.failed_modules
        },
    )


def spec_digest(spec: BootSpec, trees: dict[TreeSource, Any] | None = None) -> str:
    """Return a digest of all that a spec says, and of the files that its tree has; ``trees`` remembers those."""
    trees = {} if trees is None else trees
    if spec.tree not in trees:
        trees[spec.tree] = _tree_facts(spec.tree)
    text = json.dumps([_plain(spec), trees[spec.tree]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tree_facts(source: TreeSource) -> Any:
    if source.root is None and not source.modprobe_dirs:
        return None  # the catalogue is a part of the program
    from loader_svc.boot.files import opened

    tree = opened(source)
    return [tree.identity, _plain(tree.config)]


def _plain(value: Any) -> Any:
    """Return a value as JSON's types, the same for equal values."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        kept = {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
        return {"": type(value).__name__, **kept}
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(each)] for key, each in sorted(value.items())]
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, Sequence):
        return [_plain(each) for each in value]
    return str(value)
