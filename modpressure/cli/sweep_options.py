"""What ``sweep`` and ``what-if`` have in common: the boot that is meant, and where it is simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from modpressure.cli.output import KmodWord, console
from modpressure.cli.session import whole_number
from modpressure.errors import BadRequest

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from loader_svc.boot import BootSpec, Machine
    from loader_svc.sweep.finished import Finished
    from loader_svc.sweep.journal import Journal
    from loader_svc.sweep.point import Point

MAX_POINTS: Final = 1_000_000
MAX_CPUS: Final = 1 << 16
MAX_JOBS: Final = 4096

CompressionWord = Literal["plain", "gz", "xz", "zst"]

TreeOption = Annotated[
    Path | None, typer.Option("--tree", metavar="DIR", help="Modules.", show_default="the bundled catalogue")
]
ModprobeOption = Annotated[
    list[Path] | None, typer.Option("--modprobe-dir", metavar="DIR", help="Configuration as in modprobe.d(5).")
]
KmodOption = Annotated[KmodWord, typer.Option("--kmod", help="Version of libkmod.")]
CompressionOption = Annotated[
    CompressionWord | None, typer.Option("--files", help="How the files are packed.", show_default="as in the tree")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--udev-workers",
        parser=whole_number(1, 2048),
        metavar="N",
        help="Most workers of udev.",
        show_default="udev's own rule",
    ),
]
CostsOption = Annotated[
    Path | None, typer.Option("--costs", metavar="FILE", help="What things take.", show_default="the bundled costs")
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        parser=whole_number(1, MAX_JOBS),
        metavar="N",
        help="Processes that simulate.",
        show_default="one for each CPU here",
    ),
]
DaskOption = Annotated[
    str | None,
    typer.Option("--dask", metavar="ADDRESS", help="Simulate on this dask cluster instead, as tcp://HOST:8786."),
]


def parse_cpus(texts: Sequence[str]) -> list[int]:
    """Return the numbers that texts list, ascending: ``8,16`` or ``50..250:50``. BadRequest names what is none."""
    counts: set[int] = set()
    for text in split(texts):
        ends, _, step = text.partition(":")
        first, dots, last = ends.partition("..")
        try:
            low = int(first)
            high = int(last) if dots else low
            by = int(step) if step else 1
        except ValueError:
            raise BadRequest(f"--cpus {text!r} is neither a number nor a range such as 50..250:50") from None
        if dots and low > high:
            raise BadRequest(f"--cpus {text!r} ends before it begins")
        if by < 1 or (step and not dots):
            raise BadRequest(f"--cpus {text!r} has a step of less than 1, or one without a range such as 50..250:50")
        if not 1 <= low <= high <= MAX_CPUS:
            raise BadRequest(f"--cpus {text!r} is not between 1 and {MAX_CPUS}")
        counts.update(range(low, high + 1, by))
    return sorted(counts)


def split(texts: Sequence[str]) -> list[str]:
    """Return what options list that may be repeated and may have commas; each once."""
    return list(dict.fromkeys(part.strip() for text in texts for part in text.split(",") if part.strip()))


def boot_spec(
    machine: Machine,
    *,
    tree: Path | None,
    modprobe_dirs: Sequence[Path] | None,
    kmod: str,
    compression: str | None,
    udev_workers: int | None,
    costs: Path | None,
) -> BootSpec:
    """Return the boot that the options describe, for a machine that `machine_of` has found."""
    from loader_svc.boot import BootSpec, ModuleConfig, TreeSource, Userland

    made: dict[str, Any] = {}
    if costs is not None:
        from loader_svc.virtual.costs import read_costs

        made["costs"] = read_costs(costs)
    packed = "" if compression == "plain" else compression
    return BootSpec(
        machine,
        tree=TreeSource(tree.absolute() if tree else None, tuple(each.absolute() for each in modprobe_dirs or ())),
        userland=Userland(kmod=int(kmod), udev_workers=udev_workers),
        modules=ModuleConfig(compression=packed),
        **made,
    )


class Place:
    """Where points are simulated: processes of this machine, or a cluster."""

    def __init__(self, jobs: int | None, dask: str | None) -> None:
        """BadRequest if both are told."""
        from loader_svc.sweep.executors import usable_cpus

        if jobs is not None and dask is not None:
            raise BadRequest(f"--jobs {jobs} is about this machine, and --dask {dask} about others: give one of them")
        self._jobs = jobs or usable_cpus()
        self._dask = dask

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        """Return what simulates points, with a progress bar on a terminal; the processes stay until the end."""
        from loader_svc.sweep.executors import dask_cluster, processes

        if self._dask is not None:
            with dask_cluster(self._dask) as (executor, at_once):
                yield Runner(executor, at_once)
        else:
            with processes(self._jobs) as executor:
                yield Runner(executor, self._jobs)


@dataclass(frozen=True, slots=True)
class Runner:
    """Simulates points."""

    executor: Executor
    at_once: int

    def __call__(self, points: list[Point], what: str, journal: Journal | None = None) -> list[Finished]:
        """Return what points came to, in their order; ``what`` stands beside the bar."""
        from loader_svc.sweep.run import run_points

        with _bar() as bar:
            task = bar.add_task(what, total=len(points))

            def advance(_: Finished) -> None:
                bar.advance(task)

            return run_points(points, self.executor, at_once=self.at_once, journal=journal, on_finished=advance)


def _bar() -> AbstractContextManager[Progress]:
    out = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
