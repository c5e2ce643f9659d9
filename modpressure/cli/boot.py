"""``modpressure boot``: a machine's boot in virtual time, without any server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from modpressure import aio, log
from modpressure.cli.boot_view import PrintWord, show, show_sensitivities
from modpressure.cli.output import DEFAULT_MACHINE, KmodWord, PolicyWord
from modpressure.cli.session import JSON_HELP, help_of, whole_number
from modpressure.errors import BadRequest
from modpressure.kernel.policy import policy_named
from modpressure.kernel.system_memory import Amounts
from modpressure.settings import ClientSettings, load_settings
from modpressure.tls import client_tls
from modpressure.units import parse_bytes

if TYPE_CHECKING:
    from loader_svc.boot import BootResult, BootSpec, Machine

TriggerWord = Literal["initramfs", "root"]
CompressionWord = Literal["plain", "gz", "xz", "zst"]

MAX_REPEAT: Final = 10_000
MAX_SEED: Final = (1 << 63) - 1

_MACHINE: Final = "What is booted"
_OTHER: Final = "What is different"
_SERVER: Final = "Where it is counted"


def boot(
    machine: Annotated[
        str,
        typer.Option(
            "--machine", "-m", metavar="NAME|FILE", help="A bundled machine or a .toml file.", rich_help_panel=_MACHINE
        ),
    ] = DEFAULT_MACHINE,
    cpus: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1), metavar="N", help="CPUs.", show_default="the machine's", rich_help_panel=_MACHINE
        ),
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Tree of modules.", show_default="the bundled catalogue", rich_help_panel=_MACHINE
        ),
    ] = None,
    modprobe: Annotated[
        list[Path] | None,
        typer.Option(
            "--modprobe-dir", metavar="DIR", help="Configuration of modprobe; repeat it.", rich_help_panel=_MACHINE
        ),
    ] = None,
    policy: Annotated[
        PolicyWord, typer.Option(help="What the kernel does about duplicates.", rich_help_panel=_MACHINE)
    ] = "v6.4",
    kmod: Annotated[
        KmodWord, typer.Option(help="Version of libkmod: Debian 12's or 13's.", rich_help_panel=_MACHINE)
    ] = "30",
    trigger: Annotated[
        TriggerWord,
        typer.Option(
            help="What udevadm triggers: as an initramfs does, or systemd on a root file system.",
            rich_help_panel=_MACHINE,
        ),
    ] = "initramfs",
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What things take.", show_default="the bundled figures", rich_help_panel=_MACHINE
        ),
    ] = None,
    limit_memory: Annotated[
        str | None,
        typer.Option(
            "--limit-memory",
            "--limit",
            metavar="SIZE",
            help="Memory that module loading may take, such as 512MiB or 5%; beyond it calls fail with ENOMEM.",
            show_default="none",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    limit_vmalloc: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Size of the vmalloc area, where copies and images are.",
            show_default="none",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    limit_module_area: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Size of the module area, where layouts are; on x86-64 1520MiB, with KASLR 1008MiB.",
            show_default="none",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    udev_workers: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1),
            metavar="N",
            help="udev.children_max.",
            show_default="udev's own rule",
            rich_help_panel=_OTHER,
        ),
    ] = None,
    compression: Annotated[
        CompressionWord | None,
        typer.Option(
            "--files", help="Take the files as packed like this.", show_default="as in the tree", rich_help_panel=_OTHER
        ),
    ] = None,
    blacklist: Annotated[
        list[str] | None,
        typer.Option("--blacklist", metavar="MODULE", help="Blacklist a module; repeat it.", rich_help_panel=_OTHER),
    ] = None,
    builtin: Annotated[
        list[str] | None,
        typer.Option(
            "--builtin", metavar="MODULE", help="Take a module as built in; repeat it.", rich_help_panel=_OTHER
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(parser=whole_number(0, MAX_SEED), metavar="N", help="The first seed of chance.")
    ] = 0,
    repeat: Annotated[
        int,
        typer.Option(
            parser=whole_number(1, MAX_REPEAT), metavar="N", help="Boots, one for each seed from the first on."
        ),
    ] = 5,
    print_as: Annotated[
        PrintWord,
        typer.Option("--format", help="text: all that came out, with its spread; a report of the first boot; or json."),
    ] = "text",
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Also boot with each cost halved and doubled, and print what that changes."),
    ] = False,
    stats: Annotated[
        str | None,
        typer.Option(
            "--stats",
            metavar="HOST:PORT",
            help="Also send the calls of the first boot to this stats_svc.",
            show_default="no server",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    system: Annotated[
        str, typer.Option("--system", metavar="ID", help="The system there; made if need be.", rich_help_panel=_SERVER)
    ] = "boot",
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Settings file, for certificates and tokens.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Boot a machine in virtual time, and print what its udev wastes on duplicate loads.

    What udev and libkmod ask of the kernel at coldplug, on as many CPUs as you like, without any server: how long it
    takes, what is wasted at which stage and by which module, how much memory that needs at once. Which of two CPUs is
    first is chance, so the boot is run over several seeds; the same seed gives the same boot.

    Exit code 1 if the boot fails: memory ran out, or no module was loaded.

    Examples:
      modpressure boot --machine nvme-255 --policy v6.3
      modpressure boot --cpus 400 --repeat 20
      modpressure boot --machine m.toml --tree /lib/modules/$(uname -r) --format mainline
      modpressure boot --machine nvme-255 --stats localhost:50050 --system nvme
    """
    from loader_svc.boot import BootSpec, ModuleConfig, TreeSource, Userland, simulate_boot
    from loader_svc.boot.machine_file import machine_of

    described = machine_of(machine)
    if cpus is not None:
        described = described.with_cpus(cpus)
    spec = BootSpec(
        described,
        TreeSource(tree.absolute() if tree else None, tuple(modprobe or ())),
        policy_named(policy),
        Userland(kmod=int(kmod), udev_workers=udev_workers, trigger=trigger),
        ModuleConfig(
            blacklist=frozenset(blacklist or ()),
            builtin=frozenset(builtin or ()),
            compression=None if compression is None else "" if compression == "plain" else compression,
        ),
    )
    if costs is not None:
        from loader_svc.virtual.costs import read_costs

        spec = replace(spec, costs=read_costs(costs))
    limits = {"memory": limit_memory, "vmalloc": limit_vmalloc, "module-area": limit_module_area}
    if any(text is not None for text in limits.values()):
        spec = replace(spec, limits=Amounts(*(_limit(name, text, described) for name, text in limits.items())))
    if sensitivity:
        _show_sensitivity(spec, range(seed, seed + repeat), json=json or print_as == "json")
        return
    results = []
    if stats is not None:
        results.append(_streamed(spec, seed, stats, system, config))
    results += [simulate_boot(spec, seed + number) for number in range(len(results), repeat)]
    show(spec, seed, results, "json" if json else print_as)
    if not all(result.counters.modcount and not result.lost for result in results):
        raise typer.Exit(1)


