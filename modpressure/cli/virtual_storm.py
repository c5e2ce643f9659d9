"""``modpressure storm --virtual``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from modpressure.cli.output import print_json, print_table, print_text
from modpressure.cli.session import Session
from modpressure.kernel.counters import COUNTER_NAMES
from modpressure.kernel.policy import DEFAULT_POLICY, policy_named
from modpressure.units import format_bytes

if TYPE_CHECKING:
    from loader_svc.trees import ModuleTree
    from loader_svc.virtual.storm import VirtualStorm, VirtualStormResult

DEFAULT_CPUS: Final = 8
DEFAULT_REPEAT: Final = 5


async def run_virtual_storm(
    session: Session,
    modules: Sequence[str],
    given: Mapping[str, Any],
    *,
    policy: str | None,
    kmod: str | None,
    **parameters: Any,
) -> int:
    """Simulate a storm over some seeds, print what it came to, and return the exit code.

    ``given`` has what only a storm in virtual time can be told. BadRequest, NotFound, TreeError; Unavailable where its
    calls are to be recorded and stats_svc does not answer.
    """
    from loader_svc.catalogue import catalogue_tree
    from loader_svc.trees import open_tree
    from loader_svc.virtual.costs import default_costs, read_costs
    from loader_svc.virtual.storm import VirtualStorm, simulate_storm

    tree = open_tree(catalogue_tree() if given["tree"] is None else given["tree"])
    storm = VirtualStorm(
        modules=tuple(tree.module(name).name for name in modules),
        cpus=given["cpus"] or DEFAULT_CPUS,
        policy=policy_named(policy) if policy else DEFAULT_POLICY,
        kmod=int(kmod) if kmod else 30,
        costs=default_costs() if given["costs"] is None else read_costs(given["costs"]),
        **parameters,
    )
    first = given["seed"] or 0
    repeat = given["repeat"] or DEFAULT_REPEAT
    results: list[VirtualStormResult] = []
    if given["record"]:
        results.append(await _recorded(session, storm, tree, first))
    results += [simulate_storm(storm, tree, first + number) for number in range(len(results), repeat)]
    if session.json:
        print_json(_document(storm, results))
    else:
        _print(storm, results)
    return 0


async def _recorded(session: Session, storm: VirtualStorm, tree: ModuleTree, seed: int) -> VirtualStormResult:
    """Simulate a storm whose calls stats_svc counts."""
    from loader_svc.virtual.machine import VirtualMachine
    from loader_svc.virtual.storm import StormRun
    from loader_svc.virtual.stream import Messages, Send, StatsTarget, streamed
    from modpressure import log

    # What goes wrong is said in a sentence; that the stream stands is no news.
    log.configure("error", "console")
    settings = session.settings
    messages = Messages(storm.policy)

    def simulate(send: Send) -> tuple[VirtualStormResult, VirtualMachine]:
        run = StormRun(storm, tree, seed)
        return run.run(lambda call: send(messages.of(call, "storm"))), run.machine

    target = StatsTarget(settings.stats, settings.system, session.tls, settings.token_file)
    return await streamed(target, "storm", simulate)


_FIGURES: Final[tuple[tuple[str, str, Callable[[VirtualStormResult], float], Callable[[float], str]], ...]] = (
    ("duration_ns", "time", lambda result: result.duration_ns, lambda value: f"{value / 1e9:.4f} s"),
    ("calls", "calls", lambda result: result.counters.calls, lambda value: _whole(value)),
    ("operations", "operations", lambda result: result.operations, lambda value: _whole(value)),
    ("modcount", "loads", lambda result: result.counters.modcount, lambda value: _whole(value)),
    ("shared_calls", "calls that share a result", lambda result: result.counters.shared_calls, lambda v: _whole(v)),
    (
        "failed_becoming",
        "duplicates found at becoming",
        lambda result: result.counters.failed_becoming,
        lambda value: _whole(value),
    ),
    (
        "failed_load_modules",
        "duplicates found at load",
        lambda result: result.counters.failed_load_modules,
        lambda value: _whole(value),
    ),
    (
        "wasted_bytes",
        "wasted (the kernel's count)",
        lambda result: result.counters.virtual_mem_wasted_bytes,
        lambda value: format_bytes(round(value)),
    ),
    (
        "peak_held_bytes",
        "peak of module memory",
        lambda result: result.peak_held_bytes,
        lambda value: format_bytes(round(value)),
    ),
)
"""Name in JSON, name in the table, the figure of one result, and how it is shown."""


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def _print(storm: VirtualStorm, results: Sequence[VirtualStormResult]) -> None:
    count, first = len(results), results[0].seed
    seeds = f"seed {first}" if count == 1 else f"{count} storms, seeds {first} to {results[-1].seed}"
    print_text(
        f"{storm.workers} workers on {storm.cpus} CPUs, {', '.join(storm.modules)}; {storm.policy.name}; {seeds}\n\n"
    )
    outcomes = sorted({key for result in results for key in result.outcomes})
    print_table(
        ("Outcome", "Errno", ">Calls"),
        [
            (outcome.word, errno, _whole(fmean(result.outcomes.get((outcome, errno), 0) for result in results)))
            for outcome, errno in outcomes
        ],
    )
    print_text("\n")
    rows = []
    for _, title, figure, show in _FIGURES:
        values = [figure(result) for result in results]
        rows.append((title, show(fmean(values)), show(min(values)), show(max(values))))
    print_table(("", ">Mean", ">Least", ">Most"), rows)
    if count == 1:
        print_text("\nThat is one storm; which call is first is chance. --repeat 20 shows how far that goes.\n")


def _document(storm: VirtualStorm, results: Sequence[VirtualStormResult]) -> dict[str, Any]:
    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"mean": fmean(values), "least": min(values), "most": max(values)}

    return {
        "workers": storm.workers,
        "cpus": storm.cpus,
        "modules": list(storm.modules),
        "policy": storm.policy.name,
        "figures": {name: spread([figure(result) for result in results]) for name, _, figure, _ in _FIGURES},
        "storms": [
            {
                "seed": result.seed,
                "duration_ns": result.duration_ns,
                "operations": result.operations,
                "peak_held_bytes": result.peak_held_bytes,
                "counters": {name: getattr(result.counters, name) for name in COUNTER_NAMES},
                "outcomes": [
                    {"outcome": outcome.word, "errno": errno, "count": number}
                    for (outcome, errno), number in result.outcomes.items()
                ],
                "failed_modules": [asdict(failed) for failed in result.failed_modules],
            }
            for result in results
        ],
    }
