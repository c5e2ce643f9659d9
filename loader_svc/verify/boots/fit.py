"""Finding what no trace shows by itself: what udev's own work takes, and what steps that take long would take alone.

How boots start follows from the first. udevd forks a worker for each event that finds none idle, until the first
``udevadm trigger`` is through; then there is nothing to be handed out until the second one has started. The longer a
worker takes to start and to go over the rules, the more of them are forked, and the later the first calls are made.

What takes long, a link or an init function, never had a CPU to itself in any boot. For how long it keeps one is found
by having boots simulated with a share of the least that was seen, until it takes as long among all others as recorded.
Only boots with two CPUs count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Final, NamedTuple, Self

from loader_svc.boot.simulate import Boot
from loader_svc.boot.spec import BootSpec
from loader_svc.virtual.call import VirtualCall
from loader_svc.virtual.costs import Costs
from loader_svc.virtual.guest import GuestMachine
from modpressure.errors import BadRequest

ROUNDS: Final = 9
STEP: Final = 0.5
"""The power to which a figure is corrected by what it is off: less than 1, since each is about more than one cost."""

LEAST_NS: Final = 10_000
MOST_NS: Final = 2_000_000_000

FIRST: Final = {"worker_ns": 8_000_000, "rules_ns": 1_500_000, "exec_ns": 230_000_000, "device_rules_ns": 4_000_000}
"""What the search begins with, each next to the figure of the same place in Start that tells most about it."""

FIRST_SHARE: Final = 0.35
LEAST_SHARE: Final = 0.02
"""Of the least that a step was ever seen to take: what the search begins with, and what it stays above."""


class Start(NamedTuple):
    """How a boot starts, in ns but for the number of workers."""

    fork_ns: float
    """Between two forks of workers, the median."""
    before: float
    """How many workers were forked before the first call began."""
    first_ns: float
    """From the first fork of a worker until the first call began."""
    begun_ns: float
    """From the first fork of a worker until a quarter of all calls had begun."""

    @classmethod
    def of(cls, forks_ns: Sequence[int], calls_ns: Iterable[int]) -> Self:
        """Return it for a boot with these forks of workers and beginnings of calls. BadRequest for too few forks."""
        begun = sorted(calls_ns)
        if len(forks_ns) < 3 or not begun:
            raise BadRequest("a boot with two CPUs has fewer than three forks of workers, or no calls, in its trace")
        pauses = [later - sooner for sooner, later in pairwise(forks_ns)]
        forked_ns = forks_ns[0]
        return cls(
            median(pauses),
            sum(ns <= begun[0] for ns in forks_ns),
            begun[0] - forked_ns,
            begun[len(begun) // 4] - forked_ns,
        )

    @classmethod
    def middle(cls, starts: Iterable[Self]) -> Self:
        """Return the median of several, each figure by itself: the host was busy with other things in some boots."""
        return cls(*(median(values) for values in zip(*starts, strict=True)))

    @classmethod
    def mean(cls, starts: Iterable[Self]) -> Self:
        """Return the mean of several."""
        return cls(*(fmean(values) for values in zip(*starts, strict=True)))


class Long(NamedTuple):
    """A step with one module that takes long, as recorded: the least and the median of all boots, in ns."""

    least_ns: int
    median_ns: float


Steps = Mapping[tuple[str, str], Long]
"""Such steps by what they are, ``link`` or ``init``, and the module."""


class Came(NamedTuple):
    """What boots came to that were simulated with costs to be tried."""

    start: Start
    took_ns: Mapping[tuple[str, str], float]
    """The median of what each step took."""


def fitted(costs: Costs, steps: Steps, specs: Sequence[BootSpec], start: Start) -> Costs:
    """Return the costs with which boots start as recorded ones do, and steps take as long in them.

    ``specs`` are the boots that were recorded.
    """

    def measured(tried: Costs) -> Came:
        starts, took = [], defaultdict[tuple[str, str], list[int]](list)
        for seed, spec in enumerate(specs, 1):
            starts.append(_simulated(replace(spec, costs=_on_machine(spec, tried)), seed, took))
        return Came(Start.mean(starts), {step: median(each) for step, each in took.items()})

    return searched(measured, costs, steps, start)


def searched(measured: Callable[[Costs], Came], costs: Costs, steps: Steps, start: Start) -> Costs:
    """Return the costs for which ``measured`` comes nearest to ``start``, after as much of a search for the steps."""
    values: dict[str, Any] = dict(FIRST)
    shares = dict.fromkeys(steps, FIRST_SHARE)
    best, least = costs, float("inf")
    for done in range(ROUNDS):
        tried = _applied(costs, values, {step: round(steps[step].least_ns * share) for step, share in shares.items()})
        came = measured(tried)
        off = sum(abs(is_now / wanted - 1) for is_now, wanted in zip(came.start, start, strict=True))
        if off < least and done >= ROUNDS // 2:
            best, least = tried, off
        for name, is_now, wanted in zip(FIRST, came.start, start, strict=True):
            values[name] = round(min(max(values[name] * (wanted / is_now) ** STEP, LEAST_NS), MOST_NS))
        for step, took_ns in came.took_ns.items():
            if step in shares and took_ns:
                share = shares[step] * (steps[step].median_ns / took_ns) ** STEP
                shares[step] = min(max(share, LEAST_SHARE), 1.0)
    return best


def _applied(costs: Costs, values: Mapping[str, Any], steps_ns: Mapping[tuple[str, str], int]) -> Costs:
    link, init = dict(costs.link), dict(costs.init)
    for (step, module), ns in steps_ns.items():
        (link if step == "link" else init)[module] = ns
    source = dict.fromkeys(values, "so that simulated boots with 2 CPUs start as the recorded ones do")
    return replace(costs, **values, link=link, init=init, source={**costs.source, **source})


def _on_machine(spec: BootSpec, tried: Costs) -> Costs:
    """Return costs that were tried with what depends on a machine's number of CPUs."""
    assert spec.costs is not None
    return replace(tried, slice_ns=spec.costs.slice_ns)


class _Watched(GuestMachine):
    """A guest that notes what links and init functions take."""

    def __init__(self, took: defaultdict[tuple[str, str], list[int]], **options: Any) -> None:
        super().__init__(**options)
        self._took = took
        self._since_ns: dict[VirtualCall, int] = {}

    def _note(self, step: str, call: VirtualCall) -> None:
        now_ns = self.clock.now_ns
        begun_ns = self._since_ns.pop(call, None)
        if begun_ns is not None:
            self._took[step, call.loadable.module].append(now_ns - begun_ns)
        if step != "init":
            self._since_ns[call] = now_ns

    def _link(self, call: VirtualCall) -> Any:
        self._since_ns[call] = self.clock.now_ns
        return super()._link(call)

    def _init(self, call: VirtualCall) -> Any:
        self._note("link", call)
        return super()._init(call)

    def _begin_end(self, call: VirtualCall) -> Any:
        self._note("init", call)
        return super()._begin_end(call)


def _simulated(spec: BootSpec, seed: int, took: defaultdict[tuple[str, str], list[int]]) -> Start:
    begun: list[int] = []

    def record(call: VirtualCall) -> None:
        begun.append(call.begun_ns)

    def guest(**options: Any) -> GuestMachine:
        return _Watched(took, **options)

    boot = Boot(spec, seed, record, guest=guest)
    boot.run()
    return Start.of(boot.udev.forks_ns, begun)
