"""The kernel's own requests for modules: how many modprobes may run at once, and which requests share one.

The rules are those of ``__request_module`` (kernel/module/kmod.c) and ``kmod_dup_request_exists_wait``,
``kmod_dup_request_announce``, ``kmod_dup_request_delete`` (kernel/module/dups.c), Linux 6.12: a request first takes one
of 50 places, in turn, and fails with ETIME when none was free for 5 s. Where equal names are merged
(CONFIG_MODULE_DEBUG_AUTOLOAD_DUPS) a request then looks whether its name, letter by letter, was asked for already: it
waits for that one's result, still in its place, or has it at once for 60 s after. Neither wait ends by a signal here:
the first never does, the second by a deadly one only.

Times are integer nanoseconds of whatever clock the caller has.
"""

from __future__ import annotations

import errno as errnos
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from modpressure.kernel.modules_list import PROCEED, Answer, Verdict

Caller = TypeVar("Caller", bound=Hashable)
"""Whatever tells one request from another; it need only be hashable."""

MAX_CONCURRENT: Final = 50
"""Places for requests (``MAX_KMOD_CONCURRENT``)."""

BUSY_TIMEOUT_NS: Final = 5 * 10**9
"""How long a request waits for a place (``MAX_KMOD_ALL_BUSY_TIMEOUT``)."""

REMEMBER_NS: Final = 60 * 10**9
"""How long the result of a name is given to others after it is known."""

MAX_NAME_BYTES: Final = 55
"""Longest name (``MODULE_NAME_LEN``, 56, with its NUL; include/linux/module.h)."""

EXIT_FAILURE: Final = 1
"""What modprobe exits with if it could not do what it was asked to."""

Told = list[tuple[Caller, Answer]]
"""Requests that waited, and what each is told."""


def return_value(errno: str, exit_status: int) -> int:
    """Return what request_module returns: -errno, or else modprobe's wait status, which is 256 for an exit with 1."""
    return -int(getattr(errnos, errno)) if errno else exit_status << 8


@dataclass(slots=True)
class _Request:
    name: str
    is_merged: bool
    deadline_ns: int = 0
    has_waited: bool = False


@dataclass(slots=True)
class _Name(Generic[Caller]):
    """A name that requests are merged by."""

    owner: Caller | None
    """Whose modprobe runs; None once the result is known."""

    result: Answer | None = None
    waiters: dict[Caller, None] = field(default_factory=dict)


