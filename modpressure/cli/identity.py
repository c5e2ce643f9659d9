"""``modpressure identity``: the kernel that modules are loaded into."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modpressure.cli.output import print_json, print_text
from modpressure.cli.session import JSON_HELP
from modpressure.identity_files import identity_from, identity_names, load_identity, save_identity
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.identity_text import render_identity

app = typer.Typer(name="identity", help="Show or make the identity of a kernel to load into.", no_args_is_help=True)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="[NAME|FILE]", help="Built in, or a file.", show_default="list")] = "",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Show an identity; without a name, list the built-in ones.

    Examples:
      modpressure identity show
      modpressure identity show debian-12
    """
    if name:
        _print(load_identity(name), json=json, base=name if name in identity_names() else "")
    elif json:
        print_json(identity_names())
    else:
        print_text("".join(f"{each}\n" for each in identity_names()))


@app.command("from")
def make(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The kernel's configuration, /boot/config-RELEASE.")],
    symvers: Annotated[
        Path | None, typer.Argument(metavar="[SYMVERS]", help="What the kernel exports, its Module.symvers.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it, symbols beside it.")
    ] = None,
    release: Annotated[str, typer.Option(help="As uname -r prints it; by default from CONFIG's name.")] = "",
    name: Annotated[str, typer.Option(help="What to call it; by default the release.")] = "",
    blacklist: Annotated[
        str, typer.Option(metavar="NAME,...", help="module_blacklist= of the kernel's command line.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Make an identity from a kernel's configuration and the symbols that it exports, and show or write it.

    Examples:
      modpressure identity from /boot/config-6.12.1 Module.symvers -o mine.toml
    """
    refused = frozenset(each for each in blacklist.split(",") if each)
    identity = identity_from(config, symvers, release=release, name=name, blacklist=refused)
    if output is not None:
        save_identity(identity, output)
    else:
        _print(identity, json=json)


def _print(identity: KernelIdentity, *, json: bool, base: str = "") -> None:
    """Print an identity; ``base`` names the built-in one that it is, so that its text, kept as a file, is whole."""
    count = len(identity.symbols) if identity.symbols is not None else None
    if json:
        fields = {field: getattr(identity, field) for field in identity.__slots__ if field != "symbols"}
        fields["blacklist"] = sorted(identity.blacklist)
        print_json({**fields, "symbols": count})
        return
    print_text(render_identity(identity, base=base))
    print_text(f"# {'Every import resolves.' if count is None else f'It exports {count} symbols.'}\n")
