"""udev's queue: what blocks what, against the walk along the whole list that udevd does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loader_svc.boot.device import Device
from loader_svc.boot.queue import Event, EventQueue


def _conflicts(one: str, other: str) -> bool:
    """Whether two devpaths are equal, or one is a directory above the other."""
    return one == other or one.startswith(other + "/") or other.startswith(one + "/")


def _blocks(earlier: Event, event: Event) -> bool:
    """The rule of ``event_is_blocked`` for one earlier event, written down as it is told."""
    mine, its = event.device, earlier.device
    if mine.device_id and mine.device_id == its.device_id:
        return True
    if mine.node and mine.node == its.node:
        return True
    pairs = [(mine.path, its.path)]
    if earlier.old_path:
        pairs.append((mine.path, earlier.old_path))
    if event.old_path:
        pairs.append((event.old_path, its.path))
    return any(_conflicts(one, other) for one, other in pairs)


class NaiveQueue:
    """The list and the walk."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.running: set[int] = set()

    def startable(self) -> list[int]:
        """Numbers of the events that could be started now, in order."""
        return [
            event.seqnum
            for at, event in enumerate(self.events)
            if event.seqnum not in self.running and not any(_blocks(earlier, event) for earlier in self.events[:at])
        ]


_names = st.sampled_from(["a", "b", "ab", "cpu0", "cpu1"])
_paths = st.lists(_names, min_size=1, max_size=4).map(lambda parts: "/devices/" + "/".join(parts))
_devices = st.builds(
    Device,
    path=_paths,
    device_id=st.sampled_from(["", "", "", "b8:0", "n2"]),
    node=st.sampled_from(["", "", "", "sda", "sdb"]),
)
_arrivals = st.tuples(_devices, st.one_of(st.just(""), st.just(""), _paths))
_moves = st.lists(st.one_of(_arrivals, st.just("start"), st.integers(0, 30)), max_size=60)


@given(_moves)
def test_the_same_events_can_be_started_as_by_walking_the_whole_list(moves: list[object]) -> None:
    queue, naive = EventQueue(), NaiveQueue()
    seqnum = 0
    for move in moves:
        if isinstance(move, tuple):
            seqnum += 1
            event = Event(seqnum, "add", *move)
            queue.add(event)
            naive.events.append(event)
        elif move == "start":
            expected = naive.startable()
            started = queue.next()
            assert (started.seqnum if started else None) == (expected[0] if expected else None)
            if started is not None:
                naive.running.add(started.seqnum)
        else:
            running = [event for event in naive.events if event.seqnum in naive.running]
            if running:
                assert isinstance(move, int)
                done = running[move % len(running)]
                naive.events.remove(done)
                queue.done(done)
        assert list(queue) == naive.events
        assert queue.has_ready == bool(naive.startable())


def test_siblings_do_not_wait_for_each_other_but_for_what_is_above_them() -> None:
    queue = EventQueue()
    paths = [
        "/devices/pci",
        "/devices/pci/a",
        "/devices/pci/b",
        "/devices/system/cpu/cpu1",
        "/devices/system/cpu/cpu10",
    ]
    events = [Event(number, "add", Device(path)) for number, path in enumerate(paths)]
    for event in events:
        queue.add(event)
    started = [queue.next(), queue.next(), queue.next(), queue.next()]
    assert started == [events[0], events[3], events[4], None]
    assert queue.blocked == 2
    queue.done(events[0])
    assert [queue.next(), queue.next()] == events[1:3]


def test_a_parent_waits_for_all_that_is_below_it() -> None:
    queue = EventQueue()
    children = [Event(number, "add", Device(f"/devices/p/{number}")) for number in range(3)]
    parent = Event(3, "change", Device("/devices/p"))
    for event in (*children, parent):
        queue.add(event)
    for child in children:
        assert queue.next() is child
    for child in (children[2], children[0], children[1]):
        assert queue.next() is None
        queue.done(child)
    assert queue.next() is parent
