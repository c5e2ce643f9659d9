"""Locks that all CPUs of a simulated machine share: who comes while one is held waits for its turn."""

from __future__ import annotations


class Lock:
    """A lock that is taken first come, first served, and held for a time that is known when it is taken.

    What is remembered is only when it will be free: all that holders and waiters do in between is take time. Waiters
    keep their CPU: the kernel's spinlocks spin, and its mutexes do so as long as their owner runs.
    """

    __slots__ = ("free_at_ns", "waited_ns")

    def __init__(self) -> None:
        self.free_at_ns = 0
        """When all that have come for it by now will be done."""
        self.waited_ns = 0
        """How long all of them waited for it."""

    def take(self, now_ns: int, hold_ns: int) -> int:
        """Take it for some ns; return how long that has to wait."""
        free_at_ns = self.free_at_ns
        if free_at_ns <= now_ns:
            self.free_at_ns = now_ns + hold_ns
            return 0
        self.free_at_ns = free_at_ns + hold_ns
        wait_ns = free_at_ns - now_ns
        self.waited_ns += wait_ns
        return wait_ns
