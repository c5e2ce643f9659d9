"""``modpressure sweep``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modpressure.cli.output import DEFAULT_MACHINE, POLICIES, print_json, print_table, print_text, say
from modpressure.cli.session import JSON_HELP, help_of, whole_number
from modpressure.cli.sweep_options import (
    MAX_POINTS,
    CompressionOption,
    CostsOption,
    DaskOption,
    JobsOption,
    KmodOption,
    ModprobeOption,
    Place,
    TreeOption,
    WorkersOption,
    boot_spec,
    parse_cpus,
    split,
)
from modpressure.errors import BadRequest, OverLimit

if TYPE_CHECKING:
    from loader_svc.sweep.point import Point
    from loader_svc.sweep.summary import Quantity, Summary

QuantityWord = Literal["waste", "duplicates", "late", "peak", "held", "time"]


def sweep(
    cpus: Annotated[
        list[str] | None,
        typer.Option(metavar="LIST", help="Numbers of CPUs: 8,16 or 50..250:50.", show_default="the machine's"),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="LIST", help=f"Of {', '.join(POLICIES)}.", show_default="v6.4"),
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="Machines: bundled ones, or .toml files.", show_default=DEFAULT_MACHINE),
    ] = None,
    remedy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="As in what-if; repeat it for several, a+b is both together.", show_default="none"
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--repeat", parser=whole_number(1, MAX_POINTS), metavar="N", help="Boots of each kind.")
    ] = 5,
    tree: TreeOption = None,
    modprobe_dir: ModprobeOption = None,
    kmod: KmodOption = "30",
    files: CompressionOption = None,
    udev_workers: WorkersOption = None,
    costs: CostsOption = None,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write .csv, .json, .parquet, .svg or .png."),
    ] = None,
    plot: Annotated[QuantityWord, typer.Option(help="What the table and a picture show.")] = "waste",
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Title of a picture.", show_default=False)] = None,
    published: Annotated[
        bool, typer.Option("--published", help="The figure published in 2023: v6.3 and v6.4, 50 to 255 CPUs.")
    ] = False,
    jobs: JobsOption = None,
    dask: DaskOption = None,
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Boot machines of many sizes in virtual time, and print what grows with the number of CPUs.

    Every combination of CPUs, policies, machines and remedies is booted with each seed. The table has the mean over
    seeds and, in brackets, the least and the greatest; below it the straight line through all boots of a series.

    --output FILE.csv, .json or .parquet writes all boots, FILE.svg or .png a picture; repeat it for several. What is
    finished is kept beside the first of them, in FILE.points, so that the same command goes on where it was stopped.

    Examples:
      modpressure sweep --cpus 50..250:50,255 --policy v6.3,v6.4 --output waste.svg --output waste.csv
      modpressure sweep --published --output published.svg
      modpressure sweep --cpus 64,256 --remedy none --remedy request-once --plot time -o time.png
      modpressure sweep --cpus 512..4096:512 --repeat 20 --dask tcp://head:8786 -o large.parquet
    """
    from loader_svc.sweep.journal import Journal
    from loader_svc.sweep.outputs import check_output, document, write_output
    from loader_svc.sweep.summary import QUANTITIES, Reference, Summary

    outputs = list(dict.fromkeys(output or []))
    for path in outputs:
        check_output(path)
    references: list[Reference] = []
    if published:
        from loader_svc.published.figures import published_figures

        graph = published_figures().graph
        cpus = cpus or [str(count) for count in graph.cpus]
        policy = policy or [*graph.bounds]
        machine = machine or [graph.machine]
        references = [graph.reference(name) for name in graph.bounds] if plot == "waste" else []
    place = Place(jobs, dask)
    options = {
        "tree": tree,
        "modprobe_dirs": modprobe_dir,
        "kmod": kmod,
        "compression": files,
        "udev_workers": udev_workers,
        "costs": costs,
    }
    points = _points(cpus, policy or ["v6.4"], machine or [DEFAULT_MACHINE], remedy or ["none"], seeds, options)
    with ExitStack() as stack:
        journal = None
        if outputs:
            journal = stack.enter_context(Journal(outputs[0].with_name(f"{outputs[0].name}.points")))
        try:
            run = stack.enter_context(place.runner())
            done = run(points, "booting", journal)
        except (KeyboardInterrupt, SystemExit):
            if journal is not None:
                say(f"interrupted; {journal.kept} finished boots are kept in {journal.path}")
            raise
    quantity = QUANTITIES[plot]
    heading = title or f"{quantity.label} against CPUs"
    for path in outputs:
        write_output(path, done, quantity, heading, references)
    if json:
        print_json(document(done))
    else:
        _print(Summary.of(done), quantity)


sweep.__doc__ = help_of(sweep.__doc__ or "")


def _points(
    cpus: list[str] | None,
    policies: list[str],
    machines: list[str],
    remedies: list[str],
    seeds: int,
    options: dict[str, Any],
) -> list[Point]:
    """Return all points that the options ask for. BadRequest, NotFound, OverLimit."""
    from loader_svc.boot.machine_file import machine_of
    from loader_svc.remedies import remedy_named
    from loader_svc.sweep.point import grid
    from modpressure.kernel.policy import policy_named

    counts = parse_cpus(cpus) if cpus else []
    try:
        kernels = [policy_named(name) for name in split(policies)]
    except ValueError as error:
        raise BadRequest(f"--policy: {error}") from None
    found = [machine_of(name) for name in split(machines)]
    named = [None if name == "none" else remedy_named(name) for name in dict.fromkeys(remedies)]
    total = max(len(counts), 1) * len(kernels) * len(found) * len(named) * seeds
    if total > MAX_POINTS:
        raise OverLimit(f"{total} boots are asked for, {MAX_POINTS} are the most of one sweep")
    return [
        point
        for machine in found
        for point in grid(
            boot_spec(machine, **options),
            cpus=counts or [machine.cpus],
            policies=kernels,
            remedies=named,
            seeds=range(1, seeds + 1),
        )
    ]


def _print(summary: Summary, quantity: Quantity) -> None:
    """Print the spread for each number of CPUs, and the lines."""
    rows = []
    lines = []
    for series in summary.points:
        for cpus, spread in summary.spreads(series, quantity).items():
            boots = summary.points[series][cpus]
            row = [*series, str(cpus), *(f"{value:.3f}" for value in spread)]
            row.append(f"{fmean(boot.becoming for boot in boots):.1f}")
            row.append(f"{fmean(boot.load for boot in boots):.1f}")
            rows.append(row)
        fit = summary.fit(series, quantity)
        if fit is not None:
            lines.append(
                f"{summary.name(series)}: {fit.slope:.4g} {quantity.unit} for each CPU, from {fit.intercept:.4g}, "
                f"R\N{SUPERSCRIPT TWO} {fit.r_squared:.4f}"
            )
    print_text(f"{quantity.label}, {quantity.unit}\n")
    print_table(("Machine", "Policy", "Remedy", ">CPUs", ">Mean", ">Least", ">Most", ">Becoming", ">Load"), rows)
    for line in lines:
        print_text(f"{line}\n")
