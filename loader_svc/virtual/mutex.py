"""A mutex whose waiters sleep: who comes while it is free takes it, whoever may be on the way to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

W = TypeVar("W")


class SleepingMutex(Generic[W]):
    """A mutex as in kernel/locking/mutex.c, Linux 6.12.

    An unlock wakes the first waiter, and until that one runs, anybody who does run may take the mutex. A waiter that
    was woken in vain once spins, and gets it handed over by the next unlock. Who comes while its owner is on a CPU may
    spin for it first, in the order in which they come (``mutex_optimistic_spin``): each spinner keeps its CPU busy, and
    the first of them takes the mutex as soon as it finds it free.
    """

    __slots__ = (
        "_caught",
        "_handed",
        "_have_look",
        "_is_first_woken",
        "_must_hand",
        "_waiters",
        "_wake",
        "is_held",
        "owner",
        "spinners",
    )

    def __init__(self, wake: Callable[[W], None], have_look: Callable[[W], bool] = lambda spinner: False) -> None:
        """``wake`` lets a waiter run; it then calls ``retry``.

        ``have_look`` has a spinner that runs at this moment call ``spin`` at once; it returns whether it does run.
        """
        self.is_held = False
        """Whether it is held by somebody, or on its way to one it was handed to."""
        self.owner: W | None = None
        """Who holds it, or whom it was handed to."""
        self.spinners: deque[W] = deque()
        """Who spins for it."""
        self._wake = wake
        self._have_look = have_look
        self._caught: W | None = None
        """The spinner that saw it become free, and has it."""
        self._waiters: deque[W] = deque()
        self._is_first_woken = False
        self._must_hand = False
        self._handed: W | None = None

    @property
    def waiting(self) -> int:
        """How many sleep while they wait."""
        return len(self._waiters)

    def take(self, waiter: W) -> bool:
        """Take it, or be queued; return whether it is taken. Without ``hold``, it is free again at once."""
        if not self.is_held:
            return True
        self._waiters.append(waiter)
        return False

    def spin(self, waiter: W) -> bool:
        """Look once more while spinning for it; return whether it is taken, and then no longer spun for."""
        if self._caught is waiter:
            self._caught = self.owner = None
            self.is_held = False
        elif self.is_held or self.spinners[0] is not waiter:
            return False
        self.spinners.popleft()
        return True

    def retry(self, waiter: W) -> bool:
        """Try again after having been woken; return whether it is taken.

        Once it is, ``free`` is due, at once or when it is no longer held. Else the next ``free`` hands it over; the
        waiter spins meanwhile, or says that it sleeps.
        """
        if self._handed is waiter:
            self._handed = None
            self.is_held = False
            self.owner = None
        elif self.is_held:
            self._must_hand = True
            return False
        self._waiters.popleft()
        self._must_hand = self._is_first_woken = False
        return True

    def sleep_again(self) -> None:
        """Have the first waiter sleep, which tried in vain."""
        self._is_first_woken = False

    def hold(self, owner: W) -> None:
        """Keep it for some time, having taken it."""
        self.is_held = True
        self.owner = owner

    def free(self) -> None:
        """Let go of it, and wake the first waiter if that is not on its way."""
        self.is_held = False
        self.owner = None
        if self._waiters:
            first = self._waiters[0]
            if self._must_hand:
                self.is_held = True
                self.owner = self._handed = first
            if not self._is_first_woken:
                self._is_first_woken = True
                self._wake(first)
        if not self.is_held and self.spinners and self._have_look(self.spinners[0]):
            self.is_held = True
            self.owner = self._caught = self.spinners[0]
