"""What boots and replays show: figures with their spread, modules, and documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, Literal

from modpressure.cli.output import print_json, print_table, print_text
from modpressure.kernel.report import ReportFormat
from modpressure.units import format_bytes

if TYPE_CHECKING:
    from loader_svc.boot import BootResult, BootSpec
    from loader_svc.boot.sensitivity import Figures, Sensitivity
    from loader_svc.boot.spread import Spread

MODULES_SHOWN: Final = 20


PrintWord = Literal["text", "rfc", "rfc-as-posted", "mainline", "json"]


def show(spec: BootSpec, seed: int, results: Sequence[BootResult], word: PrintWord, *, noun: str = "boot") -> None:
    """Print what runs from a first seed on came to; ``noun`` is what they are."""
    if word == "json":
        print_json(document(spec, seed, results))
    elif word == "text":
        _print_text(spec, seed, results, noun)
    else:
        print_text(results[0].report(ReportFormat[word.upper().replace("-", "_")]))


def _print_text(spec: BootSpec, seed: int, results: Sequence[BootResult], noun: str) -> None:
    from loader_svc.boot.spread import module_spreads, spreads

    machine, count = spec.machine, len(results)
    seeds = f"seed {seed}" if count == 1 else f"{count} {noun}s, seeds {seed} to {seed + count - 1}"
    tree = str(spec.tree.root) if spec.tree.root else "the catalogue"
    print_text(
        f"{machine.name}: {machine.cpus} CPUs, {format_bytes(machine.memory_bytes)}; modules of {tree};"
        f" {spec.policy.name}, kmod {spec.userland.kmod}; {seeds}\n\n"
    )
    figures = spreads(results)
    rows: list[tuple[str, Spread, Callable[[float], str]]] = [
        (f"time of the {noun}", figures["duration_ns"], lambda value: f"{value / 1e9:.3f} s"),
        ("udev workers" if noun == "boot" else "workers", figures["workers"], _whole),
        ("modules loaded", figures["modcount"], _whole),
        ("calls", figures["calls"], _whole),
        ("that took another one's result", figures["gate_joins"], _whole),
        ("duplicates found at becoming", figures["failed_becoming"], _whole),
        ("duplicates found at load", figures["failed_load_modules"], _whole),
        ("wasted (the kernel's count)", figures["wasted_bytes"], _size),
        ("peak of file copies", figures["peak_copy_bytes"], _size),
        ("peak of module memory", figures["peak_held_bytes"], _size),
    ]
    if figures["shortages"].most:
        rows.insert(4, ("calls that found no room (ENOMEM)", figures["shortages"], _whole))
    print_table(
        ("", ">Mean", ">Least", ">Most"),
        [(name, show(each.mean), show(each.least), show(each.most)) for name, each, show in rows],
    )
    modules = module_spreads(results)
    if modules:
        print_text("\n")
        print_table(
            ("Module", ">Becoming", ">Load", ">Wasted", ">Share"),
            [
                (each.module, _range(each.becoming), _range(each.load), _size(each.wasted_bytes.mean), share)
                for each in modules[:MODULES_SHOWN]
                for share in (_share(each.wasted_bytes, figures["wasted_bytes"]),)
            ],
        )
        if len(modules) > MODULES_SHOWN:
            print_text(f"and {len(modules) - MODULES_SHOWN} more\n")
    failed = [result for result in results if result.lost]
    if failed:
        print_text(f"\n{_failures(failed, count, noun)}\n")
    if count == 1:
        print_text(f"\nThat is one {noun}; which call is first is chance. --repeat 20 shows how far that goes.\n")


def _failures(failed: list[BootResult], count: int, noun: str) -> str:
    """Return what is to be said of runs that memory did not suffice for."""
    firsts = [result.first_shortage for result in failed if result.first_shortage is not None]
    first = min(firsts, key=lambda each: each.at_ns)
    last = max(firsts, key=lambda each: each.at_ns)
    times = dict.fromkeys(f"{each.at_ns / 1e9:.3f}" for each in (first, last))
    when = f"{' to '.join(times)} s"
    lost = dict.fromkeys(name for result in failed for name in result.lost)
    areas = ", ".join(sorted({each.area for each in firsts}))
    modules = ", ".join(sorted({each.module for each in firsts}))
    return (
        f"{len(failed)} of {count} {noun}s failed: no room ({areas}) from {when} on, first for {modules};"
        f" missing in the end: {', '.join(lost)}"
    )


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def _size(value: float) -> str:
    return format_bytes(int(value))


def _range(spread: Spread) -> str:
    if spread.is_single:
        return _whole(spread.mean)
    return f"{_whole(spread.mean)} ({_whole(spread.least)}-{_whole(spread.most)})"


def _share(part: Spread, whole: Spread) -> str:
    return f"{100 * part.mean / whole.mean:.0f} %" if whole.mean else ""


def document(spec: BootSpec, seed: int, results: Sequence[BootResult]) -> dict[str, Any]:
    """Return what boots from a first seed on came to, as JSON's types."""
    from loader_svc.boot.spread import module_spreads, spreads

    return {
        "machine": spec.machine.name,
        "cpus": spec.machine.cpus,
        "memory_bytes": spec.machine.memory_bytes,
        "policy": spec.policy.name,
        "kmod": spec.userland.kmod,
        "figures": {name: asdict(spread) for name, spread in spreads(results).items()},
        "modules": [asdict(each) for each in module_spreads(results)],
        "boots": [
            {
                "seed": seed + number,
                "duration_ns": result.duration_ns,
                "workers": result.workers,
                "events": result.events,
                "loaded": result.loaded,
                "finit_calls": result.finit_calls,
                "init_calls": result.init_calls,
                "gate_joins": result.gate_joins,
                "peak_copy_bytes": result.peak_copy_bytes,
                "peak_held_bytes": result.peak_held_bytes,
                "init_failures": result.init_failures,
                "shortages": result.shortages,
                "first_shortage": result.first_shortage and result.first_shortage._asdict(),
                "lost": result.lost,
                "counters": {**asdict(result.counters), "virtual_mem_wasted_bytes": result.wasted_bytes},
                "report": result.report(),
            }
            for number, result in enumerate(results)
        ],
    }


