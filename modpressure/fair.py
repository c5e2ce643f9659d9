"""Queues in which nobody waits for all that somebody else has put in.

Work is done for clients, and within a client for streams. Where it has to wait, one piece of each client is taken in
turn, and of a client one of each of its streams (round robin, as in RFC 7806 section 3.1.3).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Flow(NamedTuple):
    """On whose behalf something is done."""

    client: str = ""
    """``token NAME`` or the host of an address; empty for what a service does by itself."""

    stream: int = 0
    """Which of the client's streams; all unary RPCs are one."""


NOBODY: Final = Flow()
FLOW: Final[ContextVar[Flow]] = ContextVar("flow", default=NOBODY)
"""In the task of an RPC and in those that it starts."""


class FairQueue(Generic[T]):
    """First come, first served within a flow; the flows take turns. Bounded by whoever fills it."""

    __slots__ = ("_clients", "_length", "_new", "_turns")

    def __init__(self) -> None:
        self._clients: dict[str, tuple[dict[int, deque[T]], deque[int]]] = {}
        """Of each client that has something here its streams, and the order in which these take turns."""

        self._turns: deque[str] = deque()
        self._length = 0
        self._new: list[tuple[T, Flow]] = []
        """What has not been given its place: most of what is put in leaves all at once, and needs none."""

    def __len__(self) -> int:
        return self._length + len(self._new)

    def put(self, item: T, flow: Flow) -> None:
        """Add an item behind those of the same flow."""
        self._new.append((item, flow))

    def _place(self, item: T, flow: Flow) -> None:
        self._length += 1
        if (streams := self._clients.get(flow.client)) is None:
            streams = self._clients[flow.client] = ({}, deque())
            self._turns.append(flow.client)
        items, turns = streams
        if (lane := items.get(flow.stream)) is None:
            lane = items[flow.stream] = deque()
            turns.append(flow.stream)
        lane.append(item)

    def _place_new(self) -> None:
        for new, flow in self._new:
            self._place(new, flow)
        self._new.clear()

    def peek(self) -> T:
        """Return the next item, which stays. IndexError if there is none."""
        self._place_new()
        items, turns = self._clients[self._turns[0]]
        return items[turns[0]][0]

    def pop(self) -> T:
        """Remove and return the next item. IndexError if there is none."""
        self._place_new()
        client = self._turns.popleft()
        items, turns = self._clients[client]
        stream = turns.popleft()
        lane = items[stream]
        item = lane.popleft()
        if lane:
            turns.append(stream)
        else:
            del items[stream]
        if items:
            self._turns.append(client)
        else:
            del self._clients[client]
        self._length -= 1
        return item

    def items(self) -> list[T]:
        """Return all items: those of one flow in their order, the flows in whatever order."""
        placed = [item for streams, _ in self._clients.values() for lane in streams.values() for item in lane]
        return placed + [item for item, _ in self._new]

    def clear(self) -> None:
        """Drop all items."""
        self._clients.clear()
        self._turns.clear()
        self._length = 0
        self._new.clear()


class FairThreads:
    """Threads for work that would hold up an event loop; the flows take turns. To be used from one event loop.

    Handing something to a thread and its result back takes longer than many a small piece of work. So small pieces that
    come together, as they do where many calls are released at once, go to a thread together.
    """

    MAX_SMALL: Final = 256
    """Small pieces that go together at most, so that others do not wait for too many of them."""

    def __init__(self, threads: int, name: str) -> None:
        """Have at most ``threads`` threads."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._idle = threads
        self._is_due = False
        self._waiting: FairQueue[tuple[Callable[[], Any], asyncio.Future[Any], bool]] = FairQueue()

    async def run(self, work: Callable[[], T], *, small: bool = False) -> T:
        """Run ``work`` in a thread and return its result. ``small`` says that it may share its turn with others.

        Who is cancelled while waiting for a thread has nothing run.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        self._waiting.put((work, result, small), FLOW.get())
        if self._idle and not self._is_due:
            # All that becomes ready to run in this turn of the loop comes along.
            self._is_due = True
            loop.call_soon(self._hand_over, loop)
        return await result

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_due = False
        small: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        while self._idle and self._waiting:
            work, result, is_small = self._waiting.pop()
            if result.done():
                continue
            if not is_small:
                self._begin(loop, [(work, result)])
                continue
            small.append((work, result))
            if len(small) == self.MAX_SMALL:
                self._begin(loop, small)
                small = []
        if small:
            self._begin(loop, small)

    def _begin(
        self, loop: asyncio.AbstractEventLoop, pieces: list[tuple[Callable[[], Any], asyncio.Future[Any]]]
    ) -> None:
        self._idle -= 1
        self._executor.submit(self._run_all, loop, pieces)

    def _run_all(
        self, loop: asyncio.AbstractEventLoop, pieces: list[tuple[Callable[[], Any], asyncio.Future[Any]]]
    ) -> None:
        ended: list[tuple[asyncio.Future[Any], Any, Exception | None]] = []
        for work, result in pieces:
            try:
                ended.append((result, work(), None))
            except Exception as error:
                ended.append((result, None, error))
        loop.call_soon_threadsafe(self._end, loop, ended)

    def _end(
        self, loop: asyncio.AbstractEventLoop, ended: list[tuple[asyncio.Future[Any], Any, Exception | None]]
    ) -> None:
        self._idle += 1
        for result, value, error in ended:
            if result.done():
                continue
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)
        if self._waiting and not self._is_due:
            self._hand_over(loop)

    def shutdown(self) -> None:
        """Let the threads end; what has not begun never does."""
        self._waiting.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)
