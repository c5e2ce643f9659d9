"""``modpressure what-if``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modpressure.cli.output import DEFAULT_MACHINE, PolicyWord, print_json, print_table, print_text
from modpressure.cli.session import JSON_HELP, help_of, whole_number
from modpressure.cli.sweep_options import (
    MAX_CPUS,
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
)
from modpressure.errors import BadRequest
from modpressure.units import format_bytes

if TYPE_CHECKING:
    from loader_svc.sweep.summary import Spread
    from loader_svc.sweep.whatif import WhatIf

ByWord = Literal["bytes", "seconds", "peak"]
FormatWord = Literal["text", "json"]


def what_if(
    cpus: Annotated[
        int | None,
        typer.Option(parser=whole_number(1, MAX_CPUS), metavar="N", help="CPUs.", show_default="the machine's"),
    ] = None,
    policy: Annotated[
        PolicyWord, typer.Option(help="What the kernel does about duplicates, before any remedy.")
    ] = "v6.4",
    machine: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="The machine: a bundled one, or a .toml file.")
    ] = DEFAULT_MACHINE,
    remedy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Repeat it for several; a+b is both together.", show_default="all that fit"),
    ] = None,
    by: Annotated[ByWord, typer.Option(help="What to rank by.")] = "bytes",
    seeds: Annotated[
        int, typer.Option("--repeat", parser=whole_number(1, 10_000), metavar="N", help="Boots with each remedy.")
    ] = 5,
    tree: TreeOption = None,
    modprobe_dir: ModprobeOption = None,
    kmod: KmodOption = "30",
    files: CompressionOption = None,
    udev_workers: WorkersOption = None,
    costs: CostsOption = None,
    jobs: JobsOption = None,
    dask: DaskOption = None,
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", metavar="FILE", help="Draw .svg or .png; repeat it.")
    ] = None,
    format: Annotated[FormatWord, typer.Option("--format", help="Text for people, JSON for programs.")] = "text",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Boot a machine in virtual time with each remedy, and rank what they save.

    Each remedy is held against the boot without it, seed by seed: the mean of what it saves and, in brackets, the least
    and the greatest. Peak is the most memory that module loading holds at one time.

    Remedies: newer-kernel, early-check, shared-results, request-once, libkmod-lock, workers:N, builtin:MODULE,
    blacklist:MODULE, merge:MODULE, files:plain|gz|xz|zst, kernel-decompresses, libkmod-decompresses, and those of
    installed packages (entry points of the group modpressure.remedies).

    Examples:
      modpressure what-if --cpus 400 --policy v6.4
      modpressure what-if --files zst --kmod 34 --policy v6.5
      modpressure what-if --remedy workers:8 --remedy request-once+newer-kernel --by seconds --format json
    """
    from loader_svc.boot.machine_file import machine_of
    from loader_svc.remedies import remedy_named
    from loader_svc.sweep.outputs import PICTURES, check_output, replace_file
    from loader_svc.sweep.whatif import what_if as held
    from modpressure.kernel.policy import policy_named

    pictures = list(dict.fromkeys(output or []))
    for path in pictures:
        if path.suffix not in PICTURES:
            raise BadRequest(f"--output {str(path)!r} ends with none of {', '.join(PICTURES)}")
        check_output(path)
    found = machine_of(machine)
    spec = boot_spec(
        found.with_cpus(cpus) if cpus else found,
        tree=tree,
        modprobe_dirs=modprobe_dir,
        kmod=kmod,
        compression=files,
        udev_workers=udev_workers,
        costs=costs,
    )
    place = Place(jobs, dask)
    with place.runner() as run:
        result = held(
            replace(spec, policy=policy_named(policy)),
            lambda points: run(points, "booting"),
            seeds=seeds,
            remedies=[remedy_named(name) for name in dict.fromkeys(remedy or ())],
            by=by,
        )
    for path in pictures:
        from loader_svc.sweep.plots import ranking

        title = f"Remedies for {spec.machine.name}, {spec.machine.cpus} CPUs, {policy}"
        replace_file(path, ranking(result, by, title, path.suffix.removeprefix(".")))
    if json or format == "json":
        print_json(
            {
                "machine": spec.machine.name,
                "cpus": spec.machine.cpus,
                "policy": policy,
                "by": by,
                "base": [boot.row() for boot in result.base],
                "savings": [saving.document() for saving in result.savings],
                "unchanged": [each.name for each in result.unchanged],
            }
        )
    else:
        _print(result)


what_if.__doc__ = help_of(what_if.__doc__ or "")


def _print(result: WhatIf) -> None:
    from loader_svc.sweep.summary import Spread

    base = result.base
    wasted = Spread.of([boot.wasted_bytes for boot in base])
    took = Spread.of([boot.duration_ns for boot in base])
    peak = Spread.of([boot.peak_held_bytes for boot in base])
    first = base[0]
    print_text(
        f"{first.machine}, {first.cpus} CPUs, {first.policy}: wastes {_bytes(wasted)}, takes {_seconds(took)}, "
        f"holds {_bytes(peak)} at most\n\n"
    )
    print_table(
        ("Remedy", ">Waste saved", "Range", ">Time saved", "Range", ">Peak saved", "Range"),
        [
            (
                saving.name,
                *_cells(saving.wasted_bytes, _byte),
                *_cells(saving.duration_ns, _second),
                *_cells(saving.peak_held_bytes, _byte),
            )
            for saving in result.savings
        ],
    )
    print_text("\n" + "".join(f"{saving.name}: {saving.sentence}\n" for saving in result.savings))
    if result.unchanged:
        print_text(f"Nothing changes with {', '.join(remedy.name for remedy in result.unchanged)}.\n")


def _byte(value: float) -> str:
    return format_bytes(round(value))


def _second(value: float) -> str:
    return f"{value / 1e9:.3f} s"


def _cells(spread: Spread, text: Callable[[float], str]) -> tuple[str, str]:
    return text(spread.mean), f"[{text(spread.low)} .. {text(spread.high)}]"


def _bytes(spread: Spread) -> str:
    return " ".join(_cells(spread, _byte))


def _seconds(spread: Spread) -> str:
    return " ".join(_cells(spread, _second))
