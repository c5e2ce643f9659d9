"""The loader: turns requests for modules into calls on the simulated kernel, and answers them."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from loader_svc import requests
from loader_svc.call_memory import File
from loader_svc.claim import Claim, Part, digest_of
from loader_svc.image import Algorithm
from loader_svc.live import LiveCall, Machine, Request
from loader_svc.steps import CallSpec
from loader_svc.trees import LoadStep, ModuleTree
from loader_svc.trees.names import checked_name
from modpressure.errors import Unavailable
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Syscall
from modpressure.shares import PERMIT
from modpressure.v1 import call_pb2, loader_service_pb2
from modpressure.v1 import ledger_service_pb2 as ledger

T = TypeVar("T")

ALGORITHMS: Final[dict[str, Algorithm]] = {"gz": "gzip", "xz": "xz", "zst": "zstd"}
"""What a file's suffix says of its compression."""

MAX_REMEMBERED_STEPS: Final = 10_000

SMALL_FILE_BYTES: Final = 128 * 1024
"""Plain files up to this are read in one go with others: a turn of a thread takes longer than the read."""

KMOD_WITH_KERNEL_DECOMPRESSION: Final = 34


class Loader:
    """Loads and unloads modules of one tree on the systems of one stats_svc."""

    def __init__(self, machine: Machine, tree: ModuleTree, *, kmod: int) -> None:
        """``kmod`` is the libkmod version for requests that say none, 30 or 34."""
        self.machine = machine
        self.tree = tree
        self.kmod = kmod
        self._decompressors = machine.plans.identity.decompressors
        self._tasks: set[asyncio.Task[Any]] = set()
        self._clients: dict[asyncio.Future[Any], Callable[[], None] | None] = {}
        """Those who wait for an answer, and what is done when they no longer do."""

        self.leaving = asyncio.Event()
        """Set when a stop no longer lets clients wait."""

        self.settle_seconds = 0.0
        """From then on, how long a storm may wait for its last calls; later its summary would reach nobody."""

        self._steps: dict[tuple[str, bool], tuple[list[str], list[LoadStep]]] = {}

    # --- requests ---

    async def load(self, request: loader_service_pb2.LoadModuleRequest) -> loader_service_pb2.LoadModuleResponse:
        """Load a module, and first what it depends on if asked to; return once every call is committed.

        Cancelling this sends the call a signal: it ends by itself, with EINTR if it waits for another one. One with an
        id goes on: its client may come back for the result.
        """
        load = Load(self, request)
        await self.machine.ledger.require()
        return await self.answer(load.run(), on_cancel=load.interrupt)

    async def unload(self, request: loader_service_pb2.UnloadModuleRequest) -> loader_service_pb2.UnloadModuleResponse:
        """Unload a module; return once that is committed."""
        system = requests.system_id(request.system)
        module = checked_name(request.module)
        worker = requests.label("worker", request.worker)
        claim = self.claim(request, system)
        await self.machine.ledger.require()
        if claim is None:
            work = self.remove(system, module, worker, forced=request.forced)
            return loader_service_pb2.UnloadModuleResponse(unload=await self.answer(work))

        async def remove() -> call_pb2.Unload:
            if claim.is_complete:
                # One that stats_svc was not asked for is the result itself.
                parts = claim.record.parts
                return parts[0].unload if parts else call_pb2.Unload.FromString(claim.record.result)
            return await self.remove(system, module, worker, forced=request.forced, claim=claim, request_id=request_id)

        request_id = request.request_id
        result_of = call_pb2.Unload.SerializeToString
        unload = await self.answer(claim.once(remove, result_of), on_cancel=claim.interrupt)
        return loader_service_pb2.UnloadModuleResponse(unload=unload)

    def claim(self, request: Any, system: str) -> Claim | None:
        """Return the claim on a request's id, None if it has none. BadRequest if the id makes no sense."""
        if not request.request_id:
            return None
        request_id = requests.request_id(request.request_id)
        return Claim(self.machine.ledger, system, request_id, digest_of(request))

    async def remove(
        self,
        system: str,
        module: str,
        worker: str,
        *,
        forced: bool = False,
        claim: Claim | None = None,
        request_id: str = "",
    ) -> call_pb2.Unload:
        """Make one delete_module call."""
        client, identity = self.machine.ledger, self.machine.plans.identity
        call_id = client.new_call_id()
        unload = call_pb2.Unload(call_id=call_id, module=module, worker=worker, request_id=request_id)
        # Without MODULE_FORCE_UNLOAD the kernel passes over the flag (try_force_unload, kernel/module/main.c).
        unload.forced = forced and identity.module_force_unload
        begun_ns = time.monotonic_ns()
        unload.start_time.FromNanoseconds(time.time_ns())
        # As told from now on, whoever asks: what follows is the commit, which is no part of the call.
        unload.duration_ns = time.monotonic_ns() - begun_ns
        if identity.module_unload:
            remove = ledger.RemoveModule(unload=unload)
            part = claim.part("", settles=True) if claim is not None else None
            if part is not None:
                remove.claim = part.claim
            result = await client.ask(ledger.Operation(call_id=call_id, system=system, remove_module=remove))
            if claim is not None and part is not None:
                claim.is_settled_by(part)
            unload.errno = result.errno
            unload.event_id = result.event_id
        else:
            unload.errno = "ENOSYS"
        unload.system = system
        unload.instance_id = client.instance_id
        unload.loader = self.machine.loader
        return unload

    async def is_live(self, system: str, module: str) -> bool:
        """Return whether a module is live, as modprobe would read it from /sys/module/NAME/initstate."""
        client = self.machine.ledger
        operation = ledger.Operation(
            call_id=client.new_call_id(), system=system, read_initstate=ledger.ReadInitstate(module=module)
        )
        return (await client.ask(operation)).live

    async def policy(self, system: str, asked: int) -> int:
        """Return the number of the policy to use: what was asked for, else the system's own.

        The system is opened on the way, so that calls on it can follow.
        """
        own = await self.machine.ledger.policy_of(system)
        return asked or own

    def spec(
        self, name: str, *, policy: int, kmod: int, flags: int = 0, copy: int = 0, parameters: str = ""
    ) -> tuple[CallSpec, File]:
        """Return what is to be asked of the kernel for a module of the tree, and the file.

        NotFound if there is no such module, BadRequest for a bad name.
        """
        entry = self.tree.module(name)
        algorithm = ALGORITHMS.get(entry.compression)
        syscall = Syscall.FINIT_MODULE
        if algorithm is not None:
            if kmod >= KMOD_WITH_KERNEL_DECOMPRESSION and algorithm in self._decompressors:
                flags |= MODULE_INIT_COMPRESSED_FILE
            else:
                syscall = Syscall.INIT_MODULE
        # The same file of the same tree is one inode on every loader; a copy is another.
        inode = f"{self.tree.identity}:{entry.path}:{copy}"
        spec = CallSpec(entry.name, inode, requests.POLICIES[policy], syscall, flags, parameters)
        is_small = algorithm is None and (entry.size_bytes or 0) <= SMALL_FILE_BYTES
        open_file = functools.partial(self.tree.open_file, entry.name)
        return spec, File(entry.path, algorithm, open_file, is_small)

    def steps(self, text: str, *, with_dependencies: bool) -> tuple[list[str], list[LoadStep]]:
        """Return what a name or alias stands for, and the files to load for it, in order.

        Modules that are built in are passed over, and so are commands that the configuration would have modprobe run
        instead of loading: a request must not be able to run anything. NotFound, BadRequest.
        """
        found = self._steps.get((text, with_dependencies))
        if found is None:
            targets = self.tree.resolve_alias(text)
            if with_dependencies:
                steps = [step for step in self.tree.load_order(text) if step.kind == "insmod"]
            else:
                steps = [LoadStep("insmod", name, self.tree.module(name).path) for name in targets]
            found = (targets, steps)
            if len(self._steps) >= MAX_REMEMBERED_STEPS:
                self._steps.clear()
            self._steps[text, with_dependencies] = found
        return found

    # --- tasks that outlive their clients ---

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start ``work``, whose end a stop of the loader waits for, and until when its request keeps its place."""
        task = asyncio.create_task(work)
        if (permit := PERMIT.get()) is not None:
            permit.keep_for(task)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # or asyncio would complain where nobody looks at it

    async def answer(self, work: Coroutine[Any, Any, T], on_cancel: Callable[[], None] | None = None) -> T:
        """Run ``work`` to its end whatever its client does, and return its result to the client.

        Unavailable to the client, while the work goes on, if stats_svc stays away for longer than patience allows.
        """
        task = self.begin(work)
        client: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._clients[client] = on_cancel
        task.add_done_callback(functools.partial(_settle, client))
        try:
            return await client
        except asyncio.CancelledError:
            if on_cancel is not None:
                on_cancel()
            raise
        finally:
            self._clients.pop(client, None)

    def send_clients_away(self, settle_seconds: float) -> None:
        """Tell every waiting client that this loader stops; a call without a request id is sent a signal.

        ``settle_seconds`` is how long storms may wait for their last calls.
        """
        self.settle_seconds = settle_seconds
        self.leaving.set()
        error = self.stopping()
        for waiting, on_cancel in list(self._clients.items()):
            if not waiting.done():
                waiting.set_exception(error)
                if on_cancel is not None:
                    on_cancel()

    def stopping(self) -> Unavailable:
        """Return the error that says that this loader stops."""
        return Unavailable(f"loader {self.machine.loader!r} is stopping")

    async def tell_clients_when_away(self) -> None:
        """Tell every waiting client when stats_svc has been away for too long. Runs until cancelled."""
        client = self.machine.ledger
        while True:
            await client.wait_away()
            for waiting in list(self._clients):
                if not waiting.done():
                    waiting.set_exception(client.unavailable())
            await client.wait_connected()

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._tasks)

    async def drain(self) -> None:
        """Return when every request has ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def _settle(client: asyncio.Future[T], task: asyncio.Task[T]) -> None:
    """Give who waits, if anybody still does, what became of the work."""
    if client.done():
        return
    if task.cancelled():
        client.cancel()
    elif (error := task.exception()) is not None:
        client.set_exception(error)
    else:
        client.set_result(task.result())


