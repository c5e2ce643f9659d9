"""The live driver: carries the steps of a call out for real.

Files are read, decompressed and copied in threads; stats_svc is asked from the event loop. A call's memory is in areas
of its own, so that the process's resident set shows what the simulated kernel holds.
"""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

from loader_svc.checks.caller import copy_failure, read_failure
from loader_svc.checks.exports import Exporters, Nobody
from loader_svc.image import Algorithm, ImageError, Layout, kernel_decompress, user_decompress
from loader_svc.ledger_client import LedgerClient
from loader_svc.memory import Area, Holdings, MemoryBudget, Meter, page_round
from loader_svc.pipeline import Pipeline, load_module
from loader_svc.plan import FileVersion, Plan, Plans, failure_of
from loader_svc.steps import (
    Admit,
    Allocate,
    CallSpec,
    CheckName,
    Decompress,
    Ending,
    EnterGate,
    Failure,
    FileStep,
    Finish,
    Free,
    Init,
    Inspect,
    Inspected,
    Link,
    Read,
    ReserveName,
    Step,
    Unpack,
)
from loader_svc.workers import FileWorkers
from modpressure.errors import ModpressureError, NotNow, OverLimit
from modpressure.kernel.modules_list import Answer, Verdict
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Outcome, Syscall
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb

INLINE_LAYOUT_BYTES: Final = 256 * 1024
"""Layouts up to this are copied on the event loop: handing the work to a thread would take longer than the copy."""

_VERDICTS: Final = {
    pb.OperationResult.VERDICT_PROCEED: Verdict.PROCEED,
    pb.OperationResult.VERDICT_DUPLICATE: Verdict.DUPLICATE,
    pb.OperationResult.VERDICT_SHARED: Verdict.SHARED,
    pb.OperationResult.VERDICT_INTERRUPTED: Verdict.INTERRUPTED,
    pb.OperationResult.VERDICT_FAILED: Verdict.FAILED,
}

_LAID_OUT: Final = (Outcome.LIVE, Outcome.LOAD, Outcome.INIT)

_CORE: Final = slice(0, 4)
_INIT: Final = slice(4, 7)
"""The first four memory types are the module's core; the rest goes after init."""


@dataclass(frozen=True, slots=True)
class File:
    """A module's file: where it is in its tree, how it is packed, and how to open it."""

    path: str
    algorithm: Algorithm | None
    open: Callable[[], int]
    """Returns a new read-only descriptor; ModpressureError if the file is away or leads out of the tree."""

    is_small: bool = False
    """Whether reading and laying it out takes less than handing it to a thread does."""


@dataclass(slots=True)
class Request:
    """One call to be made, and what is to be noted of it."""

    spec: CallSpec
    file: File
    system: str
    policy_number: call_pb2.Policy.ValueType
    copy: int = 0
    worker: str = ""
    origin: call_pb2.Origin.ValueType = call_pb2.ORIGIN_USERSPACE
    requester: str = ""
    request_id: str = ""
    wait_for_memory: bool = True


@dataclass(slots=True)
class LiveModule:
    """What a live module holds until it is unloaded."""

    core: Area | None
    """None if the core takes nothing, which no real module does."""

    taken_bytes: int


@dataclass(slots=True)
class Machine:
    """What all calls of a loader share: its memory, threads, plans, and its line to stats_svc."""

    ledger: LedgerClient
    workers: FileWorkers
    plans: Plans
    budget: MemoryBudget
    meter: Meter
    loader: str = ""
    exporters: Exporters = field(default_factory=Nobody)
    """Who exports what the kernel itself does not. Which modules are live is for stats_svc to know, not what they
    export, so this is what the tree has; it matters only if the kernel identity has symbols."""
    live_modules: dict[int, LiveModule] = field(default_factory=dict)

    def release(self, call_id: int) -> None:
        """Free what the live module of a call held; nothing happens if it holds nothing here."""
        module = self.live_modules.pop(call_id, None)
        if module is not None:
            if module.core is not None:
                module.core.free()
            self.budget.give(module.taken_bytes)