def show_sensitivities(base: Figures, found: Sequence[Sensitivity], seeds: int, *, json: bool) -> None:
    """Print what costs do to a boot over so many seeds, the greatest effect first."""
    if json:
        print_json(
            {
                "seeds": seeds,
                "base": asdict(base),
                "costs": [{**asdict(each), "is_beyond_chance": each.effect(base, seeds) > 0} for each in found],
            }
        )
        return
    wasted = base.wasted_bytes
    print_text(
        f"duplicates {_range(base.duplicates)}, wasted {_size(wasted.mean)} ({_size(wasted.least)} to"
        f" {_size(wasted.most)}), {base.duration_ns.mean / 1e9:.3f} s;"
        " what changes with each cost at half / double; ~ is no more than chance:\n\n"
    )
    certain = [each for each in found if each.effect(base, seeds)]
    print_table(
        ("Cost", ">Duplicates", ">Wasted", ">Time", "Where it is from"),
        [
            (
                each.cost,
                _change(each, base, "duplicates", seeds),
                _change(each, base, "wasted_bytes", seeds),
                _change(each, base, "duration_ns", seeds),
                each.source,
            )
            for each in certain
        ],
    )
    if len(certain) < len(found):
        names = ", ".join(each.cost for each in found[len(certain) :])
        print_text(f"\n{'Nothing' if seeds == 1 else f'No more than chance with {seeds} seeds'}: {names}.\n")
    if seeds == 1:
        print_text("\nThat is one seed: what is chance can't be told. --repeat 10 tells.\n")


def _change(sensitivity: Sensitivity, base: Figures, figure: str, seeds: int) -> str:
    return " / ".join(
        f"{100 * figures.change(base, figure):+.0f} %" if figures.is_beyond_chance(base, figure, seeds) else "~"
        for figures in (sensitivity.halved, sensitivity.doubled)
    )
