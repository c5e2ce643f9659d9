"""What every command has in common: its settings, its client, ``--json``; and running as a coroutine."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

import typer

from modpressure import aio
from modpressure.client import Client
from modpressure.settings import ClientSettings, load_settings
from modpressure.settings_sources import CONFIG_VARIABLE, FILE_NAME, flag, help_text
from modpressure.tls import ClientTls, client_tls, read_token
from modpressure.units import parse_bytes

PANEL: Final = "Where and how"
"""Heading of the common options in a command's help."""

JSON_HELP: Final = "Print JSON instead of text."

_YEAR_SECONDS: Final = 366 * 86400


@dataclass(frozen=True, slots=True)
class Session:
    """What a command knows of its surroundings."""

    settings: ClientSettings
    json: bool
    config: Path | None

    def client(self) -> Client:
        """Return a client of the services that the settings name."""
        settings = self.settings
        return Client(
            settings.loaders, settings.stats, timeout_seconds=settings.timeout_seconds, tls=self.tls, token=self.token
        )

    @property
    def token(self) -> str:
        """The token that the services are shown, empty for none."""
        return read_token(self.settings.token_file)

    @property
    def tls(self) -> ClientTls | None:
        """How the services are talked to."""
        return client_tls(self.settings.ca, self.settings.cert, self.settings.key)


Command = Callable[..., Awaitable[int | None]]


def command(*names: str) -> Callable[[Command], Callable[..., None]]:
    """Make a command of a coroutine function: its first parameter is the ``Session``, the others are its own.

    ``names`` are the client's settings that the command takes as flags. The coroutine returns the exit code, or None
    for 0.
    """

    def decorate(function: Command) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, json: bool, config: Path | None, **values: Any) -> None:
            flags = {name: values.pop(name) for name in names}
            session = Session(load_settings(ClientSettings, flags, config), json, config)
            code = aio.run(_awaited(function(session, **values)))
            if code:
                raise typer.Exit(code)

        _set_parameters(run, function, names)
        run.__doc__ = help_of(function.__doc__ or "")
        return run

    return decorate


async def _awaited(awaitable: Awaitable[int | None]) -> int | None:
    return await awaitable


def help_of(docstring: str) -> str:
    """Return a docstring as Typer shows it well: a paragraph on one line, but examples line by line."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(
        paragraph if "\n " in paragraph else " ".join(paragraph.splitlines()) for paragraph in paragraphs
    )


def whole_number(least: int, most: int | None = None) -> Callable[[Any], int]:
    """Return a parser for an option that is a whole number; unlike Typer's own it names a wrong value."""
    between = f"between {least} and {most}" if most is not None else f"of at least {least}"

    def parse(value: Any) -> int:
        try:
            number = int(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not a whole number") from None
        if number < least or (most is not None and number > most):
            raise typer.BadParameter(f"{value} is not {between}")
        return number

    return parse


def duration_seconds(value: Any) -> float:
    """Parse an option that is a time in seconds: more than 0, at most a year."""
    try:
        seconds = float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a number of seconds") from None
    if not 0 < seconds <= _YEAR_SECONDS:
        raise typer.BadParameter(f"{value} is not a number of seconds between 0 and {_YEAR_SECONDS}")
    return seconds


def memory_bytes(value: Any) -> int:
    """Parse an option that is an amount of memory: at least a byte."""
    try:
        size_bytes = parse_bytes(str(value))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not size_bytes:
        raise typer.BadParameter(f"{value!r} is no memory at all; without a limit leave the option away")
    return size_bytes


def memory_option(help_: str, default: str = "no limit", *, panel: str | None = None) -> Any:
    """Return an option that is an amount of memory, such as 64MiB; ``panel`` is its heading in the command's help."""
    return typer.Option(parser=memory_bytes, metavar="BYTES", help=help_, show_default=default, rich_help_panel=panel)


def _set_parameters(run: Callable[..., None], function: Command, names: tuple[str, ...]) -> None:
    """Give ``run`` the parameters of ``function`` without the session, and those that all commands have."""
    hints = get_type_hints(function, include_extras=True)
    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
    common: dict[str, Any] = {
        name: Annotated[
            str | None,
            typer.Option(flag(name), help=help_text(ClientSettings, name), rich_help_panel=PANEL, show_default=False),
        ]
        for name in names
    }
    config_help = (
        f"Settings file. [{CONFIG_VARIABLE}; default: {FILE_NAME} in the current directory or in the user's"
        " configuration directory]"
    )
    common["config"] = Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help=config_help, rich_help_panel=PANEL, show_default=False),
    ]
    common["json"] = Annotated[bool, typer.Option("--json", help=JSON_HELP, rich_help_panel=PANEL)]
    for name, annotation in common.items():
        default = False if name == "json" else None
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only}
    # Typer would look past the parameters made here otherwise.
    del run.__wrapped__  # type: ignore[attr-defined]
