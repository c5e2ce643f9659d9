"""``modpressure machine``: descriptions of machines to boot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from modpressure.cli.output import print_json, print_table, print_text
from modpressure.cli.session import JSON_HELP

app = typer.Typer(
    name="machine",
    help="Describe machines for `modpressure boot`: this one's devices from /sys, the bundled ones.",
    no_args_is_help=True,
)

JsonOption = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


@app.command()
def record(
    sys: Annotated[Path, typer.Option("--sys", metavar="DIR", help="Where sysfs is mounted.")] = Path("/sys"),
    name: Annotated[str, typer.Option("--name", help="What to call it.", show_default="the host's name")] = "",
    json: JsonOption = False,
) -> None:
    """Print the description of this machine, as `modpressure boot --machine` takes it.

    Examples:
      modpressure machine record > m.toml
      modpressure boot --machine m.toml --tree /lib/modules/$(uname -r) --cpus 400
    """
    from loader_svc.boot.machine_file import machine_text
    from loader_svc.boot.machine_record import record_machine

    machine = record_machine(sys, name=name)
    if json:
        print_json(_document(machine))
        return
    heading = ("A machine for modpressure boot. {cpu} in a path stands for one device of each CPU.",)
    print_text(machine_text(machine, heading))


@app.command("list")
def list_machines(json: JsonOption = False) -> None:
    """List the machines that come with modpressure.

    Example:
      modpressure machine list
    """
    from loader_svc.boot.machine_file import bundled_machines

    machines = bundled_machines().values()
    if json:
        print_json([_document(machine) for machine in machines])
        return
    rows = [(each.name, str(each.cpus), f"{each.memory_bytes >> 30} GiB", each.description) for each in machines]
    print_table(("Machine", ">CPUs", ">Memory", "What it is"), rows)


@app.command()
def show(
    machine: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A bundled machine, or a .toml file.")],
    json: JsonOption = False,
) -> None:
    """Print the description of a machine, a file's with every value checked.

    Example:
      modpressure machine show nvme-255
    """
    from loader_svc.boot.machine_file import machine_of, machine_text

    described = machine_of(machine)
    if json:
        print_json(_document(described))
    else:
        print_text(machine_text(described))


def _document(machine: Any) -> dict[str, Any]:
    document = asdict(machine)
    document["triggered_devices"] = len(machine.triggered)
    document["born_devices"] = len(machine.born)
    return document