class LiveCall:
    """One call on its way through the pipeline."""

    def __init__(self, machine: Machine, request: Request) -> None:
        self._machine = machine
        self._request = request
        self._spec = request.spec
        self.call_id = machine.ledger.new_call_id()
        self._holdings = Holdings(machine.meter)
        self._need_bytes = 0
        self._taken_bytes = 0
        self._told = False
        """Whether stats_svc knows of this call, so that it must learn of its end."""

        self._fd = -1
        self._plan: Plan | None = None
        self._caller_image: Area | None = None
        self._file: Area | None = None
        self._image: Area | None = None
        self._core: Area | None = None
        self._init: Area | None = None
        self._wait_ns = 0
        self._start_ns = 0
        self._begun_ns = 0
        self._result: call_pb2.Call | None = None

    def interrupt(self) -> None:
        """Send the call a signal: if it waits for another call, it ends with EINTR."""
        self._machine.ledger.interrupt(self._request.system, self.call_id)

    async def run(self) -> call_pb2.Call:
        """Make the call and return what became of it, once that is committed.

        ModpressureError if it could not be carried out: over a limit, the file away. Then nothing was counted.
        """
        self._start_ns = time.time_ns()
        self._begun_ns = time.monotonic_ns()
        pipeline = load_module(self._spec)
        try:
            await self._drive(pipeline)
        except (ModpressureError, OSError) as error:
            self._free_all()
            if self._told:
                await self._finish(Ending(Outcome.REFUSED, "ENOMEM", "simulation", str(error)))
            if isinstance(error, OSError):
                raise _as_modpressure_error(error, self._request.file.path) from error
            raise
        finally:
            self._close()
        assert self._result is not None
        return self._result

    async def _drive(self, pipeline: Pipeline) -> None:
        answer: Any = None
        while True:
            try:
                step = pipeline.send(answer)
            except StopIteration:
                return
            if self._is_for_a_thread(step):
                work = functools.partial(self._work, pipeline, step)
                step = await self._machine.workers.run(work, small=self._request.file.is_small)
            answer = await self._carry_out(step)

    def _is_for_a_thread(self, step: Step) -> bool:
        if isinstance(step, Allocate):
            return self._plan is not None and self._plan.layout_bytes > INLINE_LAYOUT_BYTES
        return isinstance(step, FileStep)

    def _work(self, pipeline: Pipeline, step: Step) -> Step:
        """Carry out steps with files, in a thread, until one comes that is for the event loop; return that."""
        while True:
            match step:
                case Admit():
                    need_bytes = self._open()
                    if not self._machine.budget.try_take(need_bytes, self._request.file.path):
                        return step
                    self._taken_bytes = need_bytes
                    step = pipeline.send(None)
                case Unpack():
                    step = pipeline.send(self._unpack())
                case Read():
                    step = pipeline.send(self._read())
                case Decompress():
                    step = pipeline.send(self._decompress())
                case Inspect():
                    step = pipeline.send(self._inspect())
                case Allocate() if self._is_for_a_thread(step):
                    step = pipeline.send(self._allocate())
                case _:
                    return step

    async def _carry_out(self, step: Step) -> Answer | Failure | None:
        match step:
            case EnterGate(inode):
                return await self._ask(pb.Operation(enter_gate=pb.EnterGate(inode=inode)))
            case CheckName(module):
                return await self._ask(pb.Operation(check_name=pb.CheckName(module=module)))
            case ReserveName(module):
                return await self._ask(pb.Operation(reserve_name=pb.ReserveName(module=module)))
            case Admit():
                # There was no room when a thread asked: wait for it.
                need_bytes = self._need_bytes
                path, wait = self._request.file.path, self._request.wait_for_memory
                await self._machine.budget.take(need_bytes, path, wait=wait)
                self._taken_bytes = need_bytes
            case Allocate():
                return self._allocate()
            case Link():
                return self._link()
            case Free("image"):
                self._free_images()
            case Free("init"):
                self._free_init()
            case Free("all"):
                self._free_all()
            case Finish(ending):
                await self._finish(ending)
            case Init():
                # What an init function does can't be known without running it; it is taken to return 0 at once.
                return None
            case _:
                raise AssertionError(step)
        return None

    async def _ask(self, operation: pb.Operation) -> Answer:
        operation.call_id = self.call_id
        operation.system = self._request.system
        self._told = True
        asked_ns = time.monotonic_ns()
        result = await self._machine.ledger.ask(operation)
        if result.waited:
            self._wait_ns += time.monotonic_ns() - asked_ns
        return Answer(_VERDICTS[result.verdict], result.errno, result.waited)

    # --- files and memory ---

    def _open(self) -> int:
        """Open the file and plan the call; return the most memory that it will take, in bytes."""
        file, spec = self._request.file, self._spec
        self._fd = file.open()
        by_kernel = spec.syscall is Syscall.FINIT_MODULE
        algorithm = file.algorithm if not by_kernel or spec.flags & MODULE_INIT_COMPRESSED_FILE else None
        plan = self._plan = self._machine.plans.of(
            self._fd, file.path, algorithm, by_kernel=by_kernel, flags=spec.flags
        )
        self._need_bytes = plan.peak_bytes if by_kernel else plan.peak_bytes + page_round(plan.unpacked_bytes)
        return self._need_bytes

    @property
    def _planned(self) -> Plan:
        assert self._plan is not None, "a call is admitted before anything else is done with its file"
        return self._plan

    def _read_file(self, holdings: Holdings) -> Area:
        """Read the whole file into an area of its own."""
        plan = self._planned
        size_bytes = plan.version.size_bytes
        area = Area(size_bytes, holdings)
        offset = 0
        try:
            with memoryview(area.pages) as view:
                while offset < size_bytes:
                    with view[offset:size_bytes] as rest:
                        length = os.preadv(self._fd, [rest], offset)
                    if length == 0:
                        break
                    offset += length
            if offset < size_bytes or FileVersion.of(self._fd) != plan.version:
                raise NotNow(f"{self._request.file.path} changed while it was being read")
        except BaseException:
            area.free()
            raise
        return area

    def _unpack(self) -> Failure | None:
        plan = self._planned
        failure = plan.failure_at("read") or plan.failure_at("decompress")
        if failure:
            return failure
        # The caller's own memory is real, and within the budget, but nothing that the kernel allocates.
        aside = Holdings(Meter())
        file = self._read_file(aside)
        if self._request.file.algorithm is None:
            self._caller_image = file
            return None
        try:
            self._caller_image = self._unpacked(file, user_decompress, aside)
        finally:
            file.free()
        return None

    def _unpacked(self, file: Area, decompress: Callable[..., Iterator[bytes]], holdings: Holdings) -> Area:
        """Decompress the file of an area into another one; ImageError where that fails, and nothing is kept then."""
        plan = self._planned
        image = Area(plan.unpacked_bytes, holdings)
        offset = 0
        try:
            with memoryview(file.pages) as view, view[: plan.version.size_bytes] as source:
                for chunk in decompress(
                    source, self._request.file.algorithm, limit_bytes=self._machine.plans.image_limit_bytes
                ):
                    image.pages[offset : offset + len(chunk)] = chunk
                    offset += len(chunk)
        except ImageError:
            image.free()
            raise
        return image

    def _read(self) -> Failure | None:
        plan = self._planned
        if self._caller_image is not None:
            failure = copy_failure(self._spec, plan.unpacked_bytes, self._machine.budget.limit_bytes)
            if failure:
                return failure
            self._file = Area(plan.unpacked_bytes, self._holdings)
            with memoryview(self._caller_image.pages) as view, view[: plan.unpacked_bytes] as source:
                self._file.pages[: plan.unpacked_bytes] = source
            return None
        failure = read_failure(self._spec, plan.failure_at("read"))
        if failure is None:
            self._file = self._read_file(self._holdings)
        return failure

    def _decompress(self) -> Failure | None:
        assert self._file is not None
        try:
            self._image = self._unpacked(self._file, kernel_decompress, self._holdings)
        except ImageError as error:
            return failure_of(error)
        self._file.free()
        self._file = None
        return None

    def _inspect(self) -> Inspected | Failure:
        plan = self._planned
        return plan.failure_at("check") or Inspected(plan.module)

    def _allocate(self) -> Failure | None:
        plan = self._planned
        layout = plan.layout
        if layout is None:
            return plan.failure_at("layout")
        image = self._image or self._file
        assert image is not None
        # The kernel allocates each type for itself, one right after the other. Two areas hold as many pages for as
        # long, and each one more would cost an unmapping across all threads.
        self._core = self._lay_out(layout, _CORE, image)
        self._init = self._lay_out(layout, _INIT, image)
        return None

    def _lay_out(self, layout: Layout, types: slice, image: Area) -> Area | None:
        """Allocate an area for some memory types, one after another, and copy their sections into it."""
        sizes = layout.rounded[types]
        if not any(sizes):
            return None
        area = Area(sum(sizes), self._holdings, populate=True)
        bases = dict(zip(range(types.start, types.stop), accumulate(sizes, initial=0), strict=False))
        with memoryview(image.pages) as source:
            for placement in layout.placements:
                base = bases.get(placement.memory_type)
                size_bytes = placement.size_bytes
                if base is not None and size_bytes and not placement.is_nobits:
                    to, at = base + placement.destination_offset_bytes, placement.source_offset_bytes
                    with source[at : at + size_bytes] as section:
                        area.pages[to : to + size_bytes] = section
        return area

    def _link(self) -> Failure | None:
        linkage = self._planned.linkage
        assert linkage is not None, "what could be laid out can be looked into"
        return (
            linkage.failure_before_symbols()
            or linkage.resolve(self._machine.exporters).failure
            or linkage.failure_after_symbols(self._spec, Nobody())
        )

    def _free_images(self) -> None:
        for area in (self._file, self._image):
            if area is not None:
                area.free()
        self._file = self._image = None

    def _free_init(self) -> None:
        if self._init is not None:
            self._init.free()
            self._init = None

    def _free_all(self) -> None:
        if self._core is not None:
            self._core.free()
            self._core = None
        self._free_init()
        self._free_images()

    def _close(self) -> None:
        """Let go of what is not the simulated kernel's, and of what is left of the budget."""
        if self._caller_image is not None:
            self._caller_image.free()
            self._caller_image = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._taken_bytes:
            self._machine.budget.give(self._taken_bytes)
            self._taken_bytes = 0

    # --- the end ---

    async def _finish(self, ending: Ending) -> None:
        """Tell stats_svc how the call ended, and keep what it committed."""
        machine, request = self._machine, self._request
        call = self._describe(ending)
        finish = pb.FinishCall(call=call, reserved=ending.reserved)
        if ending.outcome is Outcome.LIVE:
            finish.core_bytes = self._core.size_bytes if self._core is not None else 0
            # Before anyone can know that it is live, and so unload it.
            machine.live_modules[self.call_id] = LiveModule(self._core, finish.core_bytes)
            self._core = None
            self._taken_bytes -= finish.core_bytes
        operation = pb.Operation(call_id=self.call_id, system=request.system, finish_call=finish)
        try:
            result = await machine.ledger.ask(operation)
        except ModpressureError:
            # It lost its name while this loader was away: nobody will ever unload it.
            machine.release(self.call_id)
            raise
        call.event_id = result.event_id
        call.system = request.system
        call.instance_id = machine.ledger.instance_id
        call.loader = machine.loader
        self._result = call

    def _describe(self, ending: Ending) -> call_pb2.Call:
        request, spec, plan = self._request, self._spec, self._plan
        call = call_pb2.Call(
            call_id=self.call_id,
            worker=request.worker,
            request_id=request.request_id,
            origin=request.origin,
            requester=request.requester,
            module=ending.module or spec.module,
            file=request.file.path,
            copy=request.copy,
            policy=request.policy_number,
            syscall=spec.syscall,  # type: ignore[arg-type]  # the numbers are the same
            flags=spec.flags,
            outcome=ending.outcome,  # type: ignore[arg-type]
            errno=ending.errno,
            check=ending.check,
            value=ending.value,
            duplicate=ending.duplicate,
            peak_held_bytes=self._holdings.peak_bytes,
            duration_ns=time.monotonic_ns() - self._begun_ns,
            wait_ns=self._wait_ns,
            held_bytes=self._machine.meter.held_bytes,
        )
        call.start_time.FromNanoseconds(self._start_ns)
        if plan is None:
            return call
        call.file_bytes = plan.version.size_bytes
        if spec.flags & MODULE_INIT_COMPRESSED_FILE:
            call.compressed_bytes = plan.version.size_bytes
        if ending.outcome is Outcome.KREAD:
            # Only init_module's caller has said a length when the copy fails.
            call.image_bytes = plan.unpacked_bytes if spec.syscall is Syscall.INIT_MODULE else 0
        else:
            call.image_bytes = plan.image_bytes
        if plan.layout is not None and ending.outcome in _LAID_OUT:
            call.mod_bytes = plan.layout.total_bytes
            call.text_bytes = plan.layout.text_bytes
        return call


def _as_modpressure_error(error: OSError, path: str) -> ModpressureError:
    """Say what the machine that runs the simulation, not the simulated one, would not do."""
    if error.errno == errno.ENOMEM:
        return OverLimit(f"there is no memory left to load {path}")
    return NotNow(f"{path} can't be read: {error.strerror}")
