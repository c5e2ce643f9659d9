"""Sweeps without their processes: points and their keys, the journal, the summary, the files."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_svc.boot import BootSpec, Device, Machine
from loader_svc.boot.spec import TreeSource
from loader_svc.remedies import remedy_named
from loader_svc.sweep.executors import Here
from loader_svc.sweep.extra import needed
from loader_svc.sweep.finished import COLUMNS, Finished
from loader_svc.sweep.journal import Journal
from loader_svc.sweep.outputs import check_output, csv_bytes, document, parquet_bytes, write_output
from loader_svc.sweep.plots import against_cpus
from loader_svc.sweep.point import Point, grid, spec_digest
from loader_svc.sweep.run import run_points
from loader_svc.sweep.summary import QUANTITIES, Fit, Reference, Series, Spread, Summary
from loader_svc.sweep.whatif import Saving, WhatIf
from modpressure.errors import BadRequest, ModpressureError, NotNow
from modpressure.kernel.policy import V6_3, V6_4

CPU = Device("/devices/system/cpu/cpu{cpu}", modalias="cpu:type:x86,ven0000fam0006mod0055:feature:,0099,0085")
SPEC = BootSpec(Machine("toy", 2, 4 << 30, (CPU,)))


def row(cpus: int = 8, seed: int = 1, policy: str = "v6.4", wasted_bytes: int = 1 << 30, **more: object) -> Finished:
    zeros = dict.fromkeys(COLUMNS, 0)
    return Finished(
        **{  # type: ignore[arg-type]
            **zeros,
            "machine": "toy",
            "remedy": "none",
            "cpus": cpus,
            "seed": seed,
            "policy": policy,
            "wasted_bytes": wasted_bytes,
            **more,
        }
    )


def points(**more: object) -> list[Point]:
    asked = {"cpus": [2, 4], "policies": [V6_3, V6_4], "remedies": [None], "seeds": [1, 2], **more}
    return list(grid(SPEC, **asked))  # type: ignore[arg-type]


# --- points ---


def test_a_grid_has_every_combination_once() -> None:
    found = points(remedies=[None, remedy_named("workers:1")])
    names = {(each.cpus, each.policy, each.remedy, each.seed) for each in found}
    assert len(found) == len(names) == 2 * 2 * 2 * 2
    assert len({each.key for each in found}) == len(found)
    assert all(each.spec.machine.cpus == each.cpus and each.spec.policy.name == each.policy for each in found)


def test_a_key_is_that_of_spec_and_seed_and_nothing_else() -> None:
    one, other = points()[0], points()[0]
    assert one.key == other.key
    assert replace(one, remedy="by another name").key == one.key
    assert replace(one, seed=9).key != one.key
    machine = replace(SPEC.machine, memory_bytes=SPEC.machine.memory_bytes + 1)
    assert spec_digest(replace(SPEC, machine=machine)) != spec_digest(SPEC)


def test_a_key_tells_one_tree_from_another(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "a.ko").write_bytes(b"x" * 100)
    spec = replace(SPEC, tree=TreeSource(tmp_path))
    assert spec_digest(spec) != spec_digest(SPEC)
    config = tmp_path / "modprobe.d"
    config.mkdir()
    (config / "a.conf").write_text("blacklist a\n")
    configured = replace(SPEC, tree=TreeSource(tmp_path, (config,)))
    before = spec_digest(configured)
    assert before != spec_digest(spec)


def test_points_that_are_the_same_boot_are_simulated_once() -> None:
    newer = remedy_named("newer-kernel")
    found = points(remedies=[newer], seeds=[1])
    told: list[str] = []
    executor = Here()
    asked = []
    submit = executor.submit

    def counting(*arguments: object) -> object:
        asked.append(arguments)
        return submit(*arguments)  # type: ignore[arg-type]

    executor.submit = counting  # type: ignore[method-assign, assignment]
    done = run_points(found, executor, at_once=1, on_finished=lambda each: told.append(each.policy))
    assert len(asked) == 2, "v6.3 and v6.4 are the same boot with the newer kernel"
    assert [each.policy for each in done] == ["v6.3", "v6.3", "v6.4", "v6.4"]
    assert sorted(told) == ["v6.3", "v6.3", "v6.4", "v6.4"]


def test_the_same_points_come_to_the_same() -> None:
    assert run_points(points(), Here(), at_once=1) == run_points(points(), Here(), at_once=1)


# --- journal ---


def test_finished_points_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "a.points"
    first, second = row(duplicates={"kvm": (1, 2, 300)}), row(seed=2)
    with Journal(path) as journal:
        journal.add("a", first)
        journal.add("b", second)
    with Journal(path) as journal:
        assert journal.finished == {"a": first, "b": second}


def test_a_sweep_that_finished_nothing_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.points"
    with Journal(path) as journal:
        assert (journal.kept, path.exists()) == (0, True)
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt), Journal(path) as journal:
        journal.add("a", row())
        assert journal.kept == 1
        raise KeyboardInterrupt
    assert path.exists()


@given(cut=st.integers(min_value=1))
def test_a_line_that_was_cut_off_is_as_if_it_never_was(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("journal") / "a.points"
    with Journal(path) as journal:
        journal.add("a", row())
        whole = path.stat().st_size
        journal.add("b", row(seed=2))
    os.truncate(path, whole + cut % (path.stat().st_size - whole))
    with Journal(path) as journal:
        assert list(journal.finished) == ["a"]
        assert path.stat().st_size == whole
        journal.add("c", row(seed=3))
    with Journal(path) as journal:
        assert list(journal.finished) == ["a", "c"]


def test_two_sweeps_do_not_write_to_one_file(tmp_path: Path) -> None:
    with Journal(tmp_path / "a"), pytest.raises(NotNow, match="another sweep"), Journal(tmp_path / "a"):
        pass


@pytest.mark.parametrize("line", ["nonsense", "{}", '{"key": "a", "point": {}}', '{"key": "a", "point": []}'])
def test_a_line_that_is_no_point_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a"
    with Journal(path) as journal:
        journal.add("a", row())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadRequest, match="line 2"), Journal(path):
        pass


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    real = os.write
    left = [40]

    def nearly_full(file: int, data: bytes) -> int:
        room = min(left[0], len(data))
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= room
        return real(file, data[:room])

    with Journal(path) as journal:
        journal.add("a", row())
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", nearly_full)
        with pytest.raises(ModpressureError, match="No space left on device; 1 finished"):
            journal.add("b", row(seed=2))
        monkeypatch.undo()
        assert path.read_bytes() == before


# --- summary ---


def test_a_spread_is_mean_least_and_greatest() -> None:
    assert Spread.of([3, 1, 2]) == (2, 1, 3)


@given(slope=st.integers(-1000, 1000), start=st.integers(-1000, 1000), cpus=st.sets(st.integers(1, 5000), min_size=3))
def test_a_straight_line_is_found(slope: int, start: int, cpus: set[int]) -> None:
    fit = Fit.of([(count, slope * count + start) for count in cpus])
    assert fit is not None
    assert fit.slope == pytest.approx(slope, abs=1e-6)
    assert fit.intercept == pytest.approx(start, abs=1e-3)
    assert fit.r_squared == pytest.approx(1)


def test_what_is_no_line_has_a_smaller_r_squared() -> None:
    fit = Fit.of([(1, 0), (2, 3), (3, 0), (4, 3)])
    assert fit is not None
    assert fit.r_squared == pytest.approx(0.2)
    assert Fit.of([(1, 1), (2, 2), (2, 2)]) is None


def test_a_summary_sorts_points_into_series() -> None:
    found = [row(8, 2, wasted_bytes=3 << 30), row(4), row(8, 1), row(4, policy="v6.3")]
    summary = Summary.of(found)
    early, late = Series("toy", "v6.4", "none"), Series("toy", "v6.3", "none")
    assert list(summary.points) == [early, late]
    assert summary.spreads(early, QUANTITIES["waste"]) == {4: (1, 1, 1), 8: (2, 1, 3)}
    assert [each.seed for each in summary.points[early][8]] == [1, 2]
    assert (summary.name(early), summary.name(late)) == ("v6.4", "v6.3")


# --- files ---


def test_a_csv_has_a_row_for_each_boot() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_bytes([row(), row(seed=2)]).decode())))
    assert [each["seed"] for each in rows] == ["1", "2"]
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["wasted_bytes"] == str(1 << 30)


def test_parquet_has_the_same_table() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    found = [row(), row(seed=2, wasted_bytes=1 << 45)]
    table = parquet.read_table(io.BytesIO(parquet_bytes(found)))
    assert table.to_pylist() == [each.row() for each in found]
    assert str(table.schema.field("wasted_bytes").type) == "int64"


def test_json_has_points_spreads_and_lines() -> None:
    found = document([row(cpus, seed, wasted_bytes=cpus << 30) for cpus in (2, 4, 8) for seed in (1, 2)])
    assert len(found["points"]) == 6
    (series,) = found["series"]
    assert (series["policy"], series["seeds"]) == ("v6.4", 2)
    waste = series["quantities"]["waste"]
    assert waste["by_cpus"][4] == {"mean": 4, "low": 4, "high": 4}
    assert waste["fit"]["slope"] == pytest.approx(1)
    json.dumps(found)


def test_a_picture_is_well_formed_labelled_and_always_the_same() -> None:
    pytest.importorskip("matplotlib")
    boots = [
        row(cpus, seed, policy, wasted_bytes=(cpus << 30) + (seed << 28))
        for cpus in (2, 4, 8)
        for seed in (1, 2, 3)
        for policy in ("v6.3", "v6.4")
    ]
    summary, quantity = Summary.of(boots), QUANTITIES["waste"]
    reference = Reference("as measured", ((2, 1.0, 2.0), (8, 7.0, 8.0)))
    made = against_cpus(summary, quantity, "Waste", "svg", [reference])
    assert made == against_cpus(summary, quantity, "Waste", "svg", [reference])
    texts = " ".join(ElementTree.fromstring(made).itertext())
    for text in ("Wasted virtual memory (GiB)", "CPUs", "3 seeds", "v6.3: 1 GiB per CPU", "R² 0.9", "as measured"):
        assert text in texts
    assert b"<dc:date>" not in made
    assert against_cpus(summary, quantity, "Waste", "png").startswith(b"\x89PNG")


def test_a_ranking_is_drawn_with_its_ranges() -> None:
    pytest.importorskip("matplotlib")
    from loader_svc.sweep.plots import ranking

    def saving(name: str, gib: int) -> Saving:
        spread = Spread.of([(gib - 1) << 30, (gib + 1) << 30])
        return Saving(name, "a sentence", spread, spread, spread, spread, spread)

    result = WhatIf([row(), row(seed=2)], [saving("good", 3), saving("bad", -3)], [])
    made = ranking(result, "bytes", "Remedies", "svg")
    assert made == ranking(result, "bytes", "Remedies", "svg")
    texts = " ".join(ElementTree.fromstring(made).itertext())
    for text in ("good", "bad", "Waste saved (GiB)", "2 pairs of boots"):
        assert text in texts


def test_series_differ_without_their_colours() -> None:
    pytest.importorskip("matplotlib")
    from loader_svc.sweep.plots import _STYLES

    assert len({marker for _, marker, _ in _STYLES}) == len({str(line) for *_, line in _STYLES}) == len(_STYLES)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(ModpressureError, match="No space left"):
            write_output(path, [row()], QUANTITIES["waste"], "")
    assert (path.read_text(), os.listdir(tmp_path)) == ("before", ["a.csv"])
    write_output(path, [row()], QUANTITIES["waste"], "")
    assert path.read_bytes() == csv_bytes([row()])


def test_an_output_is_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"a\.xls"):
        check_output(tmp_path / "a.xls")
    with pytest.raises(ModpressureError, match="no directory"):
        check_output(tmp_path / "none" / "a.csv")


def test_a_missing_library_is_said_with_its_remedy() -> None:
    with pytest.raises(ModpressureError, match=r"pyarrow.*pip install 'modpressure\[sweep\]'"), needed("pyarrow"):
        raise ImportError
