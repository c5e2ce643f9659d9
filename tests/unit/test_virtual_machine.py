"""The virtual driver: waits, signals, dependencies, unloading, and what must hold after any sequence of calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader_svc.init_results import InitResults
from loader_svc.steps import CallSpec
from loader_svc.virtual.conservation import imbalances
from loader_svc.virtual.costs import KINDS, NO_COSTS, Costs, default_costs
from loader_svc.virtual.guest import GuestMachine
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.kernel.counters import Counters
from modpressure.kernel.identity import ANY, ExportedSymbol
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import V6_3, V6_4, V6_5, Policy
from modpressure.kernel.report import mainline
from modpressure.kernel.report_text import parse_mainline

Make = Callable[..., Any]
MS = 1_000_000
ALLOC = 2

KERNEL = replace(ANY, symbols={"module_layout": ExportedSymbol(None), "printk": ExportedSymbol(None)})
INIT = InitResults.parse(
    "module,condition,duration_ms,result\n"
    "slow,always,parameter ms (default 100),parameter ret (default 0)\n"
    "sick,always,0,-ENODEV\n"
    "shy,while slow is live (they do not get on),0,-EBUSY\n"
)


@dataclass
class Disk:
    """Module files of the tests' own making."""

    directory: Path
    make_module: Make
    make_section: Make
    paths: dict[str, Path] = field(default_factory=dict)

    def write(self, name: str, *, wants: str = "", exports: str = "") -> None:
        """Write a module that imports and exports a symbol each, if told."""
        extra = [self.make_section("__ksymtab", bytes(12), ALLOC)] if exports else []
        builder = self.make_module(name, *extra)
        builder.symbols = [("", 1, 0), ("init_module", 1, 1), ("cleanup_module", 1, 1)]
        if wants:
            builder.symbols.append((wants, 0, 1))
        if exports:
            builder.symbols.append((f"__ksymtab_{exports}", 4, 0))
        self.paths[name] = self.directory / f"{name}.ko"
        self.paths[name].write_bytes(builder.bytes())


@pytest.fixture
def disk(tmp_path: Path, make_module: Make, make_section: Make) -> Disk:
    disk = Disk(tmp_path, make_module, make_section)
    disk.write("slow", wants="printk")
    disk.write("sick")
    disk.write("shy")
    disk.write("base", exports="base_call")
    disk.write("user", wants="base_call")
    disk.write("rival", exports="base_call")
    disk.write("lost", wants="nowhere")
    disk.paths["junk"] = tmp_path / "junk.ko"
    disk.paths["junk"].write_bytes(b"no module" * 100)
    return disk


def outcome(call: VirtualCall) -> tuple[str, str]:
    assert call.ending is not None
    return call.ending.outcome.word, call.ending.errno


