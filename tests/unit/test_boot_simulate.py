"""A boot, statement by statement, on small machines with small trees; and what must hold of any."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader_svc.boot import (
    BootCall,
    BootResult,
    BootSpec,
    Device,
    Machine,
    ModuleConfig,
    ModuleInit,
    TreeSource,
    Userland,
    simulate_boot,
)
from loader_svc.boot.machine_file import bundled_machines
from loader_svc.boot.sensitivity import Figures, Sensitivity, sensitivities
from loader_svc.boot.simulate import Boot
from loader_svc.boot.spread import Spread
from loader_svc.sweep.executors import Here
from loader_svc.virtual.conservation import imbalances
from loader_svc.virtual.costs import NO_COSTS
from modpressure.errors import BadRequest
from modpressure.kernel.identity import ANY
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import POLICIES, V6_3, V6_4, V6_5
from modpressure.kernel.system_memory import Amounts
from tests.unit.boot_trees import SmallTree

MS = 1_000_000
GIB = 1 << 30

COSTS = replace(NO_COSTS, rules_ns=MS, fork_ns=MS // 10, event_ns=1000, trigger_ns=1000, init_ns=MS)
"""Rules, forks and inits take time, in proportions that are easy to follow; nothing is left to chance."""


@pytest.fixture
def small(tmp_path: Path, make_module: Callable[..., Any]) -> SmallTree:
    return SmallTree(tmp_path / "6.1-test", make_module)


class Run:
    """A boot of a small machine, with its calls."""

    def __init__(self, tree: SmallTree, *devices: Device, **changes: Any) -> None:
        self.calls: list[BootCall] = []
        machine = {
            name: changes.pop(name)
            for name in ("cpus", "inits", "autoload", "subsystems", "memory_bytes", "host_cpus", "initramfs")
            if name in changes
        }
        if not (tree.root / "modules.dep").exists():
            tree.write()
        described = Machine("small", **{"cpus": 8, "memory_bytes": 64 * GIB, "devices": devices, **machine})
        self.spec = BootSpec(described, TreeSource(tree.root), **{"costs": COSTS, **changes})
        self.boot = Boot(self.spec, 1, lambda call: self.calls.append(BootCall.of(call)))
        self.result: BootResult = self.boot.run()
        assert imbalances(self.boot.kernel) == []

    def of(self, module: str) -> list[BootCall]:
        """The calls on one module, in order of their begin."""
        return sorted((call for call in self.calls if call.module == module), key=lambda call: call.begun_ns)

    @property
    def order(self) -> list[str]:
        """The modules in the order in which calls on them began."""
        return [call.module for call in sorted(self.calls, key=lambda call: call.begun_ns)]


def slow(module: str, ms: int = 1000) -> ModuleInit:
    """An init function that waits."""
    return ModuleInit(module, "", ms * MS, is_asleep=True)


# --- 1 to 4: where events come from ---


def test_devices_are_triggered_one_after_the_other_in_order_of_their_paths(small: SmallTree) -> None:
    for name in ("c", "a", "b"):
        small.add(name, aliases=[f"x:{name}"])
    devices = [Device(f"/devices/{at}", f"x:{name}") for at, name in ((3, "a"), (1, "b"), (2, "c"))]
    run = Run(small, *devices, subsystems=("/bus/x", "/module/y"), userland=Userland(udev_workers=1))
    assert run.order == ["b", "c", "a"]
    # Three devices, two subsystems, and three modules that became live.
    assert run.result.events >= 8


def test_a_root_file_system_has_its_disks_triggered_before_its_cpus(small: SmallTree) -> None:
    small.add("crypto", aliases=["cpu:*"])
    small.add("disk", aliases=["scsi:*"])
    devices = (Device("/devices/acpi/cpu", "cpu:1"), Device("/devices/pci/9/block/sda", "scsi:1"))
    one = {"subsystems": ("/bus/pci",), "userland": Userland(udev_workers=1)}
    assert Run(small, *devices, **one).order == ["crypto", "disk"]
    one["userland"] = Userland(udev_workers=1, trigger="root")
    assert Run(small, *devices, **one).order == ["disk", "crypto"]


def test_a_uevent_for_a_module_or_a_bound_device_loads_nothing(small: SmallTree) -> None:
    small.add("drv", aliases=["pci:1"])
    small.add("other", aliases=["module:*"])
    run = Run(small, Device("/devices/a", "pci:1"))
    assert run.order == ["drv"]
    # The device, its binding, the driver, the module.
    assert run.result.events == 4


# --- 5 to 10: queue and workers ---


def test_a_child_waits_for_its_parent_but_not_for_its_sibling(small: SmallTree) -> None:
    for name in ("parent", "child", "sibling"):
        small.add(name, aliases=[f"x:{name}"])
    run = Run(
        small,
        Device("/devices/p", "x:parent"),
        Device("/devices/p/c", "x:child"),
        Device("/devices/q", "x:sibling"),
        inits=(slow("parent"),),
    )
    assert run.of("child")[0].begun_ns >= run.of("parent")[0].ended_ns
    assert run.of("sibling")[0].ended_ns < run.of("parent")[0].ended_ns


@pytest.mark.parametrize("cpus", [2, 4, 8, 16])
def test_udev_forks_as_many_workers_as_it_may_and_no_more(small: SmallTree, cpus: int) -> None:
    for number in range(60):
        small.add(f"m{number}", aliases=[f"x:{number}"])
    devices = [Device(f"/devices/{number:02}", f"x:{number}") for number in range(60)]
    run = Run(small, *devices, cpus=cpus, inits=tuple(slow(f"m{number}") for number in range(60)))
    assert run.result.workers == 2 * cpus + 16
    assert len({call.worker for call in run.calls}) == 2 * cpus + 16
    in_flight = [sum(other.begun_ns <= call.begun_ns < other.ended_ns for other in run.calls) for call in run.calls]
    assert max(in_flight) == 2 * cpus + 16


def test_a_worker_that_waits_in_the_kernel_keeps_its_place(small: SmallTree) -> None:
    small.add("a", aliases=["x:a"])
    small.add("b", aliases=["x:b"])
    run = Run(
        small,
        Device("/devices/1", "x:a"),
        Device("/devices/2", "x:b"),
        inits=(slow("a"),),
        userland=Userland(udev_workers=1),
    )
    assert run.of("b")[0].begun_ns > run.of("a")[0].ended_ns
    assert run.result.workers == 1


def test_idle_workers_are_used_again_and_leave_when_nothing_came_for_three_seconds(small: SmallTree) -> None:
    small.add("first", aliases=["pci:1"])
    small.add("then", aliases=["y:1"])
    small.add("other")
    devices = (Device("/devices/a", "pci:1"), Device("/devices/a/b", "y:1", is_born=True))
    quick = Run(small, *devices, userland=Userland(udev_workers=1))
    assert {call.worker for call in quick.calls} == {"udev-1"}
    # While the init of the first one sleeps its event is in the list, so that nobody leaves.
    assert Run(small, *devices, inits=(slow("first", 9000),), userland=Userland(udev_workers=1)).result.workers == 1

    def late(ms: int) -> int:
        """Return how many workers there are where a module that the kernel asks for brings a device after some time."""
        return Run(
            small,
            Device("/devices/a", "pci:1"),
            Device("/devices/virtual/late", "y:1", is_born=True, born_of="other"),
            autoload=(("first", ("other",)),),
            inits=(slow("other", ms),),
            userland=Userland(udev_workers=1),
        ).result.workers

    assert (late(2900), late(3100)) == (1, 2)


def test_children_that_were_held_up_by_their_parent_get_their_workers_at_once(small: SmallTree) -> None:
    """Not one more than that is forked where the parent is done before any of them has come."""
    small.add("nobody_wants", aliases=["x:"])
    devices = [Device("/devices/bus"), *(Device(f"/devices/bus/{number:02}") for number in range(12))]
    costs = replace(COSTS, rules_ns=MS // 10, trigger_ns=MS // 5)
    assert Run(small, *devices, cpus=2, costs=costs).result.workers < 5
    slow_rules = replace(costs, device_rules_ns=5 * MS)
    assert Run(small, *devices, cpus=2, costs=slow_rules).result.workers == 12


def test_a_worker_starts_before_its_first_event_only(small: SmallTree) -> None:
    for name in ("a", "b"):
        small.add(name, aliases=[f"x:{name}"])
    devices = [Device(f"/devices/{name}", f"x:{name}") for name in ("a", "b")]
    one = Userland(udev_workers=1)
    before, after = (
        Run(small, *devices, costs=replace(COSTS, worker_ns=ns), userland=one).result.duration_ns
        for ns in (0, 500 * MS)
    )
    assert after - before == pytest.approx(500 * MS, rel=0.01)


def test_a_pass_over_the_rules_takes_longer_for_a_device_than_for_a_driver(small: SmallTree) -> None:
    small.add("nobody_wants", aliases=["x:"])

    def passes(costs: Any) -> int:
        return Run(small, Device("/devices/a"), subsystems=("/bus/x",), costs=costs).result.duration_ns

    assert passes(replace(COSTS, device_rules_ns=50 * MS)) - passes(COSTS) == pytest.approx(50 * MS, rel=0.01)


@pytest.mark.parametrize("cpus", [2, 8])
def test_a_guest_flushes_three_times_for_each_call_that_is_made_a_direct_one(
    small: SmallTree, make_section: Callable[..., Any], cpus: int
) -> None:
    for name in ("plain", "patched"):
        small.add(name, aliases=[f"x:{name}"])
    small.sections["patched"] = (make_section(".static_call_sites", bytes(8 * 100), 3),)
    costs = replace(COSTS, flush_ns=70_000, flush_ns_per_cpu=10_000)

    def duration_ns(name: str) -> int:
        device = Device("/devices/a", f"x:{name}")
        return Run(small, device, cpus=cpus, host_cpus=cpus, costs=costs).of(name)[0].ended_ns

    flush_ns = 70_000 + cpus * 10_000
    # The section itself is data, an area that the other one does not have, to be protected and unmapped.
    assert duration_ns("patched") - duration_ns("plain") == pytest.approx(300 * flush_ns, abs=9 * flush_ns)


def test_linking_a_module_may_have_a_cost_of_its_own(small: SmallTree) -> None:
    for name in ("a", "b"):
        small.add(name, aliases=[f"x:{name}"])
    costs = replace(COSTS, link_ns=7 * MS, link={"b": 90 * MS})
    run = Run(small, *(Device(f"/devices/{name}", f"x:{name}") for name in ("a", "b")), costs=costs)
    took_ns = {name: run.of(name)[0].ended_ns - run.of(name)[0].begun_ns for name in ("a", "b")}
    assert took_ns["b"] - took_ns["a"] == 83 * MS


# --- 11 to 15: what libkmod does for one MODALIAS ---


def test_repeats_in_the_alias_list_cost_no_call(small: SmallTree) -> None:
    small.add("a", aliases=["x:*1*", "x:*2*", "x:*3*"])
    assert Run(small, Device("/devices/a", "x:1,2,3")).order == ["a"]


def test_dependencies_come_first_and_live_modules_are_passed_over(small: SmallTree) -> None:
    small.add("low")
    small.add("one", "low", aliases=["x:*"])
    small.add("two", "low", aliases=["x:*"])
    run = Run(small, Device("/devices/a", "x:1"))
    assert run.order == ["low", "one", "two"]
    assert run.result.duplicates == 0


def test_a_module_that_is_coming_does_not_count_as_loaded(small: SmallTree) -> None:
    small.add("m", aliases=["x:*"])
    devices = [Device(f"/devices/{number}", f"x:{number}") for number in range(4)]
    run = Run(small, *devices, inits=(slow("m"),))
    # All look while the first one's init runs, and all are told EEXIST when it is live.
    assert [(call.errno, call.outcome) for call in run.of("m")] == [("", Outcome.LIVE)] + 3 * [
        ("EEXIST", Outcome.BECOMING)
    ]
    assert run.result.duplicates_waited == 3
    late = Run(small, *devices, userland=Userland(udev_workers=1))
    # One after the other, the first has it live before the second looks.
    assert late.order == ["m"]


def test_a_failing_dependency_ends_its_entry_and_the_next_one_is_tried(small: SmallTree) -> None:
    small.add("bad")
    small.add("never", "bad", aliases=["x:*"])
    small.add("next", aliases=["x:*"])
    run = Run(small, Device("/devices/a", "x:1"), inits=(ModuleInit("bad", "ENODEV"),))
    assert run.order == ["bad", "next"]
    assert run.result.init_failures == {"bad": 1}
    assert run.result.counters.failed_becoming == run.result.counters.failed_load_modules == 0


def test_a_failing_soft_dependency_ends_nothing(small: SmallTree) -> None:
    small.add("soft")
    small.add("m", aliases=["x:*"])
    small.softdeps = ["m pre: soft"]
    run = Run(small, Device("/devices/a", "x:1"), inits=(ModuleInit("soft", "ENODEV"),))
    assert run.order == ["soft", "m"]
    assert run.result.loaded == ("m",)


def test_a_module_without_a_file_ends_its_entry(small: SmallTree) -> None:
    small.add("gone", aliases=["x:*"])
    small.add("next", aliases=["x:*"])
    small.write()
    (small.root / "gone.ko").unlink()
    assert Run(small, Device("/devices/a", "x:1")).order == ["next"]


@pytest.mark.parametrize(
    ("kmod", "packing", "decompressors", "syscall", "flags"),
    [
        (30, "", ("zstd",), Syscall.FINIT_MODULE, 0),
        (34, "", ("zstd",), Syscall.FINIT_MODULE, 0),
        (30, "zst", ("zstd",), Syscall.INIT_MODULE, 0),
        (34, "zst", ("zstd",), Syscall.FINIT_MODULE, 4),
        (34, "xz", ("zstd",), Syscall.INIT_MODULE, 0),
        (34, "xz", ("xz",), Syscall.FINIT_MODULE, 4),
        (34, "gz", ("gzip",), Syscall.FINIT_MODULE, 4),
        (34, "gz", (), Syscall.INIT_MODULE, 0),
    ],
)
def test_how_a_file_is_handed_over(
    small: SmallTree, kmod: int, packing: str, decompressors: tuple[str, ...], syscall: Syscall, flags: int
) -> None:
    pack = {"": bytes, "gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}[packing]
    small.add("m", aliases=["x:*"])
    small.write({"m": (f".{packing}" if packing else "", pack)})
    devices = [Device(f"/devices/{number}", f"x:{number}") for number in range(2)]
    run = Run(
        small,
        *devices,
        inits=(slow("m"),),
        userland=Userland(kmod=kmod),
        identity=replace(ANY, decompressors=decompressors),
    )
    first, second = run.of("m")
    assert {(call.syscall, call.flags) for call in run.calls} == {(syscall, flags)}
    file_bytes = next(small.root.glob("m.ko*")).stat().st_size
    plain_bytes = len(small.make_module("m").bytes())
    assert (first.errno, second.errno) == ("", "EEXIST")
    assert second.image_bytes == plain_bytes
    assert second.compressed_bytes == (file_bytes if flags else 0)
    assert run.result.counters.invalid_becoming_bytes == plain_bytes + (file_bytes if flags else 0)
    assert (run.result.finit_calls, run.result.init_calls) == ((2, 0) if syscall is Syscall.FINIT_MODULE else (0, 2))


@pytest.mark.parametrize("in_tree", ["", "zst"])
@pytest.mark.parametrize("told", ["", "gz", "xz", "zst"])
def test_files_may_be_taken_as_packed_otherwise(small: SmallTree, in_tree: str, told: str) -> None:
    small.add("m", aliases=["x:*"])
    small.write({"m": (".zst", zstandard.compress)} if in_tree else None)
    run = Run(
        small,
        *(Device(f"/devices/{number}", "x:1") for number in range(2)),
        inits=(slow("m"),),
        userland=Userland(kmod=34),
        modules=ModuleConfig(compression=told),
    )
    content = small.make_module("m").bytes()
    packed = {"": b"", "gz": gzip.compress(content), "xz": lzma.compress(content, check=lzma.CHECK_CRC32)}
    packed["zst"] = zstandard.ZstdCompressor(3).compress(content)
    if told != in_tree:
        assert run.of("m")[1].compressed_bytes == len(packed[told])
    assert run.of("m")[1].image_bytes == len(content)
    assert run.of("m")[1].flags == (4 if told else 0)


def test_longer_files_have_the_same_layout(small: SmallTree) -> None:
    small.add("m", aliases=["x:*"])
    small.add("n", aliases=["x:*"])
    machine = Machine("long", 2, GIB, (Device("/devices/a", "x:1"),), file_factor=10.0, file_bytes=(("n", 123456),))
    small.write()
    calls: list[BootCall] = []
    spec = BootSpec(machine, TreeSource(small.root), costs=COSTS)
    simulate_boot(spec, 1, record=calls.append)
    plain: list[BootCall] = []
    simulate_boot(replace(spec, machine=replace(machine, file_factor=1.0, file_bytes=())), 1, record=plain.append)
    assert [call.mod_bytes for call in calls] == [call.mod_bytes for call in plain]
    assert [call.image_bytes for call in calls] == [10 * plain[0].image_bytes, 123456]


# --- 16 to 20: what a call meets in the kernel ---


@pytest.mark.parametrize("policy", [V6_3, V6_4, V6_5])
def test_every_cpu_asks_for_the_same_and_waits(small: SmallTree, policy: Any) -> None:
    small.add("m", aliases=["cpu:*"])
    run = Run(small, Device("/devices/system/cpu/cpu{cpu}", "cpu:x"), cpus=6, inits=(slow("m"),), policy=policy)
    outcomes = Counter(call.outcome for call in run.calls)
    duplicates = {V6_3: Outcome.LOAD, V6_4: Outcome.BECOMING, V6_5: Outcome.SHARED}[policy]
    assert outcomes == {Outcome.LIVE: 1, duplicates: 5}
    assert run.result.gate_joins == (5 if policy is V6_5 else 0)
    image_bytes = len(small.make_module("m").bytes())
    assert run.result.wasted_bytes == {V6_3: 2, V6_4: 1, V6_5: 0}[policy] * 5 * image_bytes
    assert run.result.peak_copy_bytes >= (1 if policy is V6_5 else 5) * image_bytes


def test_init_module_is_never_shared(small: SmallTree) -> None:
    small.add("m", aliases=["cpu:*"])
    small.write({"m": (".zst", zstandard.compress)})
    run = Run(small, Device("/devices/system/cpu/cpu{cpu}", "cpu:x"), cpus=6, inits=(slow("m"),), policy=V6_5)
    assert (run.result.init_calls, run.result.gate_joins, run.result.duplicates) == (6, 0, 5)


def test_those_who_wait_for_a_failing_init_are_told_ebusy_and_a_later_one_starts_afresh(small: SmallTree) -> None:
    small.add("m", aliases=["cpu:*"])
    small.add("late", aliases=["pci:*"])
    run = Run(
        small,
        Device("/devices/system/cpu/cpu{cpu}", "cpu:x"),
        Device("/devices/z", "pci:z"),
        Device("/devices/z/y", "cpu:y", is_born=True),
        cpus=4,
        inits=(ModuleInit("m", "ENODEV", 100 * MS), slow("late", 500)),
    )
    assert [call.errno for call in run.of("m")] == ["ENODEV", "EBUSY", "EBUSY", "EBUSY", "ENODEV"]
    assert run.result.init_failures == {"m": 2}
    assert run.result.counters.failed_becoming == 3


def test_what_the_kernel_asks_for_itself_runs_beside_udev(small: SmallTree) -> None:
    small.add("snd", aliases=["pci:1"])
    small.add("codec", aliases=["snd-hda-codec"])
    run = Run(
        small,
        Device("/devices/a", "pci:1"),
        autoload=(("snd", ("snd-hda-codec", "nothing")),),
        userland=Userland(udev_workers=1),
    )
    assert run.result.loaded == ("snd", "codec")
    assert run.of("codec")[0].worker == "modprobe"
    assert run.result.autoloads == 2


def test_the_kernel_runs_fifty_modprobes_at_once_and_no_more(small: SmallTree) -> None:
    small.add("many", aliases=["pci:1"])
    names = tuple(f"m{number:02}" for number in range(60))
    for name in names:
        small.add(name)
    inits = tuple(slow(name, 100) for name in names)
    asked = (("many", names),)
    run = Run(small, Device("/devices/a", "pci:1"), autoload=asked, inits=inits)
    calls = [call for call in run.calls if call.worker == "modprobe"]
    assert max(sum(o.begun_ns <= c.begun_ns < o.ended_ns for o in calls) for c in calls) == 50
    assert (run.result.autoloads, run.result.autoloads_failed, len(calls)) == (60, 0, 60)
    slower = Run(small, Device("/devices/a", "pci:1"), autoload=asked, inits=tuple(slow(name, 6000) for name in names))
    # No place was free for five seconds.
    assert (slower.result.autoloads, slower.result.autoloads_failed, slower.result.counters.modcount) == (60, 10, 51)


def test_the_kernel_s_requests_of_equal_names_may_be_merged(small: SmallTree) -> None:
    small.add("a", aliases=["pci:1"])
    small.add("wanted")
    asked = (("a", ("wanted", "wanted", "wanted")),)
    inits = (slow("wanted", 100),)
    apart = Run(small, Device("/devices/a", "pci:1"), autoload=asked, inits=inits)
    merged = Run(small, Device("/devices/a", "pci:1"), autoload=asked, inits=inits, merges_requests=True)
    assert (apart.result.duplicates, merged.result.duplicates) == (2, 0)


# --- memory that does not suffice ---


def test_a_boot_fails_where_memory_does_not_suffice(small: SmallTree) -> None:
    small.add("m", aliases=["cpu:*"])
    small.add("last", "m", aliases=["pci:*"])
    small.write()
    image_bytes = len(small.make_module("m").bytes())
    page_bytes = -(-image_bytes // 4096) * 4096
    devices = (Device("/devices/system/cpu/cpu{cpu}", "cpu:x"), Device("/devices/z", "pci:1"))
    free = Run(small, *devices, cpus=8, inits=(slow("m"),), policy=V6_3)
    assert (free.result.shortages, free.result.first_shortage, free.result.lost) == (0, None, ())
    needed_bytes = free.result.peak_held_bytes
    enough = Run(small, *devices, cpus=8, inits=(slow("m"),), policy=V6_3, limits=Amounts(needed_bytes))
    assert enough.result.shortages == 0
    tight = Run(small, *devices, cpus=8, inits=(slow("m"),), policy=V6_3, limits=Amounts(needed_bytes - page_bytes))
    assert tight.result.shortages > 0
    # The ninth call on the module, which is there in the end; but what needs it is never tried.
    assert tight.result.lost == ("last",)
    assert tight.result.loaded == ("m",)
    none = Run(small, *devices, cpus=8, policy=V6_3, limits=Amounts(module_area_bytes=4096))
    assert none.result.first_shortage is not None
    assert none.result.first_shortage.module == "m"
    assert none.result.first_shortage.area == "module area"
    assert none.result.lost == ("m", "last")
    assert none.result.counters.modcount == 0


def test_a_shortage_is_told_at_a_time_within_the_boot(small: SmallTree) -> None:
    """Between the initramfs and the root file system udevd ends, which takes seconds: they are in neither time."""
    small.add("first", aliases=["pci:*"])
    small.add("m", aliases=["cpu:*"])
    devices = (Device("/devices/system/cpu/cpu{cpu}", "cpu:x"), Device("/devices/z", "pci:1"))
    free = Run(small, *devices, cpus=8, initramfs=("first",))
    assert set(free.result.loaded) == {"first", "m"}
    for pages in range(4, 64):  # room for the first one, but not for both
        tight = Run(small, *devices, cpus=8, initramfs=("first",), limits=Amounts(module_area_bytes=pages * 4096))
        if tight.result.loaded:
            break
    assert tight.result.loaded == ("first",)
    shortage = tight.result.first_shortage
    assert shortage is not None
    assert shortage.module == "m"
    assert 0 < shortage.at_ns <= tight.result.duration_ns


# --- devices born later ---


def test_a_device_is_born_when_the_init_above_it_returns_and_its_own_children_after_that(small: SmallTree) -> None:
    small.add("virtio_pci", aliases=["pci:*"])
    small.add("virtio_scsi", aliases=["virtio:*"])
    small.add("sd_mod", aliases=["scsi:*"])
    small.add("sg")
    pci = "/devices/pci0"
    run = Run(
        small,
        Device(pci, "pci:1"),
        Device(f"{pci}/virtio0", "virtio:8", is_born=True),
        Device(f"{pci}/virtio0/host0", is_born=True),
        Device(f"{pci}/virtio0/host0/0:0:0:0", "scsi:t-0x00", is_born=True),
    )
    assert run.result.loaded == ("virtio_pci", "virtio_scsi", "sd_mod", "sg")
    for above, below in (("virtio_pci", "virtio_scsi"), ("virtio_scsi", "sd_mod")):
        assert run.of(below)[0].begun_ns > run.of(above)[0].ended_ns - COSTS.rules_ns
    assert run.boot._births.unborn == []


def test_a_device_that_appears_under_a_live_driver_has_its_children_at_once(small: SmallTree) -> None:
    small.add("hub", aliases=["pci:*"])
    small.add("hid", aliases=["usb:*"])
    run = Run(
        small,
        Device("/devices/a", "pci:1"),
        Device("/devices/b", "usb:0"),
        Device("/devices/a/u", "usb:1", is_born=True),
        Device("/devices/a/u/input", "input:1", is_born=True),
        inits=(slow("hub"),),
    )
    assert run.boot._births.unborn == []
    assert run.order == ["hub", "hid"] or run.order == ["hid", "hub"]


def test_with_an_initramfs_all_is_triggered_twice_and_the_second_time_all_is_there(small: SmallTree) -> None:
    small.add("virtio_pci", aliases=["pci:*"])
    small.add("virtio_scsi", aliases=["virtio:*"])
    small.add("kvm", aliases=["cpu:*"])
    devices = (
        Device("/devices/pci0", "pci:1"),
        Device("/devices/pci0/virtio0", "virtio:8", is_born=True),
        Device("/devices/system/cpu/cpu{cpu}", "cpu:a"),
    )
    costs = replace(COSTS, first_read_from_disk=True, read_disk_ns=MS)
    once = Run(small, *devices, cpus=4)
    twice = Run(small, *devices, cpus=4, initramfs=("virtio_pci",), costs=costs)
    # What is not in the initramfs is asked for in the second stage only, by what was born in the first one, too.
    assert Counter(twice.order) == {"virtio_pci": 1, "kvm": 4, "virtio_scsi": 1}
    assert once.of("kvm")[0].begun_ns < once.of("virtio_scsi")[0].begun_ns < 10**9
    assert (
        twice.of("virtio_pci")[0].ended_ns
        < 10**9
        < min(call.begun_ns for call in twice.calls if call.module != "virtio_pci")
    )
    assert twice.result.events > once.result.events
    # Only the root file system is on a disk; workers are those of one udevd, and nobody counts the time in between.
    took = {module: (call := twice.of(module)[0]).ended_ns - call.begun_ns for module in ("virtio_pci", "virtio_scsi")}
    assert took["virtio_scsi"] == took["virtio_pci"] + MS
    assert twice.result.workers <= 4 * 2 + 16
    assert once.result.duration_ns < twice.result.duration_ns < 2 * once.result.duration_ns + 10 * MS


def test_a_device_may_name_who_brings_it_to_life_and_who_takes_it_away(small: SmallTree) -> None:
    small.add("maker", aliases=["pnp:*"])
    small.add("drv", aliases=["platform:thing"])
    devices = (
        Device("/devices/pnp", "pnp:1"),
        Device("/devices/platform/thing", "platform:thing", is_born=True, born_of="maker"),
        Device("/devices/platform/vga", "", dies_with="drv"),
    )
    run = Run(small, *devices)
    assert run.order == ["maker", "drv"]
    before = Run(small, *devices[:2])
    # One event to find it there, and one to see it go.
    assert run.result.events == before.result.events + 2


def test_an_init_sleeps_or_keeps_its_cpu(small: SmallTree) -> None:
    for name in ("a", "b"):
        small.add(name, aliases=[f"x:{name}"])
    devices = [Device(f"/devices/{name}", f"x:{name}") for name in ("a", "b")]
    asleep = Run(small, *devices, cpus=1, inits=(slow("a", 100), slow("b", 100)))
    busy = Run(small, *devices, cpus=1, inits=(ModuleInit("a", "", 100 * MS), ModuleInit("b", "", 100 * MS)))
    assert asleep.result.duration_ns < 150 * MS < 200 * MS < busy.result.duration_ns


# --- what if ---


def _cpus_ask(small: SmallTree, **changes: Any) -> Run:
    small.add("low")
    small.add("a", "low", aliases=["cpu:*"])
    small.add("b", aliases=["cpu:*"])
    return Run(small, Device("/devices/system/cpu/cpu{cpu}", "cpu:x"), inits=(slow("a", 50),), **changes)


def test_one_request_for_each_modalias_leaves_no_duplicates(small: SmallTree) -> None:
    assert _cpus_ask(small).result.duplicates > 0
    run = Run(
        small,
        Device("/devices/system/cpu/cpu{cpu}", "cpu:x"),
        inits=(slow("a", 50),),
        userland=Userland(one_request_per_modalias=True),
    )
    assert run.order == ["low", "a", "b"]


def test_a_lock_in_libkmod_leaves_no_duplicates(small: SmallTree) -> None:
    run = _cpus_ask(small, userland=Userland(locks_modules=True))
    assert run.order == ["low", "a", "b"]


# --- how much hangs on the costs ---


def test_a_cost_that_decides_stands_first_and_one_that_does_not_changes_nothing(small: SmallTree) -> None:
    small.add("m", aliases=["cpu:*"])
    devices = (Device("/devices/system/cpu/cpu{cpu}", "cpu:x"),)
    costs = replace(NO_COSTS, fork_ns=MS, remove_ns=MS, init={"m": (4 * MS, 4 * MS)}, source={"fork_ns": "a guess"})
    spec = Run(small, *devices, cpus=20, costs=costs, userland=Userland(udev_workers=30)).spec
    base, found = sensitivities(spec, range(2), Here())
    by_name = {each.cost: each for each in found}
    of_the_host = {"host_latency_ns", "host_slice_ns", "host_tick_ns"}
    assert set(by_name) == {"fork_ns", "remove_ns", "init", "slice_ns", *of_the_host}
    # As many workers come as are forked while the init runs.
    assert by_name["fork_ns"].doubled.duplicates.mean < base.duplicates.mean < by_name["fork_ns"].halved.duplicates.mean
    assert by_name["init"].halved.duplicates.mean < base.duplicates.mean < by_name["init"].doubled.duplicates.mean
    assert by_name["remove_ns"].effect(base, 2) == 0
    assert by_name["fork_ns"].source == "a guess"
    assert {found[0].cost, found[1].cost} == {"fork_ns", "init"}


def test_what_chance_may_do_is_no_effect() -> None:
    def figures(*values: float) -> Figures:
        spread = Spread.of(values)
        return Figures(spread, spread, spread)

    base = figures(90, 100, 110)
    # The error of the difference between two such means is 8.2.
    assert not figures(110, 120, 130).is_beyond_chance(base, "duplicates", 3)
    assert figures(115, 125, 135).is_beyond_chance(base, "duplicates", 3)
    assert figures(115, 125, 135).change(base, "duplicates") == pytest.approx(0.25)
    assert Sensitivity("a", "", figures(110, 120, 130), base).effect(base, 3) == 0
    assert Sensitivity("a", "", base, figures(115, 125, 135)).effect(base, 3) == pytest.approx(0.25)


# --- bad input ---


def test_a_tree_without_modules_for_the_machine_is_refused(small: SmallTree) -> None:
    small.add("a", aliases=["pci:*"])
    with pytest.raises(BadRequest, match="has no module for any device of the machine 'small'"):
        Run(small, Device("/devices/a", "usb:1"))


# --- what must hold of any boot ---


def _digest(result: BootResult, calls: list[BootCall]) -> str:
    text = json.dumps([asdict(result), [asdict(call) for call in calls]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _boot(spec: BootSpec, seed: int) -> str:
    calls: list[BootCall] = []
    return _digest(simulate_boot(spec, seed, record=calls.append), calls)


def test_the_same_seed_gives_the_same_boot_and_another_one_another() -> None:
    spec = BootSpec(bundled_machines()["virtio-8"])
    first = _boot(spec, 7)
    assert _boot(pickle.loads(pickle.dumps(spec)), 7) == first
    assert _boot(spec, 8) != first


def test_the_same_seed_gives_the_same_boot_in_any_process() -> None:
    program = (
        "from tests.unit.test_boot_simulate import _boot\n"
        "from loader_svc.boot import BootSpec\n"
        "from loader_svc.boot.machine_file import bundled_machines\n"
        "print(_boot(BootSpec(bundled_machines()['virtio-8']), 3))\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(printed) == 1


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("machine", ["virtio-8", "nvme-255", "server-2s", "server-8s"])
def test_nothing_is_lost_in_a_boot_of_a_bundled_machine(machine: str, policy: str) -> None:
    described = bundled_machines()[machine]
    calls: list[BootCall] = []
    boot = Boot(BootSpec(described, policy=POLICIES[policy]), 1, lambda call: calls.append(BootCall.of(call)))
    result = boot.run()
    assert imbalances(boot.kernel) == []
    assert boot._births.unborn == []
    assert len(boot.udev.queue) == 0
    counters = result.counters
    assert len(calls) == result.finit_calls + result.init_calls == counters.calls
    assert len(result.loaded) == len(set(result.loaded)) == counters.modcount
    assert counters.modcount > 50
    assert counters.failed_becoming + counters.failed_load_modules == sum(
        failed.count for failed in result.failed_modules
    )
    if policy == "v6.5":
        assert result.gate_joins > 0
        assert counters.duplicates < described.cpus
    else:
        assert counters.duplicates > 20
    if policy == "v6.3":
        assert counters.failed_becoming == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cpus=st.integers(1, 12),
    host_cpus=st.one_of(st.none(), st.integers(1, 4)),
    workers=st.one_of(st.none(), st.integers(1, 9)),
    policy=st.sampled_from(list(POLICIES.values())),
    failing=st.sets(st.sampled_from(["low", "a", "b", "c", "soft"])),
    seed=st.integers(0, 1000),
    locks=st.booleans(),
    once=st.booleans(),
)
def test_whatever_fails_and_races_every_call_ends_and_all_memory_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    make_module: Callable[..., Any],
    cpus: int,
    host_cpus: int | None,
    workers: int | None,
    policy: Any,
    failing: set[str],
    seed: int,
    locks: bool,
    once: bool,
) -> None:
    tree = SmallTree(tmp_path_factory.getbasetemp() / "property-tree", make_module)
    tree.add("low")
    tree.add("soft", "low")
    tree.add("a", "low", aliases=["cpu:*", "x:*"])
    tree.add("b", "a", "low", aliases=["cpu:*"])
    tree.add("c", aliases=["pci:*"])
    tree.softdeps = ["b pre: soft"]
    if not tree.root.exists():
        tree.write()
    devices = (
        Device("/devices/system/cpu/cpu{cpu}", "cpu:1"),
        *(Device(f"/devices/{number}", "pci:1") for number in range(5)),
        *(Device(f"/devices/{number}/x", "x:1", is_born=True) for number in range(5)),
    )
    machine = Machine(
        "any",
        cpus,
        GIB,
        devices,
        inits=tuple(ModuleInit(name, "ENODEV") for name in sorted(failing)),
        host_cpus=host_cpus,
    )
    userland = Userland(udev_workers=workers, locks_modules=locks, one_request_per_modalias=once)
    costs = replace(COSTS, jitter=0.5, initstate_ns=1000, alias_ns=3000, list_lock_ns=200, wake_ns=100, link_ns=5000)
    boot = Boot(BootSpec(machine, TreeSource(tree.root), policy, userland, costs=costs), seed)
    result = boot.run()
    assert imbalances(boot.kernel) == []
    assert len(boot.udev.queue) == 0
    assert result.workers <= userland.workers(cpus, GIB) * (1 + result.duration_ns // (3 * 10**9))
    assert not failing & set(result.loaded)
    if locks:
        assert result.duplicates == 0


# --- the recorded boots, as far as no costs matter ---


def recorded_machine(shared_dir: Path, cpus: int) -> Machine:
    """The machine of the recorded boots."""
    boots = shared_dir / "data/golden/boots"
    before = boots / f"uevents/modalias-N{cpus}.txt"
    if not before.is_file():
        pytest.skip(f"no recorded devices at {before}")

    def pairs(path: Path) -> dict[str, str]:
        lines = path.read_text().splitlines()
        return dict(line.split(" ", 1) for line in lines)

    modaliases, after = pairs(before), pairs(boots / f"uevents/modalias-after-N{cpus}.txt")
    listed = (boots / f"uevents/trigger-devices-N{cpus}.txt").read_text().splitlines()
    makers = {"/devices/platform/i8042": "i8042", "/devices/platform/ipmi_bmc.0": "ipmi_si"}
    devices = [Device(path.removeprefix("/sys"), modaliases.get(path, "")) for path in listed]
    for path, modalias in after.items():
        if path not in modaliases:
            path = path.removeprefix("/sys")
            devices.append(Device(path, modalias, is_born=True, born_of=makers.get(path, "")))
    with gzip.open(boots / f"traces/trace-B-N{cpus}-r1.txt.gz", "rt") as trace:
        asked = re.findall(r"module_request (\S+) arg=", trace.read())
    return Machine(
        "recorded",
        cpus,
        64 * GIB,
        tuple(devices),
        tuple(
            path.removeprefix("/sys")
            for path in (boots / f"uevents/trigger-subsystems-N{cpus}.txt").read_text().splitlines()
        ),
        inits=(ModuleInit("edac_mce_amd", "ENODEV"), ModuleInit("powernow_k8", "ENODEV")),
        autoload=(("snd_hda_intel", tuple(asked)),),
    )


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_a_recorded_boot_loads_the_recorded_modules_on_the_recorded_workers(
    shared_dir: Path, boot_tree: Path, cpus: int
) -> None:
    machine = recorded_machine(shared_dir, cpus)
    boots = shared_dir / "data/golden/boots"
    with gzip.open(boots / f"calls/calls-B-N{cpus}-r1.csv.gz", "rt") as calls:
        rows = [line.split(",") for line in calls.read().splitlines()]
    columns = {name: at for at, name in enumerate(rows[0])}
    recorded = {row[columns["mod"]] for row in rows[1:] if row[columns["ret"]] == "0"}
    spec = BootSpec(machine, TreeSource(boot_tree, (boots / "env/modprobe.d",)))
    result = simulate_boot(spec, 1)
    assert set(result.loaded) == recorded
    assert result.workers == 2 * cpus + 16
    workers = {row[columns["pid"]] for row in rows[1:] if row[columns["comm"]] == "(udev-worker)"}
    assert result.workers >= len(workers)
    by_row = next(line.split(",") for line in (boots / "boots.csv").read_text().splitlines() if f"B-N{cpus}-r1" in line)
    header = (boots / "boots.csv").read_text().splitlines()[0].split(",")
    recorded_row = dict(zip(header, by_row, strict=False))
    assert result.counters.total_mod_size == int(recorded_row["total_mod_size"])
    assert result.counters.total_text_size == int(recorded_row["total_text_size"])
