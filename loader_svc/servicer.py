"""The loader's RPCs: convert, call, map errors."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import functools
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final

from loader_svc import requests
from loader_svc.autoload import ModuleRequest
from loader_svc.describe import describe_module
from loader_svc.loader import Loader
from loader_svc.storm import MAX_WORKERS_AT_ONCE, Storm
from modpressure.errors import BadRequest, Overloaded
from modpressure.fair import FLOW
from modpressure.grpc_errors import status_of, translate_errors
from modpressure.shares import PERMIT, Permit, Places, Shares
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceServicer

PROGRESS_SECONDS: Final = 0.25
DEFAULT_PAGE_SIZE: Final = 1000
MAX_PAGE_SIZE: Final = 10_000
MAX_STREAM_IN_FLIGHT: Final = 1024
"""Requests of one stream that are carried out or answered at once; further messages are not read meanwhile."""


class LoaderServicer(LoaderServiceServicer):
    """Serves one loader."""

    def __init__(self, loader: Loader, request_limit: int) -> None:
        """``request_limit`` is how many requests of all streams may be in progress at once."""
        self._loader = loader
        self._workers = Shares(MAX_WORKERS_AT_ONCE)
        self._requests = Places(request_limit, "requests of streams in progress")

    async def LoadModule(self, request: pb.LoadModuleRequest, context: Any) -> pb.LoadModuleResponse:
        """Load one module."""
        async with translate_errors(context, "Loader.LoadModule"):
            return await self._loader.load(request)

    async def UnloadModule(self, request: pb.UnloadModuleRequest, context: Any) -> pb.UnloadModuleResponse:
        """Unload one module."""
        async with translate_errors(context, "Loader.UnloadModule"):
            return await self._loader.unload(request)

    async def RequestModule(self, request: pb.RequestModuleRequest, context: Any) -> pb.RequestModuleResponse:
        """Ask for a module as the kernel does."""
        async with translate_errors(context, "Loader.RequestModule"):
            asked = ModuleRequest(self._loader, request)
            await self._loader.machine.ledger.require()
            return await self._loader.answer(asked.run(), on_cancel=asked.interrupt)

    async def LoadModules(
        self, requests: AsyncIterator[pb.LoadModulesRequest], context: Any
    ) -> AsyncIterator[pb.LoadModulesResponse]:
        """Load and unload many modules over one stream."""
        async with translate_errors(context, "Loader.LoadModules"):
            stream = _ManyRequests(self._loader, self._requests, FLOW.get().client)
            async with _reading(stream.read(requests)) as reader:
                try:
                    async for responses in stream.answers(reader):
                        yield pb.LoadModulesResponse(responses=responses)
                finally:
                    stream.end()

    async def RunStorm(
        self, messages: AsyncIterator[pb.RunStormRequest], context: Any
    ) -> AsyncIterator[pb.RunStormResponse]:
        """Run a storm."""
        async with translate_errors(context, "Loader.RunStorm"):
            first = await anext(aiter(messages), None)
            if first is None or first.WhichOneof("kind") != "storm":
                raise BadRequest("the first message must say which storm to run", field="storm")
            storm = Storm(self._loader, first.storm)
            client, workers = FLOW.get().client, storm.plan.workers
            if not self._workers.try_take(client, workers):
                raise Overloaded(f"{workers} workers are more than there is room for beside the storms that run")
            permit = PERMIT.get()
            assert permit is not None, "nothing is served that was not admitted"
            permit.add(functools.partial(self._workers.give, client, workers))
            ready = await storm.prepare()
            started = asyncio.Event()
            if not storm.plan.await_start:
                started.set()
            async with _reading(_control(messages, storm, started)):
                yield pb.RunStormResponse(ready=ready)
                await started.wait()
                running = asyncio.ensure_future(storm.run())
                try:
                    while not running.done():
                        await asyncio.wait({running}, timeout=PROGRESS_SECONDS)
                        yield pb.RunStormResponse(progress=storm.progress())
                    yield pb.RunStormResponse(summary=running.result())
                finally:
                    storm.stop()
                    await asyncio.wait({running})

    async def ListModules(self, request: pb.ListModulesRequest, context: Any) -> pb.ListModulesResponse:
        """List the tree's modules."""
        async with translate_errors(context, "Loader.ListModules"):
            tree = self._loader.tree
            if request.page_size < 0:
                raise BadRequest(f"page_size {request.page_size} is negative", field="page_size")
            size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
            # A pattern is made a program, which for a long one takes so long that nothing else would be served.
            pattern = requests.label("filter", request.filter).replace("-", "_")
            builtin = frozenset(tree.builtin)
            names = sorted(builtin.union(tree.names()))
            if pattern:
                names = fnmatch.filter(names, pattern)
            # The token is the last name of the page before: it holds whatever page size comes next.
            rest = [name for name in names if name > request.page_token]
            response = pb.ListModulesResponse(release=tree.release)
            for name in rest[:size]:
                if name in builtin:
                    response.modules.add(name=name, builtin=True)
                    continue
                entry = tree.module(name)
                response.modules.add(name=name, file=entry.path, file_bytes=entry.size_bytes)
            if len(rest) > size:
                response.next_page_token = rest[size - 1]
            return response

    async def GetModule(self, request: pb.GetModuleRequest, context: Any) -> pb.GetModuleResponse:
        """Describe one module."""
        async with translate_errors(context, "Loader.GetModule"):
            loader = self._loader
            budget, image_limit_bytes = loader.machine.budget, loader.machine.plans.image_limit_bytes
            entry = loader.tree.module(loader.tree.resolve_alias(request.module)[-1])
            file_bytes = entry.size_bytes or 0
            # How long the image is shows only when it is there.
            need_bytes = min(file_bytes + (image_limit_bytes if entry.compression else 0), budget.limit_bytes)
            limit_bytes = max(0, min(image_limit_bytes, need_bytes - file_bytes if entry.compression else need_bytes))
            describe = functools.partial(describe_module, loader.tree, request.module, limit_bytes)

            async def described() -> pb.Module:
                try:
                    return await loader.machine.workers.run(describe)
                finally:
                    budget.give(taken)

            taken = await budget.take(need_bytes, entry.path, FLOW.get().client)
            # A thread is at it, and has the memory, whoever goes meanwhile.
            return pb.GetModuleResponse(module=await asyncio.shield(loader.begin(described())))