@dataclass
class Bench:
    """A machine, and short ways to make calls on it."""

    disk: Disk
    policy: Policy
    machine: VirtualMachine

    def make(self, name: str, parameters: str = "", *, copy: int = 0, restarts: bool = False) -> VirtualCall:
        path = self.disk.paths[name]
        spec = CallSpec(name, f"{path}:{copy}", self.policy, Syscall.FINIT_MODULE, 0, parameters)
        return VirtualCall(spec, VirtualFile(str(path), partial(os.open, path, os.O_RDONLY)), restarts=restarts)

    def load(self, name: str, parameters: str = "") -> str:
        ending = self.machine.call(self.make(name, parameters))
        return ending.errno if not ending.errno else f"{ending.errno} {ending.check}"

    def pair(self, parameters: str = "", *, copy: int = 1, signal_ms: int = 0, restarts: bool = False) -> list[Any]:
        """Have two loaders of the slow module, the second 10 ms later; return what each got, and when, in ms."""
        machine = self.machine
        calls = [self.make("slow", parameters), self.make("slow", parameters, copy=copy, restarts=restarts)]
        machine.begin(calls[0])
        machine.begin(calls[1], 10 * MS)
        if signal_ms:
            machine.interrupt(calls[1], signal_ms * MS)
        machine.run()
        assert imbalances(machine) == []
        return [
            (call.ending and call.ending.outcome.word, call.ending and call.ending.errno, call.ended_ns // MS)
            for call in calls
        ]


@pytest.fixture
def bench(disk: Disk) -> Callable[..., Bench]:
    def make(policy: Policy = V6_4) -> Bench:
        return Bench(disk, policy, VirtualMachine(KERNEL, init_results=INIT))

    return make


# --- waits ---


@pytest.mark.parametrize(
    ("policy", "copy", "stage"),
    [(V6_3, 0, "load"), (V6_4, 0, "becoming"), (V6_5, 1, "becoming")],
)
def test_the_second_waits_for_the_first_and_is_a_duplicate(bench: Make, policy: Policy, copy: int, stage: str) -> None:
    assert bench(policy).pair(copy=copy) == [("live", "", 100), (stage, "EEXIST", 100)]
    assert bench(policy).pair("ret=-5", copy=copy) == [("init", "EIO", 100), (stage, "EBUSY", 100)]


def test_calls_in_flight_on_one_file_share_the_result(bench: Make) -> None:
    assert bench(V6_5).pair(copy=0) == [("live", "", 100), ("shared", "", 100)]
    assert bench(V6_5).pair("ret=-19", copy=0) == [("init", "ENODEV", 100), ("shared", "ENODEV", 100)]


@pytest.mark.parametrize(("policy", "copy"), [(V6_3, 0), (V6_4, 0), (V6_5, 1)])
def test_a_signal_ends_a_wait_counted_but_not_listed(bench: Make, policy: Policy, copy: int) -> None:
    one = bench(policy)
    stage = "load" if policy is V6_3 else "becoming"
    assert one.pair(copy=copy, signal_ms=50) == [("live", "", 100), (stage, "EINTR", 50)]
    assert one.machine.failed_modules == []
    counters = one.machine.counters
    assert counters.failed_becoming + counters.failed_load_modules == 1


def test_a_call_that_begins_anew_counts_twice(bench: Make) -> None:
    one = bench(V6_4)
    assert one.pair(signal_ms=50, restarts=True) == [("live", "", 100), ("becoming", "EEXIST", 100)]
    assert one.machine.counters.failed_becoming == 2
    assert [failed.count for failed in one.machine.failed_modules] == [1]


def test_a_signal_in_the_gate_counts_nothing_and_never_begins_anew(bench: Make) -> None:
    one = bench(V6_5)
    assert one.pair(copy=0, signal_ms=50, restarts=True) == [("live", "", 100), ("refused", "EINTR", 50)]
    assert one.machine.counters.failed_becoming == 0


def test_a_signal_to_who_does_not_wait_changes_nothing(bench: Make) -> None:
    one = bench()
    call = one.machine.begin(one.make("slow"))
    one.machine.interrupt(call, 50 * MS)
    one.machine.run()
    assert call.ending is not None
    assert call.ending.outcome is Outcome.LIVE


def test_a_module_waits_for_one_that_it_needs_to_come_up(bench: Make, disk: Disk) -> None:
    disk.write("slow", exports="slow_call")
    disk.write("eager", wants="slow_call")
    one = bench()
    calls = [one.machine.begin(one.make("slow", "ms=500")), one.machine.begin(one.make("eager"), 100 * MS)]
    one.machine.run()
    assert [call.ending and call.ending.errno for call in calls] == ["", ""]
    assert calls[1].ended_ns == 500 * MS


@pytest.mark.parametrize(("ms", "ret", "expected"), [(40_000, 0, ("EBUSY", 30_100)), (500, -5, ("ENOENT", 500))])
def test_it_does_not_wait_for_ever_nor_for_one_that_fails(
    bench: Make, disk: Disk, ms: int, ret: int, expected: tuple[str, int]
) -> None:
    disk.write("slow", exports="slow_call")
    disk.write("eager", wants="slow_call")
    one = bench()
    one.machine.begin(one.make("slow", f"ms={ms} ret={ret}"))
    eager = one.machine.begin(one.make("eager"), 100 * MS)
    one.machine.run()
    assert eager.ending is not None
    assert (eager.ending.errno, eager.ended_ns // MS) == expected
    assert eager.ending.outcome is Outcome.LOAD


# --- single calls ---


def test_what_needs_another_module_loads_after_it_and_keeps_it_from_going(bench: Make) -> None:
    one = bench()
    assert one.load("user") == "ENOENT symbols: unknown"
    assert [one.load("base"), one.load("rival"), one.load("user")] == ["", "ENOEXEC exports: taken", ""]
    assert one.machine.remove("base") == "EWOULDBLOCK"
    assert [one.machine.remove("user"), one.machine.remove("base"), one.machine.remove("base")] == ["", "", "ENOENT"]
    assert one.load("user") == "ENOENT symbols: unknown"
    assert one.load("rival") == ""
    assert one.load("user") == ""


def test_an_init_function_may_depend_on_who_is_live(bench: Make) -> None:
    one = bench()
    assert [one.load("shy"), one.machine.remove("shy"), one.load("slow"), one.load("shy")] == ["", "", "", "EBUSY init"]
    assert one.load("sick") == "ENODEV init"
    assert one.machine.counters.failed_inits == 2


def test_a_module_without_exit_function_goes_by_force_only(bench: Make, disk: Disk) -> None:
    builder = disk.make_module("stays")
    disk.paths["stays"] = disk.directory / "stays.ko"
    disk.paths["stays"].write_bytes(builder.bytes())
    one = bench()
    assert one.load("stays") == ""
    assert one.machine.remove("stays") == "EBUSY"
    assert one.machine.remove("stays", forced=True) == ""


def test_peaks_are_of_file_and_layout_together(bench: Make, disk: Disk) -> None:
    one = bench()
    assert one.load("slow") == ""
    size_bytes = -(-disk.paths["slow"].stat().st_size // 4096) * 4096
    assert one.machine.areas.peak_bytes == size_bytes + one.machine.counters.total_mod_size
    assert one.machine.areas.held_bytes < one.machine.counters.total_mod_size


# --- what always holds ---

COSTLY = Costs(
    **{name: 1_000_003 for name, kind in KINDS.items() if kind in ("int", "Duration")},
    read_cached_ns_per_byte=1_000,
    first_read_from_disk=True,
    jitter=0.9,
)
"""Everything takes long, so that much is in between when a signal or a removal comes."""

NAMES = ["slow", "sick", "shy", "base", "user", "rival", "lost", "junk"]
ACTIONS = st.one_of(
    st.tuples(
        st.just("load"),
        st.sampled_from(NAMES),
        st.integers(0, 3),
        st.integers(0, 400),
        st.none() | st.integers(0, 400),
        st.booleans(),
    ),
    st.tuples(st.just("remove"), st.sampled_from(NAMES), st.integers(0, 400)),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(ACTIONS, max_size=14),
    policy=st.sampled_from([V6_3, V6_4, V6_5]),
    cpus=st.none() | st.integers(1, 3),
    host_cpus=st.none() | st.just(1),
    costs=st.sampled_from([NO_COSTS, COSTLY, default_costs()]),
)
def test_after_any_sequence_nothing_is_held_and_all_is_counted(
    disk: Disk, actions: list[tuple[Any, ...]], policy: Policy, cpus: int | None, host_cpus: int | None, costs: Costs
) -> None:
    machine = VirtualMachine(KERNEL, init_results=INIT, cpus=cpus, costs=costs)
    if cpus is not None and host_cpus is not None:
        machine = GuestMachine(identity=KERNEL, init_results=INIT, cpus=cpus, host_cpus=host_cpus, costs=costs)
    one = Bench(disk, policy, machine)
    ended: list[VirtualCall] = []
    begun = 0
    for action in actions:
        if action[0] == "load":
            _, name, copy, at_ms, signal_ms, restarts = action
            call = one.make(name, copy=copy, restarts=restarts)
            call.on_end = ended.append
            machine.begin(call, at_ms * MS)
            begun += 1
            if signal_ms is not None:
                machine.interrupt(call, signal_ms * MS)
        else:
            machine.clock.at(action[2] * MS, partial(machine.remove, action[1]))
    machine.run()

    assert len(ended) == begun, "every call ends"
    assert imbalances(machine) == []
    live = sum(call.ending is not None and call.ending.outcome is Outcome.LIVE for call in ended)
    counters = machine.counters
    assert counters.modcount == live
    assert len(machine.modules) == live - counters.unloads
    assert_consistent(counters, len(ended))
    text = mainline(counters, machine.failed_modules, kernel_buffer=True)
    assert parse_mainline(text).render() == text
    # Whatever is left can go, users before what they use.
    while len(machine.modules):
        assert any(not machine.remove(entry.name) for entry in list(machine.modules))
    assert machine.areas.held_bytes == 0


def assert_consistent(counters: Counters, calls: int) -> None:
    """The kernel's own rules: no bytes without a count, and the waste is the sum of its parts."""
    pairs = [
        (counters.failed_becoming, counters.invalid_becoming_bytes),
        (counters.failed_load_modules, counters.invalid_mod_bytes),
        (counters.failed_decompress, counters.invalid_decompress_bytes),
        (counters.failed_kreads, counters.invalid_kread_bytes),
    ]
    assert all(count or not size for count, size in pairs)
    assert counters.virtual_mem_wasted_bytes == sum(size for _, size in pairs)
    # Calls that began anew counted once for each time.
    counted = counters.modcount + counters.shared_calls + counters.refused_calls + counters.failed_inits
    assert counters.calls == counted + sum(count for count, _ in pairs)
    assert counters.calls >= calls
