"""Storms: many workers that load, or load and unload, the same modules at the same time.

Mode repeat is the loop of stress-ng's module stressor: one unload before the start, then load; after a success count an
operation and unload; after a failure try again at once. Two things differ: a worker whose load fails for another reason
than a duplicate ends, since trying again can't change that; and one whose unload finds the module in use tries that
again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from loader_svc import requests
from loader_svc.call_memory import File
from loader_svc.live import LiveCall, Request
from loader_svc.loader import Load, Loader
from loader_svc.steps import CallSpec
from modpressure.errors import BadRequest, ModpressureError, NotNow
from modpressure.grpc_errors import status_of
from modpressure.kernel.counters import Counters
from modpressure.v1 import call_pb2, loader_service_pb2
from modpressure.v1.loader_service_pb2 import Storm as StormMessage

T = TypeVar("T")

MAX_WORKERS: Final = 10_000
MAX_WORKERS_AT_ONCE: Final = 4 * MAX_WORKERS
"""Of all storms of a loader; each client may have as many as it leaves free."""

MAX_MODULES: Final = 1_000
MAX_OPERATIONS: Final = 2**53
MAX_AT_ONCE: Final = 100
"""Workers that are started, or calls that are sent a signal, in one turn of the event loop. A worker begins its first
call in its first turn, which takes a tenth of a millisecond, and the loader's other clients and its lease wait for as
long as all of them take."""

STOP_SECONDS: Final = 5.0
"""How long a stopped storm waits for the calls in flight before it sends them a signal, and then once more before it
tells what it has counted."""

UNENDED: Final = "a call had not ended long after the storm was to stop"

PASSING_ERRNOS: Final = frozenset({"", "EEXIST", "EBUSY", "EINTR"})
"""What a worker gets past: these depend on what other calls do at the moment."""


async def _first(*futures: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Wait until one of them is done, or for so long."""
    await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


async def _in_turns(items: Sequence[T]) -> AsyncIterator[T]:
    """Yield items, and let others have the event loop after some of them."""
    for place, item in enumerate(items, 1):
        yield item
        if place % MAX_AT_ONCE == 0:
            await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class StormPlan:
    """A storm as asked for, checked."""

    system: str
    modules: tuple[str, ...]
    workers: int
    first_worker: int
    once: bool
    keep_loaded: bool
    operations: int
    seconds: float | None
    policy: int
    kmod: int
    separate_copies: bool
    with_dependencies: bool
    await_start: bool

    @classmethod
    def of(cls, message: StormMessage, loader: Loader) -> StormPlan:
        """Check a request; BadRequest and NotFound name the field and the value."""
        if not message.modules:
            raise BadRequest("a storm needs at least one module", field="modules")
        requests.in_range("number of modules", len(message.modules), 1, MAX_MODULES)
        requests.in_range("workers", message.workers, 1, MAX_WORKERS)
        requests.in_range("operations", message.operations, 0, MAX_OPERATIONS)
        requests.in_range("first_worker", message.first_worker, 0, 2**31 - 1 - MAX_WORKERS)
        if message.mode not in (
            StormMessage.MODE_UNSPECIFIED,
            StormMessage.MODE_REPEAT,
            StormMessage.MODE_ONCE,
        ):
            raise BadRequest(f"there is no storm mode number {message.mode}", field="mode")
        once = message.mode == StormMessage.MODE_ONCE
        seconds = message.duration.ToNanoseconds() / 1e9 if message.HasField("duration") else None
        if seconds is not None and seconds <= 0:
            raise BadRequest(f"duration {seconds} s is not more than 0", field="duration")
        if not once and not message.operations and seconds is None:
            raise BadRequest("mode repeat needs operations or duration, else it would never end", field="operations")
        return cls(
            system=requests.system_id(message.system),
            modules=tuple(loader.tree.module(name).name for name in message.modules),
            workers=message.workers,
            first_worker=message.first_worker,
            once=once,
            keep_loaded=message.keep_loaded or once,
            operations=message.operations,
            seconds=seconds,
            policy=requests.policy_number(message.policy),
            kmod=requests.kmod_version(message.kmod, loader.kmod),
            separate_copies=message.separate_copies,
            with_dependencies=message.with_dependencies,
            await_start=message.await_start,
        )


