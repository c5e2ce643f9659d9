"""The gate of Linux 6.5: calls in flight on one inode share the first one's result.

The rules are those of ``idempotent()`` and ``idempotent_complete()`` (kernel/module/main.c, Linux 6.12): the first
caller with an inode works; later ones sleep, having allocated nothing, and are given its return value; whoever comes
after it has ended works for itself.
"""

from __future__ import annotations

from typing import Generic

from modpressure.kernel.modules_list import PROCEED, Answer, Caller, Verdict


class Gate(Generic[Caller]):
    """Who works on an inode, and who waits for the result."""

    def __init__(self) -> None:
        self._holders: dict[str, Caller] = {}
        self.held: dict[Caller, str] = {}
        """Who works, and on which inode; to be read only."""

        self._waiters: dict[str, dict[Caller, None]] = {}
        self._waits: dict[Caller, str] = {}

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return len(self._waits)

    def enter(self, inode: str, caller: Caller) -> Answer | None:
        """Go on as the one who works, or None: the result comes when that one leaves.

        Asking again with the same caller gives the same answer, so that a lost answer can be asked for again. Who works
        on an inode must not enter with another one.
        """
        assert self.held.get(caller, inode) == inode, f"{caller} works on {self.held[caller]}"
        if self._waits.get(caller, inode) != inode:
            # A caller waits for one thing at a time; one that asks for another has given the first up.
            self.interrupt(caller)
        holder = self._holders.setdefault(inode, caller)
        if holder == caller:
            self.held[caller] = inode
            return PROCEED
        self._waiters.setdefault(inode, {})[caller] = None
        self._waits[caller] = inode
        return None

    def leave(self, caller: Caller, errno: str) -> list[tuple[Caller, Answer]]:
        """End the work of ``caller`` with ``errno`` (empty for 0); return who waited and what each is told.

        Nothing happens if the caller holds no gate, so every call may leave.
        """
        inode = self.held.pop(caller, None)
        if inode is None:
            return []
        del self._holders[inode]
        woken = list(self._waiters.pop(inode, ()))
        for waiter in woken:
            del self._waits[waiter]
        answer = Answer(Verdict.SHARED, errno, waited=True)
        return [(waiter, answer) for waiter in woken]

    def interrupt(self, caller: Caller) -> bool:
        """End the wait of ``caller``; return whether it waited. It is for the caller to tell it EINTR."""
        inode = self._waits.pop(caller, None)
        if inode is None:
            return False
        waiters = self._waiters[inode]
        del waiters[caller]
        if not waiters:
            del self._waiters[inode]
        return True
