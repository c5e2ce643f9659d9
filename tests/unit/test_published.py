"""What was published, and how a simulation is held against it."""

from __future__ import annotations

import csv
import io
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from loader_svc.boot.machine_file import machine_of
from loader_svc.catalogue import catalogue_tree
from loader_svc.published.compare import compare, implied_bytes
from loader_svc.published.figures import GRAPH_BYTES, Boot, published_figures
from loader_svc.published.stress import peak_bytes
from loader_svc.sweep.finished import COLUMNS, Finished
from loader_svc.sweep.point import Point
from loader_svc.sweep.side_by_side import Table
from loader_svc.trees import open_tree

FIGURES = published_figures()


def as_published(point: Point, boot: Boot, **more: object) -> Finished:
    """Return a boot that comes to exactly what was published."""
    files = dict.fromkeys(boot.duplicates, 1000)
    early = boot.becoming > 0
    return Finished(
        **{  # type: ignore[arg-type]
            **dict.fromkeys(COLUMNS, 0),
            "machine": point.machine,
            "cpus": point.cpus,
            "policy": point.policy,
            "remedy": "none",
            "seed": point.seed,
            "wasted_bytes": boot.wasted_bytes,
            "becoming": boot.becoming,
            "load": boot.load,
            "modules": boot.modules,
            "peak_held_bytes": (1 << 29) + (point.cpus << 24),
            "duplicates": {
                name: (count, 0, count * files[name]) if early else (0, count, 2 * count * files[name])
                for name, count in boot.duplicates.items()
            },
            **more,
        }
    )


def run(points: list[Point], **wrong: object) -> list[Finished]:
    """Play a simulation that comes to what was published, but for what is to be wrong in the first table."""
    graph = {(policy, cpus): value for policy in FIGURES.graph.bounds for cpus, value in FIGURES.graph.middle(policy)}
    boots = {boot.policy: boot for boot in (FIGURES.late, FIGURES.early, FIGURES.shared)}
    done = []
    for number, point in enumerate(points):
        boot = boots[point.policy]
        if number >= 3:
            boot = replace(boot, wasted_bytes=int(graph[point.policy, point.cpus] * GRAPH_BYTES))
        done.append(as_published(point, boot, **(wrong if number == 0 else {})))
    return done


def tables(**wrong: object) -> list[Table]:
    return compare(lambda points: run(points, **wrong), 1, peak=lambda *_: 3 << 30)


def test_what_was_published_agrees_with_itself() -> None:
    found = tables()
    assert [row for table in found for row in table.rows if not row.agrees] == []
    bounded = [row.what for table in found for row in table.rows if row.bound]
    assert bounded[:2] == ["duplicates at load", "wasted bytes"]
    modules = [name for name, count in FIGURES.late.duplicates.items() if count > 20]
    assert bounded[2 : 2 + len(modules)] == modules
    assert len(bounded) == 2 + len(modules) + 2 + 5 + 4


def test_the_stress_test_is_held_against_the_boots_with_as_much_memory() -> None:
    """The boots above hold half a GiB and 16 MiB for each CPU: 3 GiB are those of 160."""
    (table,) = (table for table in tables() if table.title.startswith("the stress test"))
    rows = {row.what: (row.real, row.simulated) for row in table.rows}
    for policy in ("v6.3", "v6.4"):
        assert rows[f"{policy}, most memory at once, GiB"][1] == "3.00"
        assert rows[f"{policy}, as a boot of so many CPUs"] == ("400", "160")


def test_a_hundred_workers_hold_a_hundred_files_at_once() -> None:
    """And with them, on v6.3, as many layouts; the files have debugging information, the layouts have none."""
    stress = replace(FIGURES.stress, workers=20)
    tree = open_tree(catalogue_tree())
    file_bytes = machine_of(stress.machine).file_factor * (tree.module("xfs").size_bytes or 0)
    late, early = (peak_bytes(stress, policy, 1) for policy in ("v6.3", "v6.4"))
    assert 20 * file_bytes <= early < late < 23 * file_bytes


@pytest.mark.parametrize(
    ("wrong", "row"),
    [
        ({"load": int(1411 * 0.79)}, "duplicates at load"),
        ({"wasted_bytes": int(14588526272 * 1.21)}, "wasted bytes"),
        ({"duplicates": {**dict.fromkeys(FIGURES.late.duplicates, (0, 41, 82)), "kvm": (0, 82, 164)}}, "kvm"),
        ({"duplicates": {**dict.fromkeys(FIGURES.late.duplicates, (0, 84, 168)), "cryptd": (0, 400, 800)}}, "cryptd"),
    ],
)
def test_what_is_outside_of_its_bounds_is_said(wrong: dict[str, object], row: str) -> None:
    assert row in [each.what for each in tables(**wrong)[0].rows if not each.agrees]


def test_the_lengths_of_files_follow_from_the_tables() -> None:
    large, others = implied_bytes(FIGURES)
    often, rarely = 249, 7
    assert often * large + (1411 - 2 * often) * others == pytest.approx(14588526272 / 2)
    assert rarely * large + (83 - 2 * rarely) * others == pytest.approx(228959096)


def test_the_figures_are_those_of_the_specification(shared_dir: Path) -> None:
    """The counts of the first table, as its text has them."""
    text = (shared_dir / "spec" / "published-results.md").read_text()
    section = text[text.index("## 1.") : text.index("## 2.")]
    found: dict[str, int] = {}
    for line in csv.reader(io.StringIO(section), delimiter="|"):
        for names, count in itertools.pairwise(line):
            if re.fullmatch(r"\d+( each)?", count.strip()):
                found |= dict.fromkeys((name.strip() for name in names.split(",")), int(count.split()[0]))
    assert found == FIGURES.late.duplicates


def test_the_machines_are_bundled() -> None:
    for boot in (FIGURES.late, FIGURES.early, FIGURES.shared):
        assert machine_of(boot.machine).cpus == boot.cpus