boot.__doc__ = help_of(boot.__doc__ or "")


def _show_sensitivity(spec: BootSpec, seeds: range, *, json: bool) -> None:
    """Boot with costs halved and doubled, on all CPUs there are, and print what that does."""
    from loader_svc.boot.sensitivity import sensitivities
    from loader_svc.sweep.executors import processes, usable_cpus

    with processes(usable_cpus()) as executor:
        base, found = sensitivities(spec, seeds, executor)
    show_sensitivities(base, found, len(seeds), json=json)


def _streamed(spec: BootSpec, seed: int, stats: str, system: str, config: Path | None) -> BootResult:
    """Boot once, with its calls counted by a stats_svc."""
    from loader_svc.boot.stream import StatsTarget, stream_boot

    # What goes wrong is said in a sentence; that the stream stands is no news.
    log.configure("error", "console")
    settings = load_settings(ClientSettings, {"stats": stats, "system": system}, config)
    tls = client_tls(settings.ca, settings.cert, settings.key)
    target = StatsTarget(settings.stats, settings.system, tls, settings.token_file)
    return aio.run(stream_boot(spec, seed, target))


def _limit(name: str, text: str | None, machine: Machine) -> int:
    """Return how many bytes a limit says, 0 for none. BadRequest."""
    if text is None:
        return 0
    try:
        limit_bytes = parse_bytes(text, whole_bytes=machine.memory_bytes if name == "memory" else None)
    except ValueError as error:
        raise BadRequest(f"--limit-{name}: {error}") from None
    if not limit_bytes:
        raise BadRequest(f"--limit-{name} {text} leaves no memory at all")
    return limit_bytes
