"""Recorded boots: how they are read, what costs are taken from them, and how figures are held against each other."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from loader_svc.boot.simulate import Boot
from loader_svc.sweep.finished import Finished
from loader_svc.verify.boots.calibration import AREAS, _costs, _least
from loader_svc.verify.boots.calls import compare_calls
from loader_svc.verify.boots.comparison import bounds, compared, lines
from loader_svc.verify.boots.fit import Came, Long, Start, searched
from loader_svc.verify.boots.machine import recorded_machine, recorded_spec, slice_ns
from loader_svc.verify.boots.monitor import born_unnamed
from loader_svc.verify.boots.recorded import FIGURES, RecordedBoot, Recording, TraceEvent
from loader_svc.verify.boots.spans import Load, Spans, spans_of
from loader_svc.virtual.costs import NO_COSTS, Costs, default_costs
from modpressure.errors import BadRequest, ModpressureError, NotFound

ROW = {
    **{"variant": "B", "policy": "v6.4", "N": "4", "ram_mib": "4096", "compress": "none", "rep": "1"},
    **{"cpu_model": "max", "userland": "udev252-kmod30", "settle_seconds": "4.5", "note": "", "boot": "B-N4-r1"},
    **dict.fromkeys(FIGURES, "0"),
}


BUNDLED = default_costs()


def write(directory: Path, *rows: dict[str, str]) -> Path:
    """Write a table of boots, each row the standard one but for what it says."""
    directory.mkdir(exist_ok=True)
    with (directory / "boots.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows({**ROW, **row} for row in rows)
    return directory


@pytest.fixture(scope="module")
def recorded(shared_dir: Path) -> Recording:
    return Recording.open(shared_dir / "data" / "golden" / "boots")


# --- reading ---


def test_boots_are_repetitions_of_each_other_where_only_their_number_differs(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = [{"rep": "2", "boot": "B-N4-r2"}, {}, {"N": "16", "boot": "B-N16-r1"}]
    rows += [{"note": "loud", "boot": "B-N4-loud"}, {"cpu_model": "Skylake,+acpi", "boot": "S"}]
    recording = Recording.open(write(tmp_path, *rows))
    settings = recording.settings()
    assert [[boot.name for boot in boots] for boots in settings.values()] == [
        ["B-N4-r2", "B-N4-r1"],
        ["B-N16-r1"],
        ["S"],
    ]
    assert [setting.machine for setting in settings] == ["N4", "N16", "N4-Skylake"]
    assert next(iter(settings)).policy.name == "v6.4"


def test_only_boots_with_two_cpus_and_a_trace_are_calibrated_from(tmp_path: Path) -> None:
    rows = [{"N": str(cpus), "boot": f"B-N{cpus}", "note": note} for cpus, note in ((2, ""), (4, ""), (16, ""))]
    rows += [{"N": "2", "boot": "no-trace"}, {"N": "2", "boot": "loud", "note": "udevd --debug"}]
    recording = Recording.open(write(tmp_path, *rows))
    (tmp_path / "traces").mkdir()
    for name in ("B-N2", "B-N4", "B-N16", "loud"):
        (tmp_path / "traces" / f"trace-{name}.txt.gz").write_bytes(gzip.compress(b"# nothing\n"))
    assert [boot.name for boot in recording.calibrating] == ["B-N2"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"variant": "D"}, "boot 'B-N4-r1': variant 'D' is none of A, B, C"),
        ({"N": "many"}, "'many' is not a whole number"),
        ({"userland": "busybox"}, "userland 'busybox' is not like udev252-kmod30"),
        ({"settle_seconds": "long"}, "settle_seconds 'long' is not a number"),
        ({"wasted_bytes": ""}, "'' is not a whole number"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(tmp_path: Path, row: dict[str, str], said: str) -> None:
    with pytest.raises(BadRequest) as raised:
        Recording.open(write(tmp_path, row))
    assert said in raised.value.sentence


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"boots\.csv"):
        Recording.open(tmp_path)
    recording = Recording.open(write(tmp_path, {}))
    boot = recording.boots[0]
    (tmp_path / "traces").mkdir()

    def said(read: Callable[[], Any]) -> str:
        with pytest.raises(ModpressureError) as raised:
            read()
        return raised.value.sentence

    assert "trace-B-N4-r1.txt.gz" in said(lambda: list(recording.trace(boot)))
    recording.trace_path(boot).write_bytes(gzip.compress(b"1.5 0 x 7 FIN button\nhalf a li"))
    assert "line 2: 'half a li' is no event" in said(lambda: list(recording.trace(boot)))
    recording.trace_path(boot).write_bytes(gzip.compress(b"1.5 0 x 7 FIN button\n" * 99)[:40])
    assert "can't be read" in said(lambda: list(recording.trace(boot)))
    assert "modalias-N4.txt" in said(lambda: recording.lines("modalias", boot.setting))


# --- what a trace tells ---


def events(*lines: str) -> Iterable[TraceEvent]:
    for line in lines:
        ms, pid, kind, module, *details = line.split()
        command = "systemd-udevd" if kind == "fork" else "(udev-worker)"
        yield TraceEvent(int(float(ms) * 1e6), 0, command, int(pid), kind, module, " ".join(details))


def test_a_trace_is_taken_apart_into_loads() -> None:
    spans = spans_of(
        events(
            *("0 1 fork -", "1 2 fork -", "5 2 fork -"),
            *("10 3 FIN xfs", "12 3 READ xfs len=70", "13 3 ALLOC xfs total=4096", "14 3 FORMED xfs"),
            *("15 4 FIN xfs", "16 4 READ xfs len=70", "16.5 4 ALLOC xfs total=4096", "17 4 WAIT xfs why=load"),
            *("24 3 FREECOPY xfs len=70", "24 3 INIT xfs", "30 3 module_request fs-x", "40 3 INITRET xfs ret=0"),
            *("41 4 DUP xfs why=load", "44 4 FREECOPY xfs len=70 err=-17", "45 4 EXIT xfs ret=-17"),
            *("46 3 LIVE xfs total=4096", "47 3 EXIT xfs ret=0", "49 3 FIN kvm", "50 3 READ kvm len=9"),
        )
    )
    assert spans.forks_ns == [0, 1_000_000, 5_000_000]
    assert spans.calls_ns == [10_000_000, 15_000_000, 49_000_000]
    assert spans.between_ns == [2_000_000]
    assert spans.frees_ns == [("xfs", 3_000_000)]
    assert spans.asked == {"xfs": ["fs-x"]}
    (load,) = spans.loads
    assert (load.module, load.file_bytes, load.layout_bytes, load.errno) == ("xfs", 70, 4096, 0)
    steps = (
        load.begun_ns,
        load.read_ns,
        load.laid_out_ns,
        load.formed_ns,
        load.linked_ns,
        load.inited_ns,
        load.live_ns,
    )
    assert [ns // 1_000_000 for ns in steps] == [10, 12, 13, 14, 24, 40, 46]


def test_what_was_laid_out_and_linked_tells_what_each_part_of_it_takes() -> None:
    def load(number: int) -> Load:
        """Return one whose layout takes 13 us besides 2 ns for a byte, and its link 40 us besides 1 us a relocation."""
        begun_ns, size_bytes = 1000, 4096 * number
        read_ns = begun_ns + 100 + size_bytes
        laid_out_ns = read_ns + 13_000 + 2 * size_bytes
        linked_ns = laid_out_ns + 40_000 + 1000 * number * (1 if number % 4 else 9)  # some had to wait
        return Load(f"m{number}", begun_ns, read_ns, laid_out_ns, laid_out_ns, linked_ns, linked_ns, linked_ns + 5,
                    linked_ns + 9, size_bytes, size_bytes)  # fmt: skip

    loads = {f"m{number}": load(number) for number in range(1, 60)}
    trace = Spans(list(loads.values()), between_ns=[9], forks_ns=[0, 50, 53, 60, 90])
    costs = _costs([trace], {name: _least([each]) for name, each in loads.items()}, lambda name: int(name[1:]), BUNDLED)
    assert costs.copy_ns_per_byte == pytest.approx(2)
    assert costs.inspect_ns + AREAS * costs.allocate_ns == pytest.approx(13_000, abs=5)
    assert costs.inspect_ns / costs.allocate_ns == pytest.approx(BUNDLED.inspect_ns / BUNDLED.allocate_ns, rel=0.01)
    assert 39_000 < costs.link_ns < 48_000
    assert costs.relocation_ns == pytest.approx(1000, rel=0.2)
    assert costs.fork_ns == 3


def test_the_start_of_a_boot_is_told_by_its_forks_and_calls() -> None:
    start = Start.of([100, 110, 130, 430, 440], [900, 400, 500, 700, 600, 800, 1000, 1100, 1200])
    assert start == (15, 3, 300, 500)
    with pytest.raises(BadRequest, match="fewer than three forks"):
        Start.of([1, 2], [3])


@pytest.mark.parametrize("wanted", [Start(9e6, 12, 4e8, 8e8), Start(2e7, 16, 6e8, 1.5e9)])
def test_costs_are_found_with_which_boots_start_and_steps_take_as_recorded(wanted: Start) -> None:
    steps = {
        ("link", "kvm"): Long(300_000_000, 5e8),
        ("init", "kvm"): Long(8_000_000, 2e7),
        ("init", "xfs"): Long(9, 9),
    }

    def measured(costs: Costs) -> Came:
        # Each of them takes the longer the longer the others take.
        first_ns = costs.exec_ns + 20 * costs.rules_ns
        quarter_ns = first_ns + 60 * costs.device_rules_ns + 10 * costs.worker_ns
        start = Start(costs.worker_ns + costs.rules_ns / 4, 4 + costs.rules_ns / 3e5, first_ns, quarter_ns)
        return Came(start, {("link", "kvm"): 4.0 * costs.link["kvm"], ("init", "kvm"): 3.0 * costs.init["kvm"]})

    found = searched(measured, replace(NO_COSTS, init={"virtio": 7}), steps, wanted)
    assert list(measured(found).start) == pytest.approx(list(wanted), rel=0.1)
    assert found.source["rules_ns"] == found.source["exec_ns"] != ""
    assert found.link["kvm"] == pytest.approx(125_000_000, rel=0.1)
    assert found.init["kvm"] == pytest.approx(6_670_000, rel=0.1)
    assert found.init["virtio"] == 7


def test_no_step_is_taken_for_longer_than_it_was_seen_to_be() -> None:
    steps = {("link", "kvm"): Long(1000, 9000.0)}

    def measured(costs: Costs) -> Came:
        return Came(Start(1e7, 12, 4e8, 8e8), {("link", "kvm"): float(costs.link["kvm"])})

    assert searched(measured, NO_COSTS, steps, Start(1e7, 12, 4e8, 8e8)).link["kvm"] == 1000


def event(path: str, subsystem: str, *more: str) -> str:
    lines = ["ACTION=add", f"DEVPATH={path}", f"SUBSYSTEM={subsystem}", *more]
    return f"KERNEL[1.5] add      {path} ({subsystem})\n" + "".join(f"{line}\n" for line in lines) + "\n"


def test_devices_without_a_modalias_are_born_of_the_module_above_them_or_next_to_be_live() -> None:
    pci, misc = "/devices/pci0000:00/0000:00:02.0/block/vda", "/devices/virtual/misc/kvm"
    text = "".join(
        [
            event("/devices/known", "pci"),
            event(pci, "block", "MAJOR=254", "MINOR=0", "DEVNAME=/dev/vda"),
            event("/bus/virtio/drivers/virtio_blk", "drivers"),
            event("/module/virtio_blk", "module"),
            event(misc, "misc", "MAJOR=10", "MINOR=232", "DEVNAME=/dev/kvm"),
            event("/class/kvm", "class"),
            event("/module/kvm_amd", "module"),
            event("/class/late", "class"),
        ]
    )
    found = list(
        born_unnamed(
            text.replace("KERNEL[1.5] add      /class/late", "UDEV  [1.5] add /class/late"), {"/devices/known"}
        )
    )
    assert [(each.path, each.device_id, each.node, each.born_of) for each in found] == [
        (pci, "b254:0", "vda", ""),
        (misc, "c10:232", "kvm", "kvm_amd"),
        ("/class/kvm", "+class:kvm", "", "kvm_amd"),
    ]
    assert all(each.is_born and not each.modalias for each in found)


# --- holding figures against each other ---


@pytest.mark.parametrize(
    ("recorded", "calls", "expected"),
    [
        ([100, 100, 100], True, (80, 120)),
        ([10, 20, 30], True, (10, 30)),  # 12 to 28, and what was recorded itself is wider
        ([5, 5, 6], True, (0, 13.33)),  # eight calls are more than a fifth
        ([5, 5, 6], False, (4.27, 6.4)),
    ],
)
def test_the_widest_bound_counts(recorded: list[int], calls: bool, expected: tuple[float, float]) -> None:
    assert bounds(recorded, calls=calls) == pytest.approx(expected, abs=0.01)


def boot(cpus: int = 8, variant: str = "B", **figures: int) -> RecordedBoot:
    """Return a recorded boot that has nothing but what is told."""
    from loader_svc.verify.boots.recorded import _boot

    row = {**ROW, "N": str(cpus), "variant": variant, **{name: str(value) for name, value in figures.items()}}
    return _boot(row, {"B-N4-r1": {"kvm": 7, "xfs": 0}})


def simulated(**values: Any) -> Finished:
    kinds = {each.name: "" if each.type == "str" else 0 for each in fields(Finished) if each.name != "duplicates"}
    return Finished(**{**kinds, **values})  # type: ignore[arg-type]


def differing(recorded: RecordedBoot, **values: Any) -> list[str]:
    table = compared(recorded.setting, [recorded], [simulated(**values)])
    return [row.what for row in table.rows if not row.agrees]


def test_each_figure_is_held_against_its_own_bound() -> None:
    figures = {"failed_becoming": 100, "failed_load_modules": 10, "wasted_bytes": 1000, "peak_copy_bytes": 1000}
    exact = {"workers": 32, "total_mod_size": 77, "total_text_size": 66}
    recorded = boot(**figures, **exact, modcount=110)
    right = {"becoming": 100, "load": 10, "wasted_bytes": 1000, "peak_copy_bytes": 1000, **exact, "modules": 110}
    assert differing(recorded, **right) == []
    assert differing(recorded, **{**right, "becoming": 79}) == []
    assert differing(recorded, **{**right, "becoming": 77}) == ["duplicates"]
    assert differing(recorded, **{**right, "load": 19, "becoming": 91}) == ["duplicates at load"]
    assert differing(recorded, **{**right, "wasted_bytes": 1201}) == ["wasted bytes"]
    assert differing(recorded, **{**right, "peak_copy_bytes": 949}) == ["peak of file copies"]
    for name, what in zip(
        (*exact, "modules"), ("workers", "total module size", "total text size", "modules loaded"), strict=True
    ):
        assert differing(recorded, **{**right, name: right[name] + 1}) == [what]


def test_workers_are_exact_where_udev_has_all_that_it_may_and_a_race_where_it_has_fewer() -> None:
    everything = boot(cpus=32, workers=32)
    assert everything.setting.memory_bytes == 4 << 30, "so memory limits them to 32"
    assert differing(everything, workers=31) == ["workers"]
    fewer = boot(cpus=8, workers=30)
    assert differing(fewer, workers=25) == []
    assert differing(fewer, workers=23) == ["workers"]


def test_calls_that_share_a_result_may_leave_two_duplicates_but_not_those_of_init_module() -> None:
    assert differing(boot(variant="A"), becoming=2) == []
    assert differing(boot(variant="A"), becoming=3) == ["duplicates"]
    unshared = boot(variant="A", init_calls=281, failed_becoming=160)
    assert differing(unshared, becoming=2) == ["duplicates"]
    assert differing(unshared, becoming=160) == []


def test_modules_are_shown_that_were_duplicates_in_either() -> None:
    recorded = boot()
    table = compared(recorded.setting, [recorded], [simulated(duplicates={"drm": (1, 2, 9)})])
    assert [row[:3] for row in table.modules] == [("kvm", "7", "0"), ("drm", "0", "3")]


def test_lines_are_held_against_each_other_where_there_are_three_numbers_of_cpus() -> None:
    def tables(slope: int, counts: tuple[int, ...] = (2, 4, 8)) -> list[tuple[str, bool]]:
        boots = [boot(cpus, failed_becoming=20 * cpus) for cpus in counts]
        both = {each.setting: ([each], [simulated(becoming=slope * each.setting.cpus + 5)]) for each in boots}
        return [(table.title, table.agrees) for table in lines(both)]

    title = "line through 2, 4, 8 CPUs, v6.4, CPU max, plain, udev 252, kmod 30"
    assert tables(20) == tables(17) == [(title, True)]
    assert tables(15) == [(title, False)]
    assert tables(20, (2, 8)) == []


# --- the recorded boots themselves ---


def test_the_recorded_machines_load_what_was_recorded(recorded: Recording, boot_tree: Path, shared_dir: Path) -> None:
    """On each machine, whatever things cost: the modules, workers and sizes are no race."""
    seen = {}
    for setting, boots in recorded.settings().items():
        if setting.machine in seen:
            continue
        failing = dict.fromkeys(recorded.failing()[boots[0].name], "ENODEV")
        asked = {"snd_hda_intel": ("hdaudio:v1AF40022r00100101a01", "snd-hda-codec-generic")}
        machine = replace(recorded_machine(recorded, setting, failing=failing, asked=asked), host_cpus=None)
        modprobe = shared_dir / "data/golden/boots/env/modprobe.d"
        result = Boot(recorded_spec(recorded, setting, machine, boot_tree, [modprobe], NO_COSTS), seed=1).run()
        figures = boots[0].figures
        seen[setting.machine] = (
            result.counters.modcount,
            result.workers,
            result.counters.total_mod_size,
            result.counters.total_text_size,
        )
        assert seen[setting.machine] == (
            figures["modcount"],
            figures["workers"],
            figures["total_mod_size"],
            figures["total_text_size"],
        ), setting
    assert len(seen) >= 7


@pytest.mark.parametrize(("cpus", "guest_ms"), [(2, 2), (4, 3), (8, 3), (16, 3), (48, 3)])
def test_slices_follow_from_the_number_of_cpus(cpus: int, guest_ms: float) -> None:
    assert slice_ns(cpus) == guest_ms * 1e6


def test_calls_agree_where_their_order_is_no_race_and_each_that_does_not_is_told(
    recorded: Recording, boot_tree: Path, shared_dir: Path, tmp_path: Path
) -> None:
    found = next(each for each in recorded.boots if each.name == "B-N2-r1")
    failing = dict.fromkeys(recorded.failing()[found.name], "ENODEV")
    asked = {"snd_hda_intel": ("hdaudio:v1AF40022r00100101a01", "snd-hda-codec-generic")}
    machine = recorded_machine(recorded, found.setting, failing=failing, asked=asked)
    modprobe = shared_dir / "data/golden/boots/env/modprobe.d"
    spec = recorded_spec(recorded, found.setting, machine, boot_tree, [modprobe], NO_COSTS)
    agreement = compare_calls(recorded, found, spec, seed=1)
    assert agreement.differences == []
    assert agreement.total == found.figures["finit_calls"] + 2

    (tmp_path / "calls").mkdir()
    wrong = replace(recorded, directory=tmp_path)
    with gzip.open(recorded.calls_path(found), "rt") as file:
        rows = list(csv.DictReader(file))
    worker = next(row["pid"] for row in rows if row["mod"] == "sha1_ssse3")
    chain = [row for row in rows if row["pid"] == worker and row["mod"] in ("sha1_ssse3", "kvm_amd")]
    assert [row["mod"] for row in chain] == ["sha1_ssse3", "kvm_amd"]
    chain[0]["mod"], chain[1]["mod"] = chain[1]["mod"], chain[0]["mod"]
    rows[0]["flags"] = "4"
    rows[1]["mod"] = "xfs"
    with gzip.open(wrong.calls_path(found), "wt", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    told = "\n".join(compare_calls(wrong, found, spec, seed=1).differences)
    assert "flags recorded 4, simulated 0" in told
    assert "xfs by " in told
    assert "not called for in the simulation" in told
    assert "sha1_ssse3 by " in told
    assert "called behind kvm_amd by the same worker" in told
    assert "modules called for: only recorded: xfs" in told
