"""Calls that wait for a mutex as the kernel has them wait: they spin while its owner is on a CPU, and sleep otherwise.

So ``mutex_spin_on_owner`` and ``__mutex_lock_common`` (kernel/locking/mutex.c, Linux 6.12). Who spins keeps a CPU,
which matters where CPUs have a host whose cores they share.
"""

from __future__ import annotations

from collections.abc import Callable
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
        return SleepingMutex(self._let_run, self._have_look)

    def _pause(self) -> None:
        """Be told that a call spins, on behalf of the task that runs now."""

    def _let_run(self, call: VirtualCall) -> None:
        assert call._task is not None
        self.cpus.enter(call._task, self.costs.wake_latency_ns)

    def _have_look(self, call: VirtualCall) -> bool:
        """Have a call that spins look at its mutex at once if it runs at this moment; return whether it does."""
        if call._task is None or not self.cpus.runs(call._task):
            return False
        self.cpus.cut_short(call._task)
        return True

    def _take(self, mutex: SleepingMutex[VirtualCall], call: VirtualCall, then: Callable[[VirtualCall], Any]) -> Any:
        """Take a mutex and go on: at once, or as soon as it can be had."""
        return _Wait(self, mutex, then).begin(call) if mutex.is_held else then(call)


class _Wait:
    """What a call that waits for a mutex is at: it spins while the owner runs, and sleeps otherwise."""

    __slots__ = ("_begun_ns", "_machine", "_mutex", "_then")

    def __init__(
        self, machine: SpinningMachine, mutex: SleepingMutex[VirtualCall], then: Callable[[VirtualCall], Any]
    ) -> None:
        """``then`` is what the call does with the mutex."""
        self._machine = machine
        self._mutex = mutex
        self._then = then
        self._begun_ns = machine.clock.now_ns
        """When it began to spin, the last time."""

    def begin(self, call: VirtualCall) -> Any:
        """Wait for a mutex that is held."""
        if not self._does_owner_run():
            return self._queue(call)
        self._mutex.spinners.append(call)
        return self._spin(call)

    def _does_owner_run(self) -> bool:
        """Whether the owner of the mutex is on a CPU, as far as the guest can tell."""
        return self._mutex.owner not in self._machine._asleep

    def _has_to_go(self) -> bool:
        """Whether it has spun for its slice, and others wait for a CPU."""
        machine = self._machine
        return bool(machine.cpus.queued) and machine.clock.now_ns - self._begun_ns >= machine.costs.slice_ns

    def _use(self, call: VirtualCall) -> Any:
        """Go on with the mutex; let go of it if that was only for a look."""
        answer = self._then(call)
        if not self._mutex.is_held:
            # Waiters that tried in vain meanwhile count on its end.
            self._mutex.free()
        return answer

    # --- spinning, before it has ever slept ---

    def _spin(self, call: VirtualCall) -> Any:
        machine = self._machine
        machine._pause()
        is_looking = self._mutex.spinners[0] is call or machine.cpus.queued
        call._owed_ns += SPIN_NS if is_looking else machine.costs.slice_ns
        return machine._once_paid(call, self._look_up)

    def _look_up(self, call: VirtualCall) -> Any:
        """See, while spinning, whether the mutex is free by now, or whether to sleep for it."""
        mutex = self._mutex
        is_first = mutex.spinners[0] is call
        if mutex.spin(call):
            self._have_first_look()
            return self._use(call)
        if self._has_to_go() or (is_first and mutex.is_held and not self._does_owner_run()):
            mutex.spinners.remove(call)
            if is_first:
                self._have_first_look()
            return self._queue(call)
        return self._spin(call)

    def _have_first_look(self) -> None:
        """Have who is now the first to spin for the mutex look at it."""
        if self._mutex.spinners:
            first = self._mutex.spinners[0]
            assert first._task is not None
            self._machine.cpus.cut_short(first._task)

    # --- sleeping, and what spinning the first who waits does when it was woken in vain ---

    def _queue(self, call: VirtualCall) -> Any:
        """Take the mutex if it is free by now; else wait in its queue, asleep."""
        return self._then(call) if self._mutex.take(call) else self._sleep(call)

    def _sleep(self, call: VirtualCall) -> Any:
        self._machine._asleep.add(call)
        call._then = self._wake
        return _ASLEEP

    def _wake(self, call: VirtualCall) -> Any:
        self._machine._asleep.discard(call)
        self._begun_ns = self._machine.clock.now_ns
        return self._retry(call)

    def _retry(self, call: VirtualCall) -> Any:
        """Try again after having slept: the first who waits spins, too, and has the mutex handed over."""
        if self._mutex.retry(call):
            return self._use(call)
        if self._has_to_go() or not self._does_owner_run():
            self._mutex.sleep_again()
            return self._sleep(call)
        self._machine._pause()
        call._owed_ns += SPIN_NS
        return self._machine._once_paid(call, self._retry)
