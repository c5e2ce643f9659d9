"""What a storm shows: how far it is, and what it came to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from modpressure.cli.output import OUTCOMES, console, plain, print_table, print_text, printable, word_of
from modpressure.storm import StormResult, StormRun
from modpressure.units import format_bytes
from modpressure.v1.loader_service_pb2 import Storm, StormProgress, StormReady, StormSummary

LINE_SECONDS: Final = 1.0
"""Shortest time between two lines where there is no terminal."""


class StormView:
    """Tells on standard error how far a storm is: a bar on a terminal, else a line a second at most."""

    def __init__(self, storm: Storm, *, to: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._storm = storm
        self._console = to or console(stderr=True)
        self._clock = clock
        self._started = 0.0
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if storm.mode == Storm.MODE_ONCE:
            self._total = float(storm.workers * len(storm.modules))
        elif storm.operations:
            self._total = float(storm.operations * storm.workers * len(storm.modules))
        else:
            self._total = storm.duration.ToTimedelta().total_seconds()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=16),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def ready(self, address: str, ready: StormReady) -> None:
        """Tell that a loader is ready."""
        loaded = [call.module for call in ready.dependency_calls if not call.errno]
        before = f"; loaded before: {', '.join(loaded)}" if loaded else ""
        if not self._started:
            self._line(f"storm: {self._storm.workers} workers, {', '.join(self._storm.modules)}")
        self._line(f"{ready.loader or address} is ready{before}")
        self._started = self._last_line = self._clock()

    def update(self, run: StormRun) -> None:
        """Tell how far all loaders are together."""
        now = self._clock()
        total = StormProgress(
            operations=sum(each.operations for each in run.progress.values()),
            calls=sum(each.calls for each in run.progress.values()),
            duplicates=sum(each.duplicates for each in run.progress.values()),
            active_workers=sum(each.active_workers for each in run.progress.values()),
            held_bytes=sum(each.held_bytes for each in run.progress.values()),
        )
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=self._total)
            self._bar.update(self._task, completed=self._completed(total, now), description=_short_text(total))
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._line(f"{now - self._started:.0f} s: {progress_text(total)}")

    def _completed(self, total: StormProgress, now: float) -> float:
        if self._storm.mode == Storm.MODE_ONCE:
            return total.calls
        return total.operations if self._storm.operations else min(now - self._started, self._total)

    def _line(self, text: str) -> None:
        self._console.print(printable(text), soft_wrap=True)


def progress_text(progress: StormProgress) -> str:
    """Return how far a storm is, in one line."""
    return (
        f"{progress.operations} operations, {progress.calls} calls, {progress.duplicates} duplicates,"
        f" {progress.active_workers} workers at work, {format_bytes(progress.held_bytes)} held"
    )


def _short_text(progress: StormProgress) -> str:
    return (
        f"{progress.operations} ops, {progress.calls} calls, {progress.duplicates} dups,"
        f" {progress.active_workers} at work, {format_bytes(progress.held_bytes)}"
    )


def total_of(result: StormResult) -> StormSummary:
    """Return the sum over all loaders; its peak is the sum of their peaks, which need not be of one moment."""
    total = StormSummary(loader="total")
    outcomes: Counter[tuple[Any, str]] = Counter()
    for summary in result.summaries.values():
        for name in (
            "workers",
            "calls",
            "operations",
            "unloads",
            "duplicates",
            "wasted_bytes",
            "peak_held_bytes",
            "errors",
        ):
            setattr(total, name, getattr(total, name) + getattr(summary, name))
        for count in summary.outcomes:
            outcomes[count.outcome, count.errno] += count.count
        total.first_error = total.first_error or summary.first_error
        total.stopped = total.stopped or summary.stopped
    for (outcome, errno), number in sorted(outcomes.items()):
        total.outcomes.add(outcome=outcome, errno=errno, count=number)
    total.elapsed.FromNanoseconds(max((each.elapsed.ToNanoseconds() for each in result.summaries.values()), default=0))
    return total


def calls_a_second(summary: StormSummary) -> float:
    """Return how many calls ended in a second."""
    elapsed_ns = summary.elapsed.ToNanoseconds()
    return summary.calls * 1e9 / elapsed_ns if elapsed_ns else 0.0


def document(result: StormResult) -> dict[str, Any]:
    """Return a result as JSON's types."""

    def of(summary: StormSummary) -> dict[str, Any]:
        return {**plain(summary), "calls_per_second": round(calls_a_second(summary), 3)}

    return {
        "interrupted": result.interrupted,
        "total": of(total_of(result)),
        "loaders": [{"address": address, **of(summary)} for address, summary in result.summaries.items()],
        "failures": [{"address": address, "error": error.sentence} for address, error in result.failures.items()],
    }


def print_summary(result: StormResult) -> None:
    """Print what a storm came to, for each loader and in total."""
    total = total_of(result)
    print_table(
        ("Outcome", "Errno", ">Calls"),
        [(word_of(OUTCOMES, count.outcome), count.errno, str(count.count)) for count in total.outcomes],
    )
    print_text("\n")
    summaries = sorted(result.summaries.values(), key=lambda summary: summary.loader)
    print_table(
        (
            "Loader",
            ">Workers",
            ">Calls",
            ">Operations",
            ">Duplicates",
            ">Wasted",
            ">Peak held",
            ">Seconds",
            ">Calls/s",
        ),
        [
            (
                summary.loader,
                str(summary.workers),
                str(summary.calls),
                str(summary.operations),
                str(summary.duplicates),
                format_bytes(summary.wasted_bytes),
                format_bytes(summary.peak_held_bytes),
                f"{summary.elapsed.ToNanoseconds() / 1e9:.2f}",
                f"{calls_a_second(summary):.0f}",
            )
            for summary in (*summaries, total)
        ],
    )
