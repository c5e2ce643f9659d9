"""The live driver: carries the steps of a call out for real.

Files are read, decompressed and copied in threads; stats_svc is asked from the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import time
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import structlog

from loader_svc.allocation import allocation_of, failure_of_shortage
from loader_svc.call_links import CallLinks, ExportTables
from loader_svc.call_memory import CallMemory, File, LiveModule
from loader_svc.checks.parameters import arguments
from loader_svc.claim import Part
from loader_svc.init_results import InitResults
from loader_svc.ledger_client import LedgerClient
from loader_svc.memory import MemoryBudget, Meter
from loader_svc.pipeline import Pipeline, load_module
from loader_svc.plan import Plans
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
    Link,
    Read,
    ReserveName,
    Step,
    Unpack,
    told,
)
from loader_svc.workers import FileWorkers
from modpressure.errors import ModpressureError, NotNow, OverLimit
from modpressure.kernel.modules_list import PROCEED, Answer, Verdict
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Outcome, Syscall
from modpressure.kernel.system_memory import MemoryArea, Shortage
from modpressure.log import about
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

_SIGNAL: Final = Failure("EINTR", "signal")

_SIMULATION: Final = "simulation"
"""The check that ended a call that could not be carried out."""

_log = structlog.get_logger(__name__)

_LAID_OUT: Final = (Outcome.LIVE, Outcome.LOAD, Outcome.INIT)


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
    part: Part | None = None
    """What it is of a client's request that has an id."""


@dataclass(slots=True)
class Machine:
    """What all calls of a loader share: its memory, threads, plans, and its line to stats_svc."""

    ledger: LedgerClient
    workers: FileWorkers
    plans: Plans
    budget: MemoryBudget
    meter: Meter
    loader: str = ""
    tree_exports: Container[str] = ()
    """What the modules of the tree export: where the kernel's own symbols are not known, only these are asked for."""

    init_results: InitResults = field(default_factory=InitResults)
    init_seed: int = 0
    """What the durations and results of init functions are drawn from, where they are drawn."""

    inits: Counter[str] = field(default_factory=Counter)
    """How many init functions of each module have been run."""

    export_tables: ExportTables = field(default_factory=ExportTables)
    live_modules: dict[int, LiveModule] = field(default_factory=dict)

    def init_dice(self, module: str) -> Random:
        """Return what to draw from for the next init of a module: the same for the same number of inits before it."""
        number = self.inits[module]
        self.inits[module] += 1
        return Random(f"{self.init_seed} {module} {number}")

    def release(self, call_id: int) -> None:
        """Free what the live module of a call held; nothing happens if it holds nothing here."""
        module = self.live_modules.pop(call_id, None)
        if module is not None:
            if module.core is not None:
                module.core.free()
            self.budget.give(module.taken)


