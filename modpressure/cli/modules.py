"""``modpressure modules``: what a loader's tree has, and what is loaded."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from modpressure.cli.output import plain, print_json, print_table, print_text, say
from modpressure.cli.session import Session, command
from modpressure.errors import ModpressureError
from modpressure.settings import LoaderSettings, load_settings
from modpressure.settings_sources import help_text
from modpressure.units import format_bytes
from modpressure.v1.loader_service_pb2 import Layout, Module
from modpressure.v1.stats_service_pb2 import LoadedModule

app = typer.Typer(
    name="modules", help="List and describe the modules of a loader's tree, and what is loaded.", no_args_is_help=True
)

ModuleArgument = Annotated[str, typer.Argument(metavar="MODULE", help="Name or alias; - and _ are one.")]


@app.command("list")
@command("loaders", "timeout_seconds")
async def list_modules(
    session: Session,
    pattern: Annotated[
        str, typer.Argument(metavar="[PATTERN]", help="Only names that match this shell pattern.", show_default="all")
    ] = "",
) -> None:
    """List the modules of the first loader's tree, by name.

    Examples:
      modpressure modules list
      modpressure modules list 'snd_*'
    """
    loader = session.settings.loaders[0]
    async with session.client() as client:
        page = await client.modules_page(pattern, loader=loader)
        release, modules = page.release, list(page.modules)
        while page.next_page_token:
            page = await client.modules_page(pattern, page_token=page.next_page_token, loader=loader)
            modules += page.modules
    if session.json:
        print_json({"release": release, "modules": [plain(module) for module in modules]})
        return
    print_table(
        ("Module", ">File", "Path"),
        [
            (module.name, "", "built in") if module.builtin else (module.name, str(module.file_bytes), module.file)
            for module in modules
        ],
    )


@app.command()
@command("stats", "system", "timeout_seconds")
async def loaded(session: Session) -> None:
    """List what is loaded or being loaded on a system, newest first, as lsmod does.

    Used is how many references there are to a module: one for each module that uses it, one while its init runs.

    Example:
      modpressure modules loaded --system web
    """
    async with session.client() as client:
        modules = [module async for module in client.loaded_modules(session.settings.system)]
    if session.json:
        print_json({"modules": [plain(module) for module in modules]})
        return
    print_table(
        ("Module", ">Size", ">Used", "By", "State", "Loader"),
        [
            (
                module.module,
                str(module.core_bytes),
                str(module.references),
                ",".join(module.used_by),
                LoadedModule.State.Name(module.state).removeprefix("STATE_").lower(),
                module.loader,
            )
            for module in modules
        ],
    )


@app.command()
@command("loaders", "timeout_seconds")
async def info(session: Session, module: ModuleArgument) -> None:
    """Describe one module: its file, its layout in memory, what it depends on, its aliases and parameters.

    Example:
      modpressure modules info xfs
    """
    async with session.client() as client:
        found = await client.module(module)
    if session.json:
        print_json(plain(found))
    else:
        print_table(("Field", "Value"), info_rows(found))


def info_rows(module: Module) -> list[tuple[str, str]]:
    """Return the fields of a module that say something, a row for each value."""
    rows = []
    for field in module.DESCRIPTOR.fields:
        value = getattr(module, field.name)
        if isinstance(value, Layout):
            rows += [(part.name, _bytes_text(getattr(value, part.name))) for part in value.DESCRIPTOR.fields]
        elif isinstance(value, int):
            rows.append((field.name, _bytes_text(value)))
        elif isinstance(value, str):
            rows += [(field.name, value)] if value else []
        else:
            rows += [(field.name, text) for text in value]
    return rows


def _bytes_text(value: int) -> str:
    return f"{value} ({format_bytes(value)})" if value >= 1024 else str(value)


@app.command()
@command("loaders", "timeout_seconds")
async def deps(session: Session, module: ModuleArgument) -> None:
    """Print what modprobe would do for a module, one line each, as modprobe --show-depends does.

    Example:
      modpressure modules deps xfs
    """
    async with session.client() as client:
        found = await client.module(module)
    if session.json:
        print_json({"module": found.name, "depends": list(found.depends), "load_order": list(found.load_order)})
    else:
        print_text("".join(f"{line}\n" for line in found.load_order))


@app.command("fetch-debian")
@command()
async def fetch_debian(
    session: Session,
    package: Annotated[
        str | None,
        typer.Argument(
            metavar="[PACKAGE]",
            help="A Debian kernel package, such as linux-image-6.12.9+deb13-amd64.",
            show_default="the newest for this machine",
        ),
    ] = None,
    cache_dir: Annotated[
        str | None, typer.Option(help=help_text(LoaderSettings, "cache_dir"), show_default=False)
    ] = None,
) -> None:
    """Unpack the modules of a Debian kernel into the cache, by apt's own client and without root.

    Example:
      modpressure up --tree "$(modpressure modules fetch-debian)"
    """
    from loader_svc.trees.debian import fetch_debian as fetch

    cache = load_settings(LoaderSettings, {"cache_dir": cache_dir}, session.config).cache_dir
    say(f"unpacking {package or 'the newest kernel package'} below {cache}; the first time takes a while")
    try:
        kernel = await asyncio.to_thread(fetch, package, cache / "debian")
    except OSError as error:
        raise ModpressureError(f"cannot unpack into {cache}: {error}") from error
    if session.json:
        print_json({"package": kernel.package, "version": kernel.version, "root": str(kernel.root)})
    else:
        print_text(f"{kernel.root}\n")
