"""``modpressure verify boots``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modpressure.cli.output import print_json, print_table, print_text
from modpressure.cli.session import JSON_HELP, whole_number
from modpressure.cli.sweep_options import CostsOption, DaskOption, JobsOption, Place
from modpressure.errors import NotNow

if TYPE_CHECKING:
    from loader_svc.verify.boots.comparison import BootsTable
    from loader_svc.verify.boots.verify import Comparison


def boots(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Recorded boots: boots.csv, uevents/, traces/.")],
    tree: Annotated[
        Path | None,
        typer.Option("--tree", metavar="TREE", help="Modules.", show_default="modroot.tar.xz in DIR, unpacked"),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--repeat", parser=whole_number(1, 10_000), metavar="N", help="Boots of each kind.")
    ] = 10,
    seed: Annotated[int, typer.Option("--seed", parser=whole_number(0), metavar="N", help="The first of them.")] = 1,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", metavar="DIR", help="Boots with two CPUs to take costs from.", show_default="DIR"),
    ] = None,
    calls: Annotated[
        bool, typer.Option("--calls", help="Compare the calls of each boot, too, where their order is no race.")
    ] = False,
    costs: CostsOption = None,
    jobs: JobsOption = None,
    dask: DaskOption = None,
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Boot recorded machines again in virtual time, and print what was recorded and what came out side by side.

    Costs are taken from the boots with two CPUs, and from no others: every other number of CPUs is a prediction. Only
    what decompressing takes is from --costs, as modpressure calibrate writes them. Exit code 1 if a figure that has a
    bound is outside of it.

    Examples:
      modpressure verify boots DIR
      modpressure verify boots DIR --tree /lib/modules/$(uname -r) --repeat 20
    """
    from loader_svc.verify.boots.verify import compare, opened

    base = None
    if costs is not None:
        from loader_svc.virtual.costs import read_costs

        base = read_costs(costs)
    try:
        with opened(directory, tree=tree, calibrate=calibrate, base=base) as found, Place(jobs, dask).runner() as run:
            comparison = compare(found, lambda points: run(points, "booting"), repeat=seeds, seed=seed, calls=calls)
    except OSError as error:
        raise NotNow(f"{error.filename or directory}: {error.strerror}") from None
    _show(comparison, json=json)


def _show(comparison: Comparison, *, json: bool) -> None:
    agreed, total = comparison.rows
    if json:
        print_json(comparison.document())
    else:
        print_text(f"Costs from {', '.join(comparison.calibrated_from)}.\n")
        print_text("".join(f"{note}\n" for note in comparison.notes))
        for table in comparison.tables:
            _print(table)
        for agreement in comparison.calls:
            print_text("".join(f"\n{difference}" for difference in agreement.differences))
        if comparison.calls:
            agreed_calls = sum(each.agreed for each in comparison.calls)
            print_text(f"\n{agreed_calls} of {sum(each.total for each in comparison.calls)} calls agree\n")
        print_text(f"\n{agreed} of {total} agree\n")
    if not 0 < total == agreed:
        raise typer.Exit(1)


def _print(table: BootsTable) -> None:
    print_text(f"\n{table.title}\n{', '.join(table.boots)}\n")
    print_table(("", ">Recorded", ">Simulated", "Bound", ""), [row.texts() for row in table.rows])
    if table.modules:
        print_text("\n")
        print_table(("Duplicates of", ">Recorded", ">Simulated"), [row.texts()[:3] for row in table.modules])
