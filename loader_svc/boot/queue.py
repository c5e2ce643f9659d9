"""udevd's queue: which events wait, what each waits for, and which one is to be started next.

The rule is that of ``event_is_blocked`` (src/udev/udevd.c, systemd 252): an event waits while an earlier one in the
list, queued or running, has the same device id or node, or a devpath (or, after a rename, an old one) that is equal to
its own, above it or below it. There, each turn of the loop walks the list; here an index by path finds the same
blockers, since the list grows to tens of thousands on a machine with thousands of CPUs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from loader_svc.boot.device import Device


class Event:
    """A uevent, from its arrival until its worker has done with it."""

    __slots__ = ("action", "blocker", "device", "is_running", "old_path", "seqnum", "waiters")

    def __init__(self, seqnum: int, action: str, device: Device, old_path: str = "") -> None:
        self.seqnum = seqnum
        self.action = action
        self.device = device
        self.old_path = old_path
        """DEVPATH_OLD of a rename; empty for none."""
        self.blocker: Event | None = None
        """The event that it was last found to wait for."""
        self.waiters: list[Event] = []
        """The events that remember this one as their blocker."""
        self.is_running = False


_Below = dict[str, dict[Event, None]]


class EventQueue:
    """The events that are queued or running, in order of their numbers."""

    def __init__(self) -> None:
        self._events: dict[Event, None] = {}
        self._ready: list[tuple[int, Event]] = []
        self._at: _Below = {}
        self._below: _Below = {}
        self._old_at: _Below = {}
        self._old_below: _Below = {}
        self._by_id: _Below = {}
        self._by_node: _Below = {}
        self.blocked = 0
        """How many events had to wait for another one at some time."""

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events)

    def add(self, event: Event) -> None:
        """Append an event; its number is higher than that of any other."""
        self._look(event)
        if event.blocker is not None:
            self.blocked += 1
        self._events[event] = None
        self._enter(event)

    def next(self) -> Event | None:
        """Return the first event that can be started, and take it as running; None if there is none now."""
        if not self._ready:
            return None
        _, event = heapq.heappop(self._ready)
        event.is_running = True
        return event

    @property
    def has_ready(self) -> bool:
        """Whether ``next`` would return one."""
        return bool(self._ready)

    def done(self, event: Event) -> None:
        """Take an event out of the list, and let those go on that waited for it."""
        del self._events[event]
        self._leave(event)
        waiters, event.waiters = event.waiters, []
        for waiter in waiters:
            self._look(waiter)

    def _look(self, event: Event) -> None:
        """Find out what an event waits for, if anything."""
        event.blocker = blocker = self._last_conflict(event)
        if blocker is None:
            heapq.heappush(self._ready, (event.seqnum, event))
        else:
            blocker.waiters.append(event)

    def _last_conflict(self, event: Event) -> Event | None:
        """Return the last event before this one that it has to wait for; the others will mostly be gone by then."""
        device = event.device
        found: Event | None = None
        seqnum = -1
        tables = []
        if device.device_id:
            tables.append(self._by_id.get(device.device_id))
        if device.node:
            tables.append(self._by_node.get(device.node))
        path = device.path
        tables += (self._below.get(path), self._old_below.get(path))
        for above in _above(path):
            tables += (self._at.get(above), self._old_at.get(above))
        if event.old_path:
            tables += (self._below.get(event.old_path), *(self._at.get(above) for above in _above(event.old_path)))
        for table in tables:
            if table:
                for other in reversed(table):
                    if other.seqnum < event.seqnum:
                        if other.seqnum > seqnum:
                            found, seqnum = other, other.seqnum
                        break
        return found

    def _enter(self, event: Event) -> None:
        device = event.device
        if device.device_id:
            self._by_id.setdefault(device.device_id, {})[event] = None
        if device.node:
            self._by_node.setdefault(device.node, {})[event] = None
        _enter_path(self._at, self._below, device.path, event)
        if event.old_path:
            _enter_path(self._old_at, self._old_below, event.old_path, event)

    def _leave(self, event: Event) -> None:
        device = event.device
        if device.device_id:
            _drop(self._by_id, device.device_id, event)
        if device.node:
            _drop(self._by_node, device.node, event)
        _leave_path(self._at, self._below, device.path, event)
        if event.old_path:
            _leave_path(self._old_at, self._old_below, event.old_path, event)


def _above(path: str) -> Iterator[str]:
    """Yield the directories above a path, nearest first, without those that are everybody's."""
    at = path.rfind("/")
    while at > 0:
        path = path[:at]
        yield path
        at = path.rfind("/")


def _enter_path(at: _Below, below: _Below, path: str, event: Event) -> None:
    at.setdefault(path, {})[event] = None
    below.setdefault(path, {})[event] = None
    for above in _above(path):
        below.setdefault(above, {})[event] = None


def _leave_path(at: _Below, below: _Below, path: str, event: Event) -> None:
    _drop(at, path, event)
    _drop(below, path, event)
    for above in _above(path):
        _drop(below, above, event)


def _drop(table: _Below, key: str, event: Event) -> None:
    entries = table[key]
    del entries[event]
    if not entries:
        del table[key]