class Autoload(Generic[Caller]):
    """The requests of one kernel.

    An answer is ``PROCEED``: run modprobe, then ``finish``; ``SHARED``: the result of another request's modprobe, as
    errno and exit status; or ``FAILED``. A method that may have to wait returns None for "later"; the answer then comes
    out of the method that ends the wait, as pairs of caller and answer.
    """

    def __init__(
        self,
        *,
        max_concurrent: int = MAX_CONCURRENT,
        busy_timeout_ns: int = BUSY_TIMEOUT_NS,
        remember_ns: int = REMEMBER_NS,
    ) -> None:
        self._max_concurrent = max_concurrent
        self._busy_timeout_ns = busy_timeout_ns
        self._remember_ns = remember_ns
        self._placed: dict[Caller, _Request] = {}
        self._queue: dict[Caller, _Request] = {}
        """In the order in which they came, which is that of their deadlines."""

        self._names: dict[str, _Name[Caller]] = {}
        self._known: deque[tuple[int, str]] = deque()
        """Names whose result is known, and when each is forgotten."""

    @property
    def in_flight(self) -> int:
        """How many requests have not ended."""
        return len(self._placed) + len(self._queue)

    @property
    def waiting(self) -> int:
        """How many of them wait, for a place or for another's result."""
        return len(self._queue) + sum(len(name.waiters) for name in self._names.values())

    @property
    def next_expiry_ns(self) -> int | None:
        """When the first of those that wait for a place will have waited for too long; None if none waits."""
        return next(iter(self._queue.values())).deadline_ns if self._queue else None

    def callers(self) -> list[Caller]:
        """List whose requests have not ended."""
        return [*self._placed, *self._queue]

    def request(self, name: str, caller: Caller, now_ns: int, *, merge: bool = False) -> Answer | None:
        """Ask for a module by name or alias; ``merge`` says whether equal names share one modprobe.

        Asking again with the same caller gives the same answer, so that a lost answer can be asked for again.
        """
        placed = self._placed.get(caller)
        if placed is not None:
            return None if self._waits_for_result(caller, placed) else PROCEED
        if caller in self._queue:
            return None
        if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
            return Answer(Verdict.FAILED, "ENAMETOOLONG")
        request = _Request(name, merge)
        if len(self._placed) < self._max_concurrent:
            return self._place(caller, request, now_ns)
        request.deadline_ns = now_ns + self._busy_timeout_ns
        request.has_waited = True
        self._queue[caller] = request
        return None

    def finish(self, caller: Caller, errno: str, exit_status: int, now_ns: int) -> Told[Caller]:
        """End the request of who was told to proceed, with how its modprobe ended; return who is told what by that.

        Nothing happens if the caller holds no place, so that an end can be told twice.
        """
        told = self.expire(now_ns)
        request = self._placed.get(caller)
        if request is None or self._waits_for_result(caller, request):
            return told
        del self._placed[caller]
        name = self._names.get(request.name)
        if name is not None and name.owner == caller:
            name.owner, name.result = None, Answer(Verdict.SHARED, errno, exit_status=exit_status)
            self._known.append((now_ns + self._remember_ns, request.name))
            for waiter in name.waiters:
                del self._placed[waiter]
                told.append((waiter, name.result._replace(waited=True)))
            name.waiters.clear()
        return told + self._fill(now_ns)

    def drop(self, caller: Caller, now_ns: int) -> Told[Caller]:
        """Forget a request of which nothing more will be heard; return who is told what by that.

        Whoever waits for its result has no other choice than to work: the first of them runs a modprobe of its own.
        """
        self._queue.pop(caller, None)
        request = self._placed.pop(caller, None)
        if request is None:
            return []
        told: Told[Caller] = []
        name = self._names.get(request.name)
        if name is not None:
            name.waiters.pop(caller, None)
            if name.owner == caller:
                name.owner = next(iter(name.waiters), None)
                if name.owner is None:
                    del self._names[request.name]
                else:
                    del name.waiters[name.owner]
                    told.append((name.owner, Answer(Verdict.PROCEED, waited=True)))
        return told + self._fill(now_ns)

    def expire(self, now_ns: int) -> Told[Caller]:
        """Return those that have waited for a place for too long; each is told ETIME."""
        told: Told[Caller] = []
        while self._queue:
            caller, request = next(iter(self._queue.items()))
            if request.deadline_ns > now_ns:
                break
            del self._queue[caller]
            told.append((caller, Answer(Verdict.FAILED, "ETIME", waited=True)))
        return told

    def restore(self, name: str, caller: Caller, *, merge: bool = False) -> None:
        """Put back a request that was told to proceed before this object was made, even beyond the places."""
        if caller in self._placed:
            return
        self._queue.pop(caller, None)
        self._placed[caller] = _Request(name, merge)
        if merge:
            self._names.setdefault(name, _Name(caller))

    def _waits_for_result(self, caller: Caller, request: _Request) -> bool:
        name = self._names.get(request.name)
        return name is not None and caller in name.waiters

    def _place(self, caller: Caller, request: _Request, now_ns: int) -> Answer | None:
        """Give a request a place; return its answer if that follows at once."""
        if not request.is_merged:
            self._placed[caller] = request
            return self._proceed(request)
        self._forget(now_ns)
        name = self._names.get(request.name)
        if name is not None and name.result is not None:
            return name.result._replace(waited=request.has_waited)
        self._placed[caller] = request
        if name is None:
            self._names[request.name] = _Name(caller)
            return self._proceed(request)
        name.waiters[caller] = None
        return None

    @staticmethod
    def _proceed(request: _Request) -> Answer:
        return Answer(Verdict.PROCEED, waited=request.has_waited)

    def _fill(self, now_ns: int) -> Told[Caller]:
        """Give free places to those that wait for one; return whose answer follows at once."""
        told: Told[Caller] = []
        while self._queue and len(self._placed) < self._max_concurrent:
            caller, request = next(iter(self._queue.items()))
            del self._queue[caller]
            answer = self._place(caller, request, now_ns)
            if answer is not None:
                told.append((caller, answer))
        return told

    def _forget(self, now_ns: int) -> None:
        while self._known and self._known[0][0] <= now_ns:
            _, name = self._known.popleft()
            del self._names[name]
