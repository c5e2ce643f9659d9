"""Threads for work with files, which would hold up an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class FileWorkers:
    """Runs work with files in threads.

    Handing something to a thread and its result back takes longer than reading a small file. So small pieces of work
    that come together, as they do where many calls are released at once, go to a thread together.
    """

    def __init__(self, threads: int) -> None:
        """Have at most ``threads`` threads."""
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="files")
        self._small: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []

    async def run(self, work: Callable[[], T], *, small: bool = False) -> T:
        """Run ``work`` in a thread and return its result. ``small`` says that it may share its turn with others."""
        loop = asyncio.get_running_loop()
        if not small:
            return await loop.run_in_executor(self.executor, work)
        result: asyncio.Future[T] = loop.create_future()
        if not self._small:
            # All that becomes ready to run in this turn of the loop comes along.
            loop.call_soon(self._hand_over, loop)
        self._small.append((work, result))
        return await result

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        pieces, self._small = self._small, []
        self.executor.submit(self._run_all, loop, pieces)

    @staticmethod
    def _run_all(loop: asyncio.AbstractEventLoop, pieces: list[tuple[Callable[[], Any], asyncio.Future[Any]]]) -> None:
        ended: list[tuple[asyncio.Future[Any], Any, Exception | None]] = []
        for work, result in pieces:
            try:
                ended.append((result, work(), None))
            except Exception as error:
                ended.append((result, None, error))
        loop.call_soon_threadsafe(_settle, ended)

    def shutdown(self) -> None:
        """Let the threads end; what has not begun never does."""
        self.executor.shutdown(wait=False, cancel_futures=True)


def _settle(ended: list[tuple[asyncio.Future[Any], Any, Exception | None]]) -> None:
    for result, value, error in ended:
        if result.done():
            continue
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)
