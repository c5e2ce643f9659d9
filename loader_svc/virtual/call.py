"""One call on a simulated machine, from its beginning to its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loader_svc.plan import Plan
from loader_svc.steps import CallSpec, Ending
from loader_svc.virtual.cpus import Task
from loader_svc.virtual.files import Loadable, VirtualFile
from loader_svc.virtual.route import Node
from modpressure.kernel.outcome import Outcome


class VirtualCall:
    """One finit_module or init_module of a worker.

    What a machine itself notes of it has names with an underscore. Sizes are bytes, times ns of the machine's clock.
    """

    __slots__ = (
        "_answer",
        "_earlier_peak_bytes",
        "_given_up",
        "_is_signalled",
        "_node",
        "_owed_ns",
        "_slept_ns",
        "_task",
        "_then",
        "_wait",
        "_waits",
        "begun_ns",
        "ended_ns",
        "ending",
        "file",
        "loadable",
        "number",
        "on_end",
        "restarts",
        "spec",
        "wait_ns",
        "worker",
    )

    begun_ns: int
    loadable: Loadable
    """What it loads, from its beginning on."""

    _node: Node
    """Where it is on its way through the pipeline, from its beginning on."""

    def __init__(
        self,
        spec: CallSpec,
        file: VirtualFile,
        *,
        restarts: bool = False,
        worker: str = "",
        on_end: Callable[[VirtualCall], None] | None = None,
    ) -> None:
        """``restarts`` says whether a signal has the call begin anew (SA_RESTART) where the kernel leaves that open.

        A ``spec`` may be that of any number of calls; it is best made once for all that are alike.
        """
        self.spec = spec
        self.file = file
        self.restarts = restarts
        self.worker = worker
        """Who makes it, for the record."""
        self.on_end = on_end
        self.ended_ns = 0
        self.ending: Ending | None = None
        """What became of it; None until then."""
        self.number = 0
        """How many calls were counted before it, once it was counted itself."""
        self.wait_ns = 0
        """How long it waited for other calls."""
        self._task: Task | None = None
        """What is entered on the CPUs when it has waited."""
        self._then: Callable[[VirtualCall], Any] | None = None
        """How it goes on once the time that it owes has passed."""
        self._answer: Any = None
        self._owed_ns = 0
        self._wait = ""
        """What it waits for: ``gate``, ``list``, ``owner``, ``init``, ``disk``, or nothing."""
        self._waits = 0
        self._slept_ns = 0
        self._is_signalled = False
        self._given_up: frozenset[str] = frozenset()
        self._earlier_peak_bytes = 0
        """The most that it held before it began anew."""

    @property
    def path(self) -> str:
        """Path of its file."""
        return self.file.path

    @property
    def peak_held_bytes(self) -> int:
        """Most memory that it held at once."""
        return max(self._node.held.peak_bytes, self._earlier_peak_bytes)

    @property
    def plan(self) -> Plan | None:
        """What becomes of its file; None for a call that ended before it read that."""
        ending = self.ending
        if ending is not None and ending.outcome in (Outcome.SHARED, Outcome.REFUSED):
            return None
        return self.loadable.plan

    @property
    def waited(self) -> bool:
        """Whether it waited for another call: in the gate, for the name, or for a module that it needs."""
        return self._waits > 0


Record = Callable[[VirtualCall], None]
"""Is told each call that has ended."""
