"""``modpressure limit``: how many workers a machine of finite memory bears, in virtual time, without any server."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from modpressure.cli.output import KmodWord, PolicyWord, console, print_json, print_table, print_text
from modpressure.cli.session import JSON_HELP, help_of, memory_option, whole_number
from modpressure.identity_files import load_identity
from modpressure.kernel.policy import policy_named
from modpressure.kernel.system_memory import KASLR_MODULE_AREA_BYTES, VMALLOC_BYTES, Amounts
from modpressure.units import format_bytes

if TYPE_CHECKING:
    from loader_svc.limit import LimitSpec, StormEnd, Trial

MAX_WORKERS: Final = 10_000
MAX_REPEAT: Final = 10_000
MAX_SEED: Final = (1 << 63) - 1

PackedWord = Literal["plain", "gz", "xz", "zst"]
FormatWord = Literal["text", "json"]

_MACHINE: Final = "What the machine has"
_LOAD: Final = "What is loaded"


def limit(
    module: Annotated[
        str, typer.Option("--module", "-m", help="Module to load, by name or alias.", rich_help_panel=_LOAD)
    ],
    workers: Annotated[
        int,
        typer.Option(
            "--workers", "-w", parser=whole_number(1, MAX_WORKERS), metavar="N", help="The most workers that are tried."
        ),
    ] = 400,
    memory: Annotated[
        int | None,
        memory_option("Memory for what loading allocates.", panel=_MACHINE),
    ] = None,
    vmalloc: Annotated[
        int | None, memory_option("Size of the vmalloc area.", "32 TiB, x86-64's", panel=_MACHINE)
    ] = None,
    module_area: Annotated[
        int | None,
        memory_option(
            "Size of the module area; 1520MiB without KASLR.", "1008MiB, x86-64's with KASLR", panel=_MACHINE
        ),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1),
            metavar="N",
            help="CPUs.",
            show_default="one for each worker",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    policy: Annotated[
        PolicyWord, typer.Option(help="What the kernel does about duplicates.", rich_help_panel=_MACHINE)
    ] = "v6.4",
    identity: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="The kernel: built in, or a file of identity from.",
            show_default="one that loads any module",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What things take.", show_default="the bundled figures", rich_help_panel=_MACHINE
        ),
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Tree of modules.", show_default="the bundled catalogue", rich_help_panel=_LOAD
        ),
    ] = None,
    files: Annotated[
        PackedWord | None,
        typer.Option(
            "--files", help="Take the files as packed like this.", show_default="as in the tree", rich_help_panel=_LOAD
        ),
    ] = None,
    kmod: Annotated[
        KmodWord,
        typer.Option(help="Who decompresses: libkmod 30 by itself, 34 has the kernel do it.", rich_help_panel=_LOAD),
    ] = "30",
    separate_copies: Annotated[
        bool,
        typer.Option("--separate-copies", help="Give each worker a copy of the file.", rich_help_panel=_LOAD),
    ] = False,
    seed: Annotated[
        int, typer.Option(parser=whole_number(0, MAX_SEED), metavar="N", help="The first seed of chance.")
    ] = 0,
    repeat: Annotated[int, typer.Option(parser=whole_number(1, MAX_REPEAT), metavar="N", help="How many seeds.")] = 5,
    print_as: Annotated[FormatWord, typer.Option("--format", help="How to print it.")] = "text",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Find at how many workers loading a module first runs out of memory, and where.

    All workers load the module once, together, on a machine in virtual time that has only so much. A number of workers
    fails if an allocation of any call finds no room: then that call fails with ENOMEM. Of each seed the storm is found
    that fails while that of one worker less does not; which call comes first is chance, so there are several seeds.

    Exit code 0 if all the workers fit with every seed, 1 if not.

    Examples:
      modpressure limit --workers 400 --module xfs
      modpressure limit -w 400 -m xfs --policy v6.3 --module-area 1520MiB
      modpressure limit -w 1000 -m amdgpu --tree /lib/modules/$(uname -r) --memory 8GiB --repeat 20
    """
    from loader_svc.boot import TreeSource
    from loader_svc.limit import LimitSearch, LimitSpec

    changed: dict[str, Any] = {}
    if costs is not None:
        from loader_svc.virtual.costs import read_costs

        changed["costs"] = read_costs(costs)
    if identity is not None:
        changed["identity"] = load_identity(identity)
    spec = LimitSpec(
        module,
        Amounts(memory or 0, vmalloc or VMALLOC_BYTES, module_area or KASLR_MODULE_AREA_BYTES),
        workers,
        policy_named(policy),
        TreeSource(tree.absolute() if tree else None),
        "" if files == "plain" else files,
        int(kmod),
        cpus,
        separate_copies,
        **changed,
    )
    search = LimitSearch(spec)
    trials = []
    with console(stderr=True).status("") as status:
        for number in range(repeat):
            text = f"seed {seed + number}: %d workers"
            trials.append(search.trial(seed + number, lambda tried, text=text: status.update(text % tried)))  # type: ignore[misc]
    if json or print_as == "json":
        print_json(_document(spec, trials))
    else:
        _print_text(spec, trials)
    if any(trial.first is not None for trial in trials):
        raise typer.Exit(1)


limit.__doc__ = help_of(limit.__doc__ or "")


def _document(spec: LimitSpec, trials: list[Trial]) -> dict[str, Any]:
    return {
        "module": spec.module,
        "workers": spec.workers,
        "policy": spec.policy.name,
        "limits": spec.limits._asdict(),
        "fits": all(trial.first is None for trial in trials),
        "seeds": [
            {
                "seed": trial.seed,
                "fails_at": trial.first.workers if trial.first else None,
                **(_refusal(trial.first) if trial.first else {}),
                "errnos": dict(trial.full.errnos),
                "peak": trial.full.peak._asdict(),
            }
            for trial in trials
        ],
    }


def _refusal(end: StormEnd) -> dict[str, Any]:
    assert end.refusal is not None
    shortage = end.refusal.shortage
    return {
        "stage": end.refusal.outcome.word,
        "errno": "ENOMEM",
        "area": shortage.area.value,
        "asked_bytes": shortage.asked_bytes,
        "left_bytes": shortage.left_bytes,
    }


def _print_text(spec: LimitSpec, trials: list[Trial]) -> None:
    rows = []
    for trial in trials:
        end, first = trial.full, trial.first
        where = ["", "", "", "", ""]
        if first is not None:
            found = _refusal(first)
            sizes = (format_bytes(found[name]) for name in ("asked_bytes", "left_bytes"))
            where = [str(first.workers), found["stage"], found["area"], *sizes]
        rows.append([str(trial.seed), *where, str(end.errnos["ENOMEM"]), *map(format_bytes, end.peak)])
    titles = [">Seed", ">Fails at", "Stage", "Full", ">Asked", ">Left", f">ENOMEM of {spec.workers}"]
    print_table([*titles, ">Peak", ">Vmalloc area", ">Module area"], rows)
    print_text(f"\n{_summary(spec, trials)}\n")


def _summary(spec: LimitSpec, trials: list[Trial]) -> str:
    """Return the answer in a sentence."""
    found = [trial.first.workers for trial in trials if trial.first is not None]
    of = f"{len(trials)} seed{'s' * (len(trials) > 1)}"
    if not found:
        return f"{spec.workers} workers fit, with {of}."
    least, most = min(found), max(found)
    spread = f"{least}" if least == most else f"{least} to {most} (median {median(found):g})"
    workers = "worker" if most == 1 else "workers"
    return f"Fails first at {spread} {workers}; {spec.workers} fail with {len(found)} of {of}."