class Load:
    """One request to load: the calls that it takes, one after another, as modprobe makes them."""

    def __init__(self, loader: Loader, request: loader_service_pb2.LoadModuleRequest) -> None:
        """Check the request; BadRequest names the field and the value."""
        self._loader = loader
        self._system = requests.system_id(request.system)
        self._policy = requests.policy_number(request.policy)
        self._kmod = requests.kmod_version(request.kmod, loader.kmod)
        self._flags = requests.user_flags(request.flags)
        self._copy = requests.in_range("copy", request.copy, 0, 2**31 - 1)
        self._origin = requests.origin(request.origin)
        self._requester = requests.label("requester", request.requester)
        self._worker = requests.label("worker", request.worker)
        self._claim = loader.claim(request, self._system)
        self._request_id = request.request_id
        self._parameters = requests.parameters(request.parameters)
        self._wait_for_memory = not request.refuse_when_full
        self._with_dependencies = request.with_dependencies
        # Before anything is asked of stats_svc: an unknown module is the caller's mistake whether it is there or not.
        self._targets, self._steps = loader.steps(request.module, with_dependencies=request.with_dependencies)
        self._call: LiveCall | None = None
        self._interrupted = False

    def interrupt(self) -> None:
        """Send the call in progress a signal; no further one is begun. A request with an id goes on."""
        if self._claim is not None:
            self._claim.interrupt()
            return
        self._interrupted = True
        if self._call is not None:
            self._call.interrupt()

    async def run(self) -> loader_service_pb2.LoadModuleResponse:
        """Make the calls, or learn what came of them if the request has an id that was seen before."""
        self._policy = await self._loader.policy(self._system, self._policy)
        return await self._make_calls() if self._claim is None else await self._claim.once(self._make_calls)

    async def _make_calls(self) -> loader_service_pb2.LoadModuleResponse:
        response = loader_service_pb2.LoadModuleResponse()
        for step in self._steps:
            if self._interrupted:
                break
            call = await self._call_for(step)
            if call is None:
                continue
            if step.module == self._targets[-1]:
                response.call.CopyFrom(call)
            else:
                response.dependency_calls.append(call)
                # Somebody else's success is as good as one's own.
                if call.errno not in ("", "EEXIST") and step.required:
                    break
        return response

    async def _call_for(self, step: LoadStep) -> call_pb2.Call | None:
        """Return the call for a step, made now unless it is recorded; None where none is needed."""
        claim, part = self._claim, None
        if claim is not None:
            recorded = claim.recorded(step.module)
            if recorded is not None or claim.is_complete:
                return recorded
            part = claim.part(step.module, settles=step is self._steps[-1])
        # modprobe looks whether a module is live before it loads it; insmod does not.
        if self._with_dependencies and await self._loader.is_live(self._system, step.module):
            return None
        own = self._parameters if step.module == self._targets[-1] else ""
        spec, file = self._loader.spec(
            step.module,
            policy=self._policy,
            kmod=self._kmod,
            flags=self._flags,
            copy=self._copy,
            parameters=step.options + own,
        )
        self._call = LiveCall(self._loader.machine, self._call_request(spec, file, part))
        call = await self._call.run()
        if claim is not None and part is not None:
            claim.is_settled_by(part)
        return call

    def _call_request(self, spec: CallSpec, file: File, part: Part | None) -> Request:
        return Request(
            spec,
            file,
            self._system,
            self._policy,  # type: ignore[arg-type]
            self._copy,
            self._worker,
            self._origin,
            self._requester,
            self._request_id,
            self._wait_for_memory,
            part,
        )
