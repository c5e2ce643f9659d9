"""A virtual machine of finite memory: ENOMEM at the stage where it happens, and nothing held that should not be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader_svc.image import describe
from loader_svc.init_results import InitResults
from loader_svc.steps import Caller, CallSpec, Ending
from loader_svc.virtual.costs import NO_COSTS
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.kernel.identity import ANY, ExportedSymbol
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Outcome, Syscall
from modpressure.kernel.policy import V6_3, V6_4, V6_5, Policy
from modpressure.kernel.system_memory import Amounts

PAGE = 4096
MS = 1_000_000
ALLOC, WRITE = 2, 1
KERNEL = replace(
    ANY,
    symbols={"module_layout": ExportedSymbol(None), "printk": ExportedSymbol(None)},
    decompressors=("zstd",),
)
COSTS = replace(NO_COSTS, syscall_ns=3_000_001, zstd_ns_per_byte=50.0, allocate_ns=1_000_003, link_ns=4_000_007)
INIT = InitResults.parse("module,condition,duration_ms,result\nslow,always,50,0\nsick,always,0,-ENODEV\n")


class Disk:
    """Modules of some pages each, plain and packed."""

    def __init__(self, directory: Path, make_module: Callable[..., Any], make_section: Callable[..., Any]) -> None:
        self.paths: dict[str, Path] = {}
        self.rounded: dict[str, tuple[int, ...]] = {}
        for name, pages in (("slow", 5), ("sick", 2), ("big", 20)):
            rodata = make_section(".rodata", os.urandom(pages * PAGE), ALLOC)
            data = make_section(".init.data", os.urandom(pages * PAGE // 2), ALLOC | WRITE)
            builder = make_module(name, rodata, data)
            builder.symbols = [("", 1, 0), ("init_module", 1, 1), ("cleanup_module", 1, 1)]
            image = builder.bytes()
            self.paths[name] = directory / f"{name}.ko"
            self.paths[name].write_bytes(image)
            self.paths[f"{name}.zst"] = directory / f"{name}.ko.zst"
            self.paths[f"{name}.zst"].write_bytes(zstandard.compress(image))
            layout = describe(image).layout
            assert layout is not None
            self.rounded[name] = self.rounded[f"{name}.zst"] = layout.rounded

    def call(
        self, name: str, policy: Policy = V6_4, *, copy: int = 0, syscall: int = 1, told: int | None = None
    ) -> Any:
        path = self.paths[name]
        flags = MODULE_INIT_COMPRESSED_FILE if name.endswith(".zst") else 0
        caller = Caller(length_bytes=told)
        spec = CallSpec(name, f"{path}:{copy}", policy, Syscall(syscall), flags, caller=caller)
        return VirtualCall(spec, VirtualFile(str(path), partial(os.open, path, os.O_RDONLY)))

    def pages(self, name: str) -> int:
        return -(-self.paths[name].stat().st_size // PAGE) * PAGE


@pytest.fixture
def disk(tmp_path: Path, make_module: Callable[..., Any], make_section: Callable[..., Any]) -> Disk:
    return Disk(tmp_path, make_module, make_section)


def load(limits: Amounts, call: VirtualCall) -> tuple[Ending, VirtualMachine]:
    machine = VirtualMachine(KERNEL, limits=limits)
    ending = machine.call(call)
    assert machine.memory is not None
    assert machine.memory.in_flight == 0
    if ending.outcome is not Outcome.LIVE:
        assert machine.memory.taken == Amounts()
    return ending, machine


def said(ending: Ending) -> tuple[str, str, str]:
    return ending.outcome.word, ending.errno, ending.check


def edges(disk: Disk, name: str) -> Iterator[tuple[Amounts, str, str]]:
    """Yield limits that one step of a plain load just exceeds, with its stage and what is full."""
    file, sizes = disk.pages(name), disk.rounded[name]
    yield Amounts(memory_bytes=file - 1), "kread", "memory: pages"
    yield Amounts(vmalloc_bytes=file), "kread", "memory: vmalloc area"
    used = 0
    for size in sizes:
        if size:
            yield Amounts(memory_bytes=file + used + size - 1), "becoming", "memory: pages"
            used += size
    types = [size for size in sizes if size]
    yield Amounts(module_area_bytes=sum(types) + len(types) * PAGE - 1), "becoming", "memory: module area"


@pytest.mark.parametrize("name", ["slow", "big"])
def test_a_byte_less_than_needed_fails_at_the_stage_that_needs_it(disk: Disk, name: str) -> None:
    for limits, stage, check in edges(disk, name):
        ending, machine = load(limits, disk.call(name))
        assert said(ending) == (stage, "ENOMEM", check), limits
        counters, image_bytes = machine.counters, disk.paths[name].stat().st_size
        assert (counters.failed_kreads, counters.failed_becoming) == (stage == "kread", stage == "becoming")
        # A read that fails moves no bytes.
        assert counters.virtual_mem_wasted_bytes == (image_bytes if stage == "becoming" else 0)
        # A byte more, and this allocation fits; the next one may not.
        enough, _ = load(Amounts(*(limit and limit + 1 for limit in limits)), disk.call(name))
        assert enough != ending


def test_what_is_needed_exactly_is_enough(disk: Disk) -> None:
    sizes = [size for size in disk.rounded["slow"] if size]
    exact = Amounts(disk.pages("slow") + sum(sizes), disk.pages("slow") + PAGE, sum(sizes) + PAGE * len(sizes))
    ending, machine = load(exact, disk.call("slow"))
    assert ending.outcome is Outcome.LIVE
    assert machine.memory is not None
    core = [size for size in disk.rounded["slow"][:4] if size]
    assert machine.memory.taken == Amounts(sum(core), 0, sum(core) + PAGE * len(core))
    assert machine.memory.peak == exact
    assert not machine.remove("slow")
    assert machine.memory.taken == Amounts()


def test_while_the_kernel_decompresses_it_holds_both(disk: Disk) -> None:
    packed, image = disk.pages("big.zst"), disk.pages("big")
    ending, machine = load(Amounts(memory_bytes=packed + image - 1), disk.call("big.zst"))
    assert said(ending) == ("decompress", "ENOMEM", "memory: pages")
    assert ending.value == f"{image} bytes asked, {image - 1} left"
    counters = machine.counters
    assert (counters.failed_decompress, counters.invalid_decompress_bytes) == (
        1,
        disk.paths["big.zst"].stat().st_size,
    )
    ending, _ = load(Amounts(vmalloc_bytes=packed + image + 2 * PAGE - 1), disk.call("big.zst"))
    assert said(ending) == ("decompress", "ENOMEM", "memory: vmalloc area")
    # The packed one is gone when the layout comes: what is enough for the two is enough for image and layout.
    layout = sum(disk.rounded["big"])
    most = image + max(packed, layout)
    ending, _ = load(Amounts(memory_bytes=most), disk.call("big.zst"))
    assert ending.outcome is Outcome.LIVE
    ending, _ = load(Amounts(memory_bytes=most - 1), disk.call("big.zst"))
    assert ending.errno == "ENOMEM"


def test_init_module_counts_the_length_that_it_was_told(disk: Disk) -> None:
    told = 1 << 40
    ending, machine = load(Amounts(memory_bytes=1 << 30), disk.call("slow", syscall=2, told=told))
    assert said(ending) == ("kread", "ENOMEM", "memory: pages")
    assert (machine.counters.failed_kreads, machine.counters.invalid_kread_bytes) == (1, told)


CALLS = st.tuples(
    st.sampled_from(["slow", "sick", "big", "slow.zst", "sick.zst", "big.zst"]),
    st.integers(0, 2),
    st.integers(0, 200),
    st.none() | st.integers(0, 300),
)
PAGES = st.integers(0, 150).map(lambda pages: pages * PAGE)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(CALLS, max_size=12),
    limits=st.builds(Amounts, PAGES, PAGES, PAGES),
    policy=st.sampled_from([V6_3, V6_4, V6_5]),
    unloads=st.lists(st.tuples(st.sampled_from(["slow", "big"]), st.integers(0, 300)), max_size=4),
)
def test_whatever_happens_only_live_modules_hold_memory_in_the_end(
    disk: Disk,
    calls: list[tuple[str, int, int, int | None]],
    limits: Amounts,
    policy: Policy,
    unloads: list[tuple[str, int]],
) -> None:
    machine = VirtualMachine(KERNEL, init_results=INIT, costs=COSTS, limits=limits)
    memory = machine.memory
    assert memory is not None
    ended: list[VirtualCall] = []
    for name, copy, at_ms, signal_ms in calls:
        call = disk.call(name, policy, copy=copy)
        call.on_end = ended.append
        machine.begin(call, at_ms * MS)
        if signal_ms is not None:
            machine.interrupt(call, signal_ms * MS)
    for name, at_ms in unloads:
        machine.clock.at(at_ms * MS, partial(machine.remove, name))
    machine.run()
    assert len(ended) == len(calls)
    assert memory.in_flight == 0
    core = [size for entry in machine.modules for size in disk.rounded[entry.name][:4] if size]
    assert memory.taken == Amounts(sum(core), 0, sum(core) + PAGE * len(core))
    for peak, limit in zip(memory.peak, limits, strict=True):
        assert not limit or peak <= limit
    for call in ended:
        assert call.ending is not None
        if call.ending.outcome is not Outcome.SHARED:
            assert (call.ending.errno == "ENOMEM") == call.ending.check.startswith("memory: ")
    for entry in list(machine.modules):
        assert not machine.remove(entry.name)
    assert memory.taken == Amounts()