class LiveCall:
    """One call on its way through the pipeline."""

    def __init__(self, machine: Machine, request: Request) -> None:
        self._machine = machine
        self._request = request
        self._spec = request.spec
        self.call_id = machine.ledger.new_call_id()
        self._is_limited = machine.ledger.has_limits(request.system)
        """Whether the system's memory is finite, so that each allocation is asked for."""

        self._memory = CallMemory(request.file, request.spec, machine.plans, machine.budget, machine.meter)
        self._told = False
        """Whether stats_svc knows of this call, so that it must learn of its end."""

        self._reserved = False
        """Whether its name is in the list, and is to be given back if all goes wrong."""

        self._signalled = False
        """Whether it was sent a signal: that stays pending, and the next wait that it ends is over at once."""

        self._admission: asyncio.Future[None] | None = None
        """While it waits for real memory: that wait."""

        self._links: CallLinks | None = None
        self._wait_ns = 0
        self._start_ns = 0
        self._begun_ns = 0
        self._result: call_pb2.Call | None = None

    def interrupt(self) -> None:
        """Send the call a signal: its wait for another call or for memory, this one or the next, ends with EINTR."""
        self._signalled = True
        self._machine.ledger.interrupt(self._request.system, self.call_id)
        if self._admission is not None:
            self._admission.cancel()

    async def run(self) -> call_pb2.Call:
        """Make the call and return what became of it, once that is committed.

        ModpressureError if it could not be carried out: over a limit, the file away. Then nothing was counted.
        """
        self._start_ns = time.time_ns()
        self._begun_ns = time.monotonic_ns()
        about(system=self._request.system, request_id=self._request.request_id, call=self.call_id)
        pipeline = load_module(self._spec)
        try:
            await self._drive(pipeline)
        except Exception as error:
            # Whatever it is: somebody may wait for this call's result or for its name.
            self._memory.free_all()
            _log.info("call not carried out", module=self._spec.module, reason=f"{type(error).__name__}: {error}")
            if self._told and self._result is None:
                why = told(str(error))
                await self._finish(Ending(Outcome.REFUSED, "ENOMEM", _SIMULATION, why, reserved=self._reserved))
            if isinstance(error, OSError):
                raise _as_modpressure_error(error, self._request.file.path) from error
            raise
        finally:
            self._memory.close()
        assert self._result is not None
        _log.debug(
            "call ended",
            module=self._spec.module,
            outcome=call_pb2.Outcome.Name(self._result.outcome),
            errno=self._result.errno,
        )
        return self._result

    async def _drive(self, pipeline: Pipeline) -> None:
        step = next(pipeline)
        while True:
            answer: Any = await self._allot(step) if self._is_limited else None
            if answer is None:
                if self._is_for_a_thread(step):
                    work = functools.partial(self._work, pipeline, step)
                    step = await self._machine.workers.run(work, small=self._request.file.is_small)
                    if self._is_allotted(step):
                        continue
                answer = await self._carry_out(step)
            try:
                step = pipeline.send(answer)
            except StopIteration:
                return

    def _is_for_a_thread(self, step: Step) -> bool:
        if isinstance(step, Allocate):
            return (plan := self._memory.plan) is not None and plan.layout_bytes > INLINE_LAYOUT_BYTES
        return isinstance(step, FileStep)

    def _is_allotted(self, step: Step) -> bool:
        """Whether stats_svc is asked for memory before a step."""
        return self._is_limited and allocation_of(step, self._spec, self._memory.plan) is not None

    async def _allot(self, step: Step) -> Failure | None:
        """Allocate or free what a step does of the system's finite memory; return why it fails, if there is no room."""
        if isinstance(step, Free) and step.what == "image":
            await self._ask(pb.Operation(free_memory=pb.FreeMemory()))
            return None
        allocation = allocation_of(step, self._spec, self._memory.plan)
        if allocation is None:
            return None
        asked = pb.AllocateMemory(part=allocation.part, sizes=allocation.sizes)  # type: ignore[arg-type]
        result = await self._result_of(pb.Operation(allocate_memory=asked))
        if result.verdict == pb.OperationResult.VERDICT_PROCEED:
            return None
        shortage = result.shortage
        return failure_of_shortage(Shortage(MemoryArea(shortage.area), shortage.asked_bytes, shortage.left_bytes))

    def _work(self, pipeline: Pipeline, step: Step) -> Step:
        """Carry out steps with files, in a thread, until one comes that is for the event loop; return that."""
        first, memory = step, self._memory
        while True:
            if step is not first and self._is_allotted(step):
                return step
            match step:
                case Admit():
                    if not memory.try_admit():
                        return step
                    step = pipeline.send(None)
                case Unpack():
                    step = pipeline.send(memory.unpack())
                case Read():
                    step = pipeline.send(memory.read())
                case Decompress():
                    step = pipeline.send(memory.decompress())
                case Inspect():
                    step = pipeline.send(memory.inspect())
                case Allocate() if self._is_for_a_thread(step):
                    step = pipeline.send(memory.allocate())
                case _:
                    return step

    async def _carry_out(self, step: Step) -> Answer | Failure | None:
        match step:
            case EnterGate(inode):
                return await self._ask(pb.Operation(enter_gate=pb.EnterGate(inode=inode)))
            case CheckName(module):
                return await self._ask(pb.Operation(check_name=pb.CheckName(module=module)))
            case ReserveName(module):
                return await self._reserve(module)
            case Admit():
                return await self._wait_for_memory()
            case Allocate():
                return self._memory.allocate()
            case Link():
                return await self._link()
            case Free("image"):
                self._memory.free_images()
            case Free("init"):
                self._memory.free_init()
            case Free("all"):
                self._memory.free_all()
            case Finish(ending):
                await self._finish(ending)
            case Init():
                return await self._run_init()
            case _:
                raise AssertionError(step)
        return None

    async def _ask(self, operation: pb.Operation) -> Answer:
        return _answer_of(await self._result_of(operation))

    async def _result_of(self, operation: pb.Operation) -> pb.OperationResult:
        operation.call_id = self.call_id
        operation.system = self._request.system
        self._told = True
        asked_ns = time.monotonic_ns()
        result = await self._machine.ledger.ask(operation, interrupted=self._signalled)
        if result.waited:
            self._wait_ns += time.monotonic_ns() - asked_ns
        return result

    # --- other modules ---

    async def _reserve(self, module: str) -> Answer:
        machine, linkage = self._machine, self._memory.planned.linkage
        assert linkage is not None, "what could be laid out can be looked into"
        is_known = machine.plans.identity.symbols is not None
        self._links = CallLinks(
            linkage,
            self._spec,
            module,
            machine.export_tables,
            None if is_known else machine.tree_exports,
            has_init=machine.init_results.is_told(module),
        )
        asked = self._links.reservation()
        # Even an answer that makes no sense of the rest may have inserted the name.
        self._reserved = True
        result = await self._result_of(pb.Operation(reserve_name=asked))
        self._reserved = result.verdict == pb.OperationResult.VERDICT_PROCEED
        if not self._reserved:
            return _answer_of(result)
        self._links.reserved(asked, result)
        return PROCEED

    async def _link(self) -> Failure | None:
        assert self._links is not None, "a name is inserted before its module is linked"
        return await self._links.link(self._result_of, self._await_init)

    async def _await_init(self, module: str, patience_seconds: float) -> bool:
        """Wait for the init function of another module; return whether it has ended.

        A signal ends the wait too (``resolve_symbol_wait``), and the call goes on without that module.
        """
        ledger, system = self._machine.ledger, self._request.system
        loop = asyncio.get_running_loop()
        impatience = loop.call_later(patience_seconds, ledger.interrupt, system, self.call_id)
        try:
            answer = await self._ask(pb.Operation(await_init=pb.AwaitInit(module=module)))
        finally:
            impatience.cancel()
        return answer.verdict is Verdict.PROCEED

    async def _run_init(self) -> Failure | None:
        """Let the time pass that the init function takes, signals or not, and return its error."""
        machine, module = self._machine, self._memory.planned.module
        results = machine.init_results
        if not results.is_told(module):
            # What an init function does can't be known without running it; it is taken to return 0 at once.
            return None
        live = {name for name in results.looked_at_by(module) if await self._is_live(name)}
        result = results.of(
            module, arguments(self._spec.parameters), live.__contains__, lambda: machine.init_dice(module)
        )
        if result.duration_ns:
            await machine.ledger.pass_time(result.duration_ns / 1e9)
        return Failure(result.errno, "init") if result.errno else None

    async def _is_live(self, name: str) -> bool:
        result = await self._result_of(pb.Operation(read_initstate=pb.ReadInitstate(module=name)))
        return result.live

    async def _wait_for_memory(self) -> Failure | None:
        """Take what the call needs, in turn: there was no room when a thread asked."""
        if self._signalled:
            return _SIGNAL
        admission = self._admission = asyncio.ensure_future(
            self._memory.wait_for_room(wait=self._request.wait_for_memory)
        )
        try:
            await admission
        except asyncio.CancelledError:
            # Either this wait was ended, by a signal, or all of the call is.
            if not self._signalled or (task := asyncio.current_task()) is None or task.cancelling():
                raise
            return _SIGNAL
        finally:
            self._admission = None
        return None

    # --- the end ---

    async def _finish(self, ending: Ending) -> None:
        """Tell stats_svc how the call ended, and keep what it committed."""
        machine, request = self._machine, self._request
        call = self._describe(ending)
        formed = self._links is not None and self._links.formed
        finish = pb.FinishCall(call=call, reserved=ending.reserved, formed=formed)
        # A call that could not be carried out is made again by who tries again.
        if request.part is not None and ending.check != _SIMULATION:
            finish.claim, finish.part, finish.settles = request.part.claim, request.part.name, request.part.settles
        if ending.outcome is Outcome.LIVE:
            # Before anyone can know that it is live, and so unload it.
            module = machine.live_modules[self.call_id] = self._memory.keep()
            finish.core_bytes = module.taken.size_bytes
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
        request, spec, plan = self._request, self._spec, self._memory.plan
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
            peak_held_bytes=self._memory.peak_bytes,
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


def _answer_of(result: pb.OperationResult) -> Answer:
    return Answer(_VERDICTS[result.verdict], result.errno, result.waited)


def _as_modpressure_error(error: OSError, path: str) -> ModpressureError:
    """Say what the machine that runs the simulation, not the simulated one, would not do."""
    if error.errno == errno.ENOMEM:
        return OverLimit(f"there is no memory left to load {path}")
    return NotNow(f"{path} can't be read: {error.strerror}")
