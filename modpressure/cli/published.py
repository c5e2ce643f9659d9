"""``modpressure verify published``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modpressure.cli.output import print_json, print_table, print_text
from modpressure.cli.session import JSON_HELP, whole_number
from modpressure.cli.sweep_options import CostsOption, DaskOption, JobsOption, Place

if TYPE_CHECKING:
    from loader_svc.sweep.side_by_side import Table
    from loader_svc.virtual.costs import Costs


def published(
    seeds: Annotated[
        int, typer.Option("--repeat", parser=whole_number(1, 10_000), metavar="N", help="Boots of each kind.")
    ] = 10,
    costs: CostsOption = None,
    jobs: JobsOption = None,
    dask: DaskOption = None,
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Simulate what was published about real machines in 2023, and print both side by side.

    The bundled machines nvme-255 and virtio-8 are booted. What is simulated is the mean over seeds, with the least and
    the greatest. Exit code 1 if a figure that has a bound is outside of it.

    Example:
      modpressure verify published --repeat 20
    """
    from loader_svc.published.compare import compare
    from loader_svc.published.figures import published_figures
    from loader_svc.sweep.side_by_side import agreed

    with Place(jobs, dask).runner() as run:
        tables = compare(lambda points: run(points, "booting"), seeds, _costs(costs))
    source = published_figures().source
    right, total = agreed(tables)
    if json:
        documents = [
            {"title": table.title, "rows": [row.document("published") for row in table.rows]} for table in tables
        ]
        print_json({"source": source, "agreed": right, "total": total, "tables": documents})
    else:
        print_text(f"Published: {source}.\n")
        for table in tables:
            _print(table)
        print_text(f"\n{right} of {total} agree\n")
    if right < total:
        raise typer.Exit(1)


def _costs(path: Path | None) -> Costs | None:
    if path is None:
        return None
    from loader_svc.virtual.costs import read_costs

    return read_costs(path)


def _print(table: Table) -> None:
    print_text(f"\n{table.title}\n")
    print_table(("", ">Published", ">Simulated", "Bound", ""), [row.texts() for row in table.rows])
