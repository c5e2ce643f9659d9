"""``modpressure replay``: recorded loads, made again in virtual time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer

from modpressure.cli.boot import MAX_REPEAT, MAX_SEED
from modpressure.cli.boot_view import PrintWord, show
from modpressure.cli.output import KmodWord, PolicyWord
from modpressure.cli.session import JSON_HELP, help_of, whole_number
from modpressure.kernel.policy import policy_named

DEFAULT_CPUS: Final = 8
DEFAULT_MEMORY_BYTES: Final = 64 << 30


def replay(
    trace: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV, `modpressure events --json`, or the text of ftrace.")
    ],
    tree: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Tree of modules.", show_default="the bundled catalogue")
    ] = None,
    policy: Annotated[PolicyWord, typer.Option(help="What the kernel does about duplicates.")] = "v6.4",
    kmod: Annotated[
        KmodWord, typer.Option(help="Version of libkmod, for calls of which the trace does not say how they were made.")
    ] = "30",
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            "-m",
            metavar="NAME|FILE",
            help="A machine whose CPUs, costs, inits and files count, not its devices.",
            show_default=f"{DEFAULT_CPUS} CPUs, the tree's files",
        ),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(parser=whole_number(1), metavar="N", help="CPUs.", show_default="the machine's")
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What things take.", show_default="the machine's")
    ] = None,
    seed: Annotated[
        int, typer.Option(parser=whole_number(0, MAX_SEED), metavar="N", help="The first seed of chance.")
    ] = 0,
    repeat: Annotated[
        int,
        typer.Option(
            parser=whole_number(1, MAX_REPEAT), metavar="N", help="Replays, one for each seed from the first on."
        ),
    ] = 5,
    print_as: Annotated[
        PrintWord,
        typer.Option("--format", help="text: all that came out, with its spread; a report of the first; or json."),
    ] = "text",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Make recorded calls again at their times, on a simulated machine: other CPUs, another policy, other costs.

    A CSV needs a heading with time_seconds and module, and may have worker, syscall, flags, parameters and action. Of
    ftrace, the events module_load and module_free count (trace-cmd record -e module; trace-cmd report).

    Examples:
      modpressure events --json --limit 0 > t.jsonl; modpressure replay t.jsonl --policy v6.5
      trace-cmd report | grep -v ^cpus > t.txt; modpressure replay t.txt --tree /lib/modules/$(uname -r)
      modpressure replay calls.csv --cpus 64 --json
    """
    from loader_svc.boot import BootSpec, Machine, TreeSource, Userland, replay_trace
    from loader_svc.boot.machine_file import machine_of
    from loader_svc.boot.trace import read_trace

    calls = read_trace(trace)
    described = machine_of(machine) if machine is not None else Machine(trace.stem, DEFAULT_CPUS, DEFAULT_MEMORY_BYTES)
    if cpus is not None:
        described = described.with_cpus(cpus)
    source = TreeSource(tree.absolute() if tree else None)
    spec = BootSpec(described, source, policy_named(policy), Userland(kmod=int(kmod)))
    if costs is not None:
        from loader_svc.virtual.costs import read_costs

        spec = replace(spec, costs=read_costs(costs))
    results = [replay_trace(spec, calls, seed + number) for number in range(repeat)]
    show(spec, seed, results, "json" if json else print_as, noun="replay")


replay.__doc__ = help_of(replay.__doc__ or "")