@contextlib.asynccontextmanager
async def _reading(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Have ``work`` read an RPC's messages meanwhile, and no longer. What breaks it breaks the RPC at the end."""
    reader = asyncio.create_task(work)
    try:
        yield reader
    finally:
        is_left = reader.cancel()
        await asyncio.wait({reader})
        # Even if the client has left: then this is for the log alone.
        if not (is_left and reader.cancelled()):
            reader.result()


async def _control(messages: AsyncIterator[pb.RunStormRequest], storm: Storm, started: asyncio.Event) -> None:
    """Obey the messages that come after the first.

    If they end before an awaited start, none will come, and what can't be read could be anything: stop.
    """
    try:
        async for message in messages:
            match message.WhichOneof("kind"):
                case "start":
                    started.set()
                case "stop":
                    storm.stop()
                    started.set()
    except Exception:
        storm.stop()
        raise
    finally:
        if not started.is_set():
            storm.stop()
            started.set()


class _ManyRequests:
    """The requests of one stream: carried out side by side, answered as they end."""

    def __init__(self, loader: Loader, places: Places, client: str) -> None:
        """Each request takes one of the ``client``'s ``places``, until it is answered and its call has ended."""
        self._loader = loader
        self._places = places
        self._client = client
        self._permits: set[Permit] = set()
        """Of requests whose answers are not sent."""

        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: list[tuple[pb.ModuleResponse, Permit]] = []
        self._news = asyncio.Event()
        self._room = asyncio.Semaphore(MAX_STREAM_IN_FLIGHT)

    async def read(self, messages: AsyncIterator[pb.LoadModulesRequest]) -> None:
        """Begin every request of every message, no more at once than there is room for. Overloaded if there is none."""
        async for message in messages:
            for request in message.requests:
                await self._room.acquire()
                await self._places.take(self._client)
                permit = Permit(functools.partial(self._places.give, self._client))
                self._permits.add(permit)
                task = asyncio.ensure_future(self._carry_out(request, permit))
                permit.keep_for(task)
                self._tasks.add(task)
                task.add_done_callback(self._done)
        self._news.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._news.set()

    async def _carry_out(self, request: pb.ModuleRequest, permit: Permit) -> None:
        PERMIT.set(permit)
        tag = request.tag
        try:
            match request.WhichOneof("kind"):
                case "load":
                    answer = pb.ModuleResponse(tag=tag, load=await self._loader.load(request.load))
                case "unload":
                    answer = pb.ModuleResponse(tag=tag, unload=await self._loader.unload(request.unload))
                case _:
                    raise BadRequest(f"request {tag} asks for nothing", field="requests")
        except Exception as error:
            status = status_of(error, "Loader.LoadModules")
            answer = pb.ModuleResponse(tag=tag, error=pb.RequestError(code=status.code, message=status.message))
        self._answers.append((answer, permit))

    async def answers(self, reader: asyncio.Future[None]) -> AsyncIterator[list[pb.ModuleResponse]]:
        """Yield answers, as many at a time as there are, until the reader is done and every request is answered."""
        reader.add_done_callback(lambda _: self._news.set())
        while True:
            await self._news.wait()
            self._news.clear()
            answers, self._answers = self._answers, []
            if answers:
                yield [answer for answer, _ in answers]
                # Not before they are sent: who reads none would have us keep them all.
                for _, permit in answers:
                    self._room.release()
                    self._permits.discard(permit)
                    permit.release()
            if reader.done() and not self._tasks and not self._answers:
                return

    def end(self) -> None:
        """Send each call a signal if the client is gone; a place that a call has comes back when that ends."""
        for task in self._tasks:
            task.cancel()
        for permit in self._permits:
            permit.release()
