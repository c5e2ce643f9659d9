"""What a simulated machine has counted of its calls, reckoned up only when somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loader_svc.steps import Finish
from loader_svc.virtual.files import Loadable
from loader_svc.virtual.route import Node
from modpressure.kernel.counters import COUNTER_NAMES, Counters, FailedModule
from modpressure.kernel.outcome import Outcome

if TYPE_CHECKING:
    from loader_svc.virtual.call import VirtualCall

MAX_NOTED: Final = 4096
"""Ways in which calls ended that are noted before they are reckoned up."""


class CallCounts:
    """Counts calls by the step in which they end: all that end in the same one count alike."""

    __slots__ = ("_counters", "_failed", "_noted", "calls")

    def __init__(self) -> None:
        self.calls = 0
        """How many calls were counted so far; the next one has this number."""
        self._noted: dict[Node, int] = {}
        """How many calls ended in which step, as far as that is not in the counters yet."""
        self._counters = Counters()
        self._failed: dict[str, FailedModule] = {}

    def add(self, call: VirtualCall) -> None:
        """Count a call that has come to its ``Finish``, and give it its number."""
        node = call._node
        call.number = self.calls
        self.calls += 1
        noted = self._noted
        noted[node] = noted.get(node, 0) + 1
        if len(noted) > MAX_NOTED:
            self._reckon()

    @property
    def counters(self) -> Counters:
        """What the kernel has counted so far."""
        self._reckon()
        return self._counters

    @property
    def failed_modules(self) -> list[FailedModule]:
        """The names that were duplicates at least once, newest first."""
        self._reckon()
        return list(reversed(self._failed.values()))

    def add_unload(self) -> None:
        """Count a module that was unloaded."""
        self._counters.unloads += 1

    def reset(self) -> None:
        """Begin to count anew. The names that were duplicates stay, and the numbers of calls go on."""
        self._reckon()
        self._counters = Counters()

    def _reckon(self) -> None:
        for node, count in self._noted.items():
            node.tag.count(count, self._counters, self._failed)
        self._noted.clear()


class EndingTag:
    """What a step that ends calls adds to the counters for each of them."""

    __slots__ = ("_counts", "_loadable", "_wasted_bytes", "ending", "is_reserved")

    def __init__(self, node: Node, loadable: Loadable) -> None:
        self._loadable = loadable
        step = node.step
        self.ending = step.ending if isinstance(step, Finish) else None
        self.is_reserved = self.ending is not None and self.ending.reserved
        self._counts: tuple[tuple[str, int], ...] | None = None
        self._wasted_bytes = 0

    def count(self, calls: int, counters: Counters, failed: dict[str, FailedModule]) -> None:
        """Count calls that ended in this step."""
        ending, loadable = self.ending, self._loadable
        assert ending is not None
        outcome = ending.outcome
        if self._counts is None:
            one = Counters()
            self._wasted_bytes = one.add_call(
                outcome,
                syscall=loadable.spec.syscall,
                duplicate=ending.duplicate,
                image_bytes=loadable.length_bytes if outcome is Outcome.KREAD else loadable.image_bytes,
                compressed_bytes=loadable.compressed_bytes,
                mod_bytes=loadable.layout_bytes,
                text_bytes=loadable.text_bytes,
            )
            self._counts = tuple((name, getattr(one, name)) for name in COUNTER_NAMES if getattr(one, name))
        for name, each in self._counts:
            setattr(counters, name, getattr(counters, name) + calls * each)
        if ending.duplicate:
            module = failed.get(ending.module)
            if module is None:
                module = failed[ending.module] = FailedModule(ending.module)
            if outcome is Outcome.BECOMING:
                module.becoming_count += calls
            elif outcome is Outcome.LOAD:
                module.load_count += calls
            module.wasted_bytes += calls * self._wasted_bytes
