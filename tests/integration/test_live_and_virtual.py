"""Eight workers on the live driver and on the virtual one: the same totals, and splits that overlap."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

import pytest

from loader_svc.catalogue import catalogue_tree
from loader_svc.trees import open_tree
from loader_svc.virtual.calibrate import calibrate
from loader_svc.virtual.storm import VirtualStorm, simulate_storm
from modpressure.client import Client
from modpressure.kernel.outcome import Outcome
from modpressure.kernel.policy import V6_3, V6_4, V6_5, Policy
from modpressure.storm import StormRun
from modpressure.v1 import call_pb2
from modpressure.v1.loader_service_pb2 import Storm
from tests.services import Launch

WORKERS = 8
STORMS = 8
SEEDS = 150
"""Virtual storms with the costs of each calibration."""

MODULE = "xfs"
NUMBERS = {V6_3: call_pb2.POLICY_V6_3, V6_4: call_pb2.POLICY_V6_4, V6_5: call_pb2.POLICY_V6_5}

Counts = dict[tuple[Outcome, str], int]


async def live(stats: str, loaders: list[str], policy: Policy) -> list[Counts]:
    """Run storms on loaders, each in a system of its own, and return the outcomes of each."""
    found = []
    async with Client(loaders, stats) as client:
        for number in range(STORMS):
            storm = Storm(
                system=f"live-{policy.name.replace('.', '-')}-{number}",
                modules=[MODULE],
                workers=WORKERS,
                mode=Storm.MODE_ONCE,
                policy=NUMBERS[policy],
                with_dependencies=True,
            )
            result = await StormRun(client, storm).run()
            assert not result.failures
            counts: Counts = {}
            for summary in result.summaries.values():
                for each in summary.outcomes:
                    key = Outcome(each.outcome), each.errno
                    counts[key] = counts.get(key, 0) + each.count
            found.append(counts)
    return found


def splits(storms: list[Counts]) -> list[tuple[int, int]]:
    """Return how many duplicates of each storm were found at becoming, and at load."""
    return [(counts.get((Outcome.BECOMING, "EEXIST"), 0), counts.get((Outcome.LOAD, "EEXIST"), 0)) for counts in storms]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [V6_3, V6_4, V6_5], ids=lambda policy: policy.name)
async def test_both_drivers_come_to_the_same_totals_and_to_splits_that_overlap(
    launch: Launch, tmp_path: Path, policy: Policy
) -> None:
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "stats.sqlite3"))
    loaders = [launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address).address for _ in range(2)]
    tree = open_tree(catalogue_tree())
    # Before and after: who else uses the machine changes what calibrating comes to, as it changes live storms.
    calibrations = [await asyncio.to_thread(calibrate, tree, tmp_path)]
    measured = await live(stats.address, loaders, policy)
    calibrations.append(await asyncio.to_thread(calibrate, tree, tmp_path))
    cores = len(os.sched_getaffinity(0))
    simulated = []
    for costs in calibrations:
        storm = VirtualStorm((MODULE,), workers=WORKERS, cpus=cores, once=True, policy=policy, costs=costs)
        simulated += [simulate_storm(storm, tree, seed).outcomes for seed in range(SEEDS)]

    for counts in (*measured, *simulated):
        assert sum(counts.values()) == WORKERS
        assert counts[Outcome.LIVE, ""] == 1
        assert {errno for _, errno in counts} <= {"", "EEXIST"}
    seen, expected = splits(measured), splits(simulated)
    for stage in (0, 1):
        live_counts, virtual_counts = [each[stage] for each in seen], [each[stage] for each in expected]
        said = f"stage {stage}, {cores} cores: live {sorted(live_counts)}, virtual {Counter(virtual_counts)}"
        assert min(live_counts) <= max(virtual_counts), said
        assert min(virtual_counts) <= max(live_counts), said
