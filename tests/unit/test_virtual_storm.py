"""Storms in virtual time: their totals, their spread over seeds, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from loader_svc.catalogue import catalogue_tree
from loader_svc.trees import ModuleTree, TreeError, open_tree
from loader_svc.virtual.call import VirtualCall
from loader_svc.virtual.conservation import imbalances
from loader_svc.virtual.costs import NO_COSTS
from loader_svc.virtual.storm import StormRun, VirtualStorm, VirtualStormResult, simulate_storm
from modpressure.errors import BadRequest
from modpressure.kernel.outcome import Outcome
from modpressure.kernel.policy import V6_3, V6_4, V6_5


@pytest.fixture(scope="module")
def tree() -> ModuleTree:
    return open_tree(catalogue_tree())


def simulate(storm: VirtualStorm, tree: ModuleTree, seed: int = 0) -> VirtualStormResult:
    """Simulate, and see that all adds up."""
    run = StormRun(storm, tree, seed)
    result = run.run(None)
    assert imbalances(run.machine) == []
    assert sum(result.outcomes.values()) == result.counters.calls
    return result


ONCE = VirtualStorm(("xfs",), workers=40, cpus=8, once=True)


@pytest.mark.parametrize("policy", [V6_3, V6_4])
@pytest.mark.parametrize("modules", [("xfs",), ("xfs", "loop", "minix")])
def test_each_module_goes_live_once_and_all_others_are_duplicates(
    tree: ModuleTree, policy: Any, modules: tuple[str, ...]
) -> None:
    result = simulate(replace(ONCE, policy=policy, modules=modules), tree)
    counters = result.counters
    assert (counters.calls, counters.modcount) == (40 * len(modules), len(modules))
    assert counters.failed_becoming + counters.failed_load_modules == 39 * len(modules)
    if policy is V6_3:
        assert counters.failed_becoming == 0
    assert {failed.module for failed in result.failed_modules} == set(modules)


def test_calls_in_flight_share_results_unless_each_has_a_copy(tree: ModuleTree) -> None:
    shared = simulate(replace(ONCE, policy=V6_5), tree)
    assert shared.counters.modcount == 1
    assert shared.counters.shared_calls + shared.counters.failed_becoming == 39
    assert shared.counters.shared_calls > 30
    copies = simulate(replace(ONCE, policy=V6_5, separate_copies=True), tree)
    assert copies.counters.shared_calls == 0
    assert copies.peak_held_bytes > 5 * shared.peak_held_bytes


def test_the_same_seed_gives_the_same_storm_and_another_one_another(tree: ModuleTree) -> None:
    storm = VirtualStorm(("xfs",), workers=12, cpus=4, operations=2)
    calls: list[list[tuple[Any, ...]]] = []

    def record(call: VirtualCall) -> None:
        assert call.ending is not None
        calls[-1].append((call.worker, call.begun_ns, call.ended_ns, call.wait_ns, call.ending))

    results = []
    for seed in (7, 7, 8):
        calls.append([])
        results.append(simulate_storm(storm, tree, seed, record=record))
    assert calls[0] == calls[1]
    assert results[0] == results[1]
    assert calls[0] != calls[2]
    assert len(calls[0]) == results[0].counters.calls


def test_calls_are_handed_on_in_the_order_in_which_they_were_counted(tree: ModuleTree) -> None:
    storm = VirtualStorm(("xfs", "loop", "minix"), workers=12, cpus=4, once=True)
    duplicates: list[str] = []

    def record(call: VirtualCall) -> None:
        assert call.ending is not None
        if call.ending.duplicate:
            duplicates.append(call.ending.module)

    for seed in range(5):
        duplicates.clear()
        result = simulate_storm(storm, tree, seed, record=record)
        assert [failed.module for failed in reversed(result.failed_modules)] == list(dict.fromkeys(duplicates))


def test_mode_repeat_loads_and_unloads_as_often_as_asked(tree: ModuleTree) -> None:
    storm = VirtualStorm(("xfs", "minix"), workers=6, cpus=4, operations=3)
    result = simulate(storm, tree)
    assert result.operations == result.counters.modcount == result.counters.unloads == 6 * 2 * 3
    workers = Counter[str]()
    simulate_storm(storm, tree, 0, record=lambda call: workers.update([call.worker]))
    assert set(workers) == {f"worker-{number}" for number in range(6)}


def test_it_ends_when_its_time_is_up(tree: ModuleTree) -> None:
    storm = VirtualStorm(("minix",), workers=4, cpus=2, operations=0, seconds=0.05)
    result = simulate(storm, tree)
    assert 0.05e9 <= result.duration_ns < 0.06e9
    assert result.operations > 3
    kept = simulate(replace(storm, keep_loaded=True), tree)
    assert (kept.counters.modcount, kept.counters.unloads, kept.operations) == (1, 0, 1)


def test_it_comes_to_an_end_where_nothing_takes_time(tree: ModuleTree) -> None:
    result = simulate(VirtualStorm(("minix",), workers=9, cpus=2, operations=2, costs=NO_COSTS), tree)
    assert result.counters.modcount == 18


def test_dependencies_are_loaded_before_and_not_counted_or_missing(tree: ModuleTree) -> None:
    storm = VirtualStorm(("kvm_intel",), workers=3, once=True)
    run = StormRun(storm, tree, 0)
    run.run(None)
    assert {entry.name for entry in run.machine.modules} == {"kvm_intel", "kvm", "irqbypass"}
    assert run.machine.counters.modcount == 1
    run = StormRun(replace(storm, with_dependencies=False), tree, 0)
    run.run(None)
    # A kernel that is not known by its symbols resolves every one of them.
    assert {entry.name for entry in run.machine.modules} == {"kvm_intel"}


def test_more_cpus_find_more_duplicates_late(tree: ModuleTree) -> None:
    def late(cpus: int) -> int:
        results = [simulate(replace(ONCE, cpus=cpus), tree, seed) for seed in range(5)]
        assert all(result.outcomes[Outcome.LIVE, ""] == 1 for result in results)
        return sum(result.counters.failed_load_modules for result in results)

    assert late(1) <= late(4) < late(40)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"modules": ()}, "at least one module"),
        ({"workers": 0}, "workers 0 "),
        ({"workers": 10**6}, "workers 1000000 "),
        ({"cpus": 10**7}, "cpus 10000000 "),
        ({"operations": -1, "once": False}, "operations -1 "),
        ({"seconds": float("nan"), "once": False}, "seconds nan "),
        ({"operations": 0, "once": False}, "never ends"),
        ({"keep_loaded": True, "once": False}, "never ends"),
    ],
)
def test_a_storm_that_makes_no_sense_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        replace(ONCE, **change)


def test_an_unknown_module_is_named(tree: ModuleTree) -> None:
    with pytest.raises(TreeError, match="nosuch"):
        simulate_storm(replace(ONCE, modules=("nosuch",)), tree, 0)
