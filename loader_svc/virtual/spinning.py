"""Calls that wait for a mutex as the kernel has them wait: they spin while its owner is on a CPU, and sleep otherwise.

So ``mutex_spin_on_owner`` and ``__mutex_lock_common`` (kernel/locking/mutex.c, Linux 6.12). Who spins keeps a CPU,
which matters where CPUs have a host whose cores they share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from loader_svc.virtual.call import VirtualCall
from loader_svc.virtual.machine import _ASLEEP, VirtualMachine
from loader_svc.virtual.mutex import SleepingMutex

SPIN_NS: Final = 200_000
"""How often who spins for a mutex looks at it, and whether its slice is over. Only the first who spins looks at the
mutex; the others wait to be the first (``osq_lock``, kernel/locking/osq_lock.c)."""


class SpinningMachine(VirtualMachine):
    """A machine whose calls spin for mutexes, and sleep for them."""

    def __init__(self, **options: Any) -> None:
        """``options`` are those of VirtualMachine."""
        super().__init__(**options)
        self._asleep: set[VirtualCall] = set()
        """Calls that sleep for a mutex."""

    def _mutex(self) -> SleepingMutex[VirtualCall]:
        return SleepingMutex(self._let_run, self._has_core)

    def _let_run(self, call: VirtualCall) -> None:
        assert call._task is not None
        self.cpus.enter(call._task, self.costs.wake_latency_ns)

    def _has_core(self, call: VirtualCall) -> bool:
        return call._task is not None and self.cpus.runs(call._task)

    def _take(self, mutex: SleepingMutex[VirtualCall], call: VirtualCall, then: Callable[[VirtualCall], Any]) -> Any:
        """Take a mutex and go on: at once, or spin for it while its owner runs, or else sleep."""
        if not mutex.is_held:
            return then(call)
        if not self._runs(mutex):
            return self._sleep_for(mutex, then, call)
        mutex.spinners.append(call)
        return self._keep_spinning(mutex, self.clock.now_ns, then, call)

    def _runs(self, mutex: SleepingMutex[VirtualCall]) -> bool:
        """Whether the owner of a mutex is on a CPU, as far as the guest can tell."""
        return mutex.owner not in self._asleep

    def _sleep_for(
        self, mutex: SleepingMutex[VirtualCall], then: Callable[[VirtualCall], Any], call: VirtualCall
    ) -> Any:
        if mutex.take(call):
            return then(call)
        self._asleep.add(call)
        call._then = partial(self._retry, mutex, then)
        return _ASLEEP

    def _keep_spinning(
        self,
        mutex: SleepingMutex[VirtualCall],
        begun_ns: int,
        then: Callable[[VirtualCall], Any],
        call: VirtualCall,
    ) -> Any:
        is_looking = mutex.spinners[0] is call or self.cpus.queued
        call._owed_ns += SPIN_NS if is_looking else self.costs.slice_ns
        return self._once_paid(call, partial(self._look_up, mutex, begun_ns, then))

    def _look_up(
        self,
        mutex: SleepingMutex[VirtualCall],
        begun_ns: int,
        then: Callable[[VirtualCall], Any],
        call: VirtualCall,
    ) -> Any:
        """See, while spinning, whether a mutex is free by now, or whether to sleep for it."""
        is_first = mutex.spinners[0] is call
        if mutex.spin(call):
            self._have_first_look(mutex)
            return _use(mutex, then, call)
        if self._has_to_go(begun_ns) or (is_first and mutex.is_held and not self._runs(mutex)):
            mutex.spinners.remove(call)
            if is_first:
                self._have_first_look(mutex)
            return self._sleep_for(mutex, then, call)
        return self._keep_spinning(mutex, begun_ns, then, call)

    def _have_first_look(self, mutex: SleepingMutex[VirtualCall]) -> None:
        """Have who is now the first to spin for a mutex look at it."""
        if mutex.spinners:
            first = mutex.spinners[0]
            assert first._task is not None
            self.cpus.cut_short(first._task)

    def _has_to_go(self, begun_ns: int) -> bool:
        """Whether who spins has had its slice, and others wait for a CPU."""
        return bool(self.cpus.queued) and self.clock.now_ns - begun_ns >= self.costs.slice_ns

    def _retry(self, mutex: SleepingMutex[VirtualCall], then: Callable[[VirtualCall], Any], call: VirtualCall) -> Any:
        """Go on after having slept for a mutex: the first who waits spins, too, and has it handed over."""
        self._asleep.discard(call)
        return self._retry_awake(mutex, self.clock.now_ns, then, call)

    def _retry_awake(
        self,
        mutex: SleepingMutex[VirtualCall],
        begun_ns: int,
        then: Callable[[VirtualCall], Any],
        call: VirtualCall,
    ) -> Any:
        if mutex.retry(call):
            return _use(mutex, then, call)
        if self._has_to_go(begun_ns) or not self._runs(mutex):
            self._asleep.add(call)
            mutex.sleep_again()
            call._then = partial(self._retry, mutex, then)
            return _ASLEEP
        call._owed_ns += SPIN_NS
        return self._once_paid(call, partial(self._retry_awake, mutex, begun_ns, then))


def _use(mutex: SleepingMutex[VirtualCall], then: Callable[[VirtualCall], Any], call: VirtualCall) -> Any:
    """Go on with a mutex that was waited for; let go of it if that was only for a look."""
    answer = then(call)
    if not mutex.is_held:
        # Waiters that tried in vain meanwhile count on its end.
        mutex.free()
    return answer
