"""The one queue of all who wait for a name in the modules list (``module_wq``, kernel/module/main.c, Linux 6.12)."""

from __future__ import annotations

from collections.abc import Callable

from loader_svc.virtual.call import VirtualCall
from loader_svc.virtual.clock import Clock
from loader_svc.virtual.costs import Costs
from loader_svc.virtual.cpus import Cpus


class WaitQueue:
    """Calls that wait, whichever name it is for, in the order in which they came; woken, each looks for itself."""

    __slots__ = ("_calls", "_cpus", "_latency_ns", "_wake_ns")

    def __init__(self, cpus: Cpus, costs: Costs) -> None:
        self._cpus = cpus
        self._wake_ns = costs.wake_ns
        self._latency_ns = costs.wake_latency_ns
        self._calls: dict[VirtualCall, None] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: VirtualCall) -> None:
        """Have a call wait, as the last one."""
        self._calls[call] = None

    def discard(self, call: VirtualCall) -> bool:
        """Have a call wait no longer; return whether it did, and was not woken yet."""
        return self._calls.pop(call, self) is None

    def wake(self) -> int:
        """Wake all, one after the other; return how long that takes, in ns."""
        calls, self._calls = self._calls, {}
        delay_ns, wake_ns = self._latency_ns, self._wake_ns
        for call in calls:
            delay_ns += wake_ns
            assert call._task is not None
            self._cpus.enter(call._task, delay_ns)
        return wake_ns * len(calls)


class ForeseeingQueue(WaitQueue):
    """The same queue with fewer events: what a call that has an idle CPU will find when it runs is looked up at once.

    Nothing that happens until then changes what it finds. So who finds what it waited for goes on at once, as if it had
    been woken, and who would sleep again is not woken at all.
    """

    __slots__ = ("_advance", "_clock", "_look", "_look_in_vain")

    def __init__(
        self,
        cpus: Cpus,
        costs: Costs,
        clock: Clock,
        *,
        look: Callable[[str], object],
        look_in_vain: Callable[[int], object],
        advance: Callable[[VirtualCall], int | None],
    ) -> None:
        """``look`` says what a call finds that waited for a name, None if it has to wait on.

        ``look_in_vain`` has as many calls look that have to. ``advance`` has one go on, its look included, and returns
        what that takes, in ns.
        """
        super().__init__(cpus, costs)
        self._clock = clock
        self._look = look
        self._look_in_vain = look_in_vain
        self._advance = advance

    def wake(self) -> int:
        """Wake all, one after the other; return how long that takes, in ns."""
        calls = self._calls
        if not calls:
            return 0
        again: dict[VirtualCall, None] = {}
        self._calls = again
        look, cpus, wake_ns = self._look, self._cpus, self._wake_ns
        idle = cpus.idle
        delay_ns = self._latency_ns
        for call in calls:
            delay_ns += wake_ns
            if not idle:
                assert call._task is not None
                cpus.enter(call._task, delay_ns)
            elif look(call.loadable.module) is None:
                again[call] = None
            else:
                idle -= 1
                self._let_go(call, delay_ns)
        if again:
            # Each of these takes a CPU that is idle, looks, and sleeps again: all that others notice is the mutex.
            self._look_in_vain(len(again))
            names = dict.fromkeys([call.loadable.module for call in again])
            self._clock.send(self._clock.now_ns + delay_ns, self._look_for_all, names)
        return wake_ns * len(calls)

    def _let_go(self, call: VirtualCall, delay_ns: int) -> None:
        """Have a call go on, on an idle CPU, that finds what it waited for."""
        # It waits until it runs.
        call._slept_ns -= delay_ns
        spent_ns = self._advance(call)
        assert spent_ns, "a look takes time"
        assert call._task is not None
        self._cpus.occupy(call._task, delay_ns + spent_ns)

    def _look_for_all(self, names: dict[str, None]) -> None:
        """Look once more for those who were woken for nothing: what they wait for may have come meanwhile."""
        for name in names:
            if self._look(name) is None:
                continue
            for call in [call for call in self._calls if call.loadable.module == name]:
                if not self._cpus.idle:
                    return
                del self._calls[call]
                self._let_go(call, 0)