class Storm:
    """A storm on one loader: prepared, started once, and summed up when its workers have ended or it was stopped."""

    def __init__(self, loader: Loader, message: StormMessage) -> None:
        """Check the request; BadRequest and NotFound name the field and the value."""
        self.plan = StormPlan.of(message, loader)
        self._loader = loader
        self._policy = 0
        self._outcomes: Counter[tuple[int, str]] = Counter()
        self._counters = Counters()
        self._operations = 0
        self._unloads = 0
        self._errors = 0
        self._first_error = ""
        self._active_workers = 0
        self._calls: set[LiveCall] = set()
        self._specs: dict[str, tuple[CallSpec, File]] = {}
        """Of the files that all workers share."""

        self._stopping = asyncio.Event()
        self._stopped_early = False
        self._started_ns = 0
        self._ended_ns = 0

    async def prepare(self) -> loader_service_pb2.StormReady:
        """Do what comes before the start: load what the modules depend on, unload the modules themselves.

        Unavailable if stats_svc is away; ModpressureError if a dependency can't be loaded or one of them is in use.
        """
        plan, loader = self.plan, self._loader
        await loader.machine.ledger.require()
        # Opens the system, which may be new.
        self._policy = await loader.answer(loader.policy(plan.system, plan.policy))
        ready = loader_service_pb2.StormReady(loader=loader.machine.loader)
        modules = dict.fromkeys(plan.modules)
        if plan.with_dependencies:
            for module in modules:
                ready.dependency_calls.extend(await self._load_dependencies(module, modules))
        if not plan.keep_loaded:
            await self._unload(modules)
        return ready

    async def _unload(self, modules: Collection[str]) -> None:
        """Unload modules, some of which may use others of them."""
        used = list(modules)
        while used:
            removed = {module: await self._loader.answer(self._remove(module)) for module in used}
            left = [module for module, unload in removed.items() if unload.errno == "EWOULDBLOCK"]
            if len(left) == len(used):
                raise NotNow(f"{left[0]!r} can't be unloaded before the storm: another module uses it")
            used = left

    def _remove(self, module: str, worker: str = "storm") -> Coroutine[Any, Any, call_pb2.Unload]:
        return self._loader.remove(self.plan.system, module, worker)

    async def _load_dependencies(self, module: str, but: Collection[str]) -> list[call_pb2.Call]:
        """Load what ``module`` depends on, ``but`` the modules of the storm."""
        # Where there is nothing to load, to look for it is all that is done, and the next module follows at once.
        await asyncio.sleep(0)
        _, steps = self._loader.steps(module, with_dependencies=True)
        calls: list[call_pb2.Call] = []
        for step in steps:
            if step.module in but:
                continue
            request = loader_service_pb2.LoadModuleRequest(
                system=self.plan.system,
                module=step.module,
                with_dependencies=True,
                policy=self.plan.policy,  # type: ignore[arg-type]
                requester="storm",
                worker="storm",
            )
            response = await self._loader.answer(Load(self._loader, request).run())
            calls.extend(response.dependency_calls)
            if response.HasField("call"):
                calls.append(response.call)
        return calls

    async def run(self) -> loader_service_pb2.StormSummary:
        """Start the workers, and return what it came to once they have ended or been stopped."""
        plan, loader = self.plan, self._loader
        peak = loader.machine.meter.begin_peak()
        self._active_workers = plan.workers
        self._started_ns = time.monotonic_ns()
        stop_after = asyncio.ensure_future(self._stop_after(plan.seconds))
        numbers = range(plan.first_worker, plan.first_worker + plan.workers)
        workers = [loader.begin(self._work(number)) async for number in _in_turns(numbers)]
        everyone = asyncio.ensure_future(asyncio.wait(workers))
        stopping = asyncio.ensure_future(self._stopping.wait())
        leaving = asyncio.ensure_future(loader.leaving.wait())
        away = asyncio.ensure_future(loader.machine.ledger.wait_away())
        try:
            await _first(everyone, stopping, leaving, away)
            await _first(everyone, leaving, away, seconds=STOP_SECONDS)
            async for call in _in_turns(list(self._calls)):
                if call in self._calls:
                    call.interrupt()
            await _first(everyone, leaving, away, seconds=STOP_SECONDS)
            if leaving.done():
                await _first(everyone, away, seconds=loader.settle_seconds)
                self._stopped_early = self._stopped_early or not everyone.done()
        finally:
            self._stopping.set()
            self._ended_ns = time.monotonic_ns()
            for task in (stop_after, everyone, stopping, leaving, away):
                task.cancel()
        for worker in workers:
            if not worker.done():
                # What becomes of its call is not summed up.
                self._add_error(str(self._why_unended(is_away=away.done())))
            elif (error := worker.exception()) is not None:
                # One that a worker does not foresee.
                self._add_error(status_of(error, "Loader.RunStorm").message)
        return self._summary(loader.machine.meter.end_peak(peak))

    def _why_unended(self, *, is_away: bool) -> ModpressureError:
        if is_away:
            return self._loader.machine.ledger.unavailable()
        return self._loader.stopping() if self._loader.leaving.is_set() else NotNow(UNENDED)

    async def _stop_after(self, seconds: float | None) -> None:
        if seconds is not None:
            await asyncio.sleep(seconds)
            self._stopping.set()

    def stop(self) -> None:
        """Have the workers end after the calls they are in."""
        self._stopped_early = not self._ended_ns
        self._stopping.set()

    # --- one worker ---

    async def _work(self, number: int) -> None:
        """Do what one worker does, to its end."""
        plan = self.plan
        worker = f"worker-{number}"
        copy = number + 1 if plan.separate_copies else 0
        try:
            done = 0
            while not self._is_over():
                for module in plan.modules:
                    if self._is_over() or not await self._load_and_unload(module, worker, copy):
                        return
                done += 1
                if plan.once or (plan.operations and done >= plan.operations):
                    return
        except ModpressureError as error:
            self._add_error(str(error))
        finally:
            self._active_workers -= 1

    def _spec(self, module: str, copy: int) -> tuple[CallSpec, File]:
        """Return what is to be asked of the kernel, made when a worker needs it and kept only where all share it.

        Of all workers and modules together there may be ten million.
        """
        found = self._specs.get(module)
        if found is None:
            found = self._loader.spec(module, policy=self._policy, kmod=self.plan.kmod, copy=copy)
            if not copy:
                self._specs[module] = found
        return found

    def _is_over(self) -> bool:
        """Return whether a worker is to begin no further call. Unavailable if that is because the loader stops."""
        if self._stopping.is_set():
            return True
        if self._loader.leaving.is_set():
            self._stopped_early = True
            raise self._loader.stopping()
        return False

    def _add_error(self, sentence: str) -> None:
        self._errors += 1
        self._first_error = self._first_error or sentence

    async def _load_and_unload(self, module: str, worker: str, copy: int) -> bool:
        """Load until it succeeds (mode once: once), then unload; return whether the worker is to go on."""
        plan, policy = self.plan, self._policy
        spec, file = self._spec(module, copy)
        while True:
            request = Request(spec, file, plan.system, policy, copy, worker, requester="storm")  # type: ignore[arg-type]
            live_call = LiveCall(self._loader.machine, request)
            self._calls.add(live_call)
            try:
                call = await live_call.run()
            finally:
                self._calls.discard(live_call)
            self._count(call)
            if plan.once:
                return True
            if not call.errno:
                self._operations += 1
                if not plan.keep_loaded:
                    unload = await self._remove(spec.module, worker)
                    # Another worker's module uses it for as long as that is loaded; nobody else would unload this one.
                    while unload.errno == "EWOULDBLOCK" and not self._is_over():
                        unload = await self._remove(spec.module, worker)
                    self._unloads += not unload.errno
                return True
            if call.errno not in PASSING_ERRNOS or self._is_over():
                return False

    def _count(self, call: call_pb2.Call) -> None:
        self._outcomes[call.outcome, call.errno] += 1
        self._counters.add_call(
            call.outcome,
            syscall=call.syscall,
            duplicate=call.duplicate,
            image_bytes=call.image_bytes,
            compressed_bytes=call.compressed_bytes,
            mod_bytes=call.mod_bytes,
            text_bytes=call.text_bytes,
        )

    # --- what it tells ---

    def progress(self) -> loader_service_pb2.StormProgress:
        """Return how far it is."""
        return loader_service_pb2.StormProgress(
            operations=self._operations,
            calls=self._counters.calls,
            duplicates=self._counters.duplicates,
            active_workers=self._active_workers,
            held_bytes=self._loader.machine.meter.held_bytes,
        )

    def _summary(self, peak_bytes: int) -> loader_service_pb2.StormSummary:
        counters = self._counters
        summary = loader_service_pb2.StormSummary(
            loader=self._loader.machine.loader,
            workers=self.plan.workers,
            calls=counters.calls,
            operations=self._operations,
            unloads=self._unloads,
            outcomes=[
                loader_service_pb2.OutcomeCount(outcome=outcome, errno=errno, count=count)  # type: ignore[arg-type]
                for (outcome, errno), count in sorted(self._outcomes.items())
            ],
            duplicates=counters.duplicates,
            wasted_bytes=counters.virtual_mem_wasted_bytes,
            peak_held_bytes=peak_bytes,
            errors=self._errors,
            first_error=self._first_error,
            stopped=self._stopped_early,
        )
        summary.elapsed.FromNanoseconds(self._ended_ns - self._started_ns)
        return summary
