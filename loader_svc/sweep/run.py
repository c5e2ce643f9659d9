"""Carry out the points of a sweep, those that are not finished yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Final

from loader_svc.sweep.finished import Finished
from loader_svc.sweep.journal import Journal
from loader_svc.sweep.point import Point, simulate
from modpressure.errors import ModpressureError, Unavailable

AHEAD: Final = 4
"""How many points are given away for each that can be simulated at a time: nobody waits, and few are for nothing."""


def run_points(
    points: Iterable[Point],
    executor: Executor,
    *,
    at_once: int,
    journal: Journal | None = None,
    on_finished: Callable[[Finished], None] = lambda finished: None,
) -> list[Finished]:
    """Return what all points came to, in their order; simulate those that the journal does not have.

    Points with one key are simulated once. ``at_once`` is how many the executor simulates at a time; ``on_finished`` is
    told each result, old ones first. ModpressureError of a simulation or of the journal ends it, Unavailable if the
    processes are gone.
    """
    points = list(points)
    known = journal.finished if journal is not None else {}
    by_key: dict[str, list[Point]] = {}
    for point in points:
        by_key.setdefault(point.key, []).append(point)
    results = {key: known[key] for key in by_key if key in known}
    for key, result in results.items():
        for point in by_key[key]:
            on_finished(point.named(result))
    todo = iter([(key, same[0]) for key, same in by_key.items() if key not in results])
    pending: dict[Future[Finished], str] = {}
    while True:
        while len(pending) < AHEAD * at_once and (entry := next(todo, None)) is not None:
            pending[executor.submit(simulate, entry[1])] = entry[0]
        if not pending:
            break
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            key = pending.pop(future)
            result = results[key] = _result(future)
            if journal is not None:
                journal.add(key, result)
            for point in by_key[key]:
                on_finished(point.named(result))
    return [point.named(results[point.key]) for point in points]


def _result(future: Future[Finished]) -> Finished:
    try:
        return future.result()
    except ModpressureError:
        raise
    except (BrokenProcessPool, CancelledError):
        raise Unavailable("a process that simulates has died, as it does when memory runs out") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "distributed":
            raise Unavailable(f"the dask cluster has lost a point: {type(error).__name__}") from None
        raise
