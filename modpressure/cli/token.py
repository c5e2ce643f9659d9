"""``modpressure token``: tokens for the services' doors."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from modpressure.cli.output import print_json, print_text
from modpressure.cli.session import JSON_HELP, help_of
from modpressure.errors import ModpressureError
from modpressure.tokens import Role, entry, new_token, read_tokens

app = typer.Typer(name="token", help="Make and list tokens: who may load, read and administer.", no_args_is_help=True)

_JSON = Annotated[bool, typer.Option("--json", help=JSON_HELP)]
_File = Annotated[Path, typer.Argument(metavar="FILE", help="The services' file of tokens (setting tokens).")]


def _days(value: Any) -> float:
    try:
        days = float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a number of days") from None
    if not 0 < days <= 36500:
        raise typer.BadParameter(f"{value} is not a number of days, more than 0 and at most 36500")
    return days


@app.command(
    help=help_of(
        """Make a token, add its hash to a services' file, and print it, or write it to --output: it is seen this once.

        Services that run take the file's new content at once.

        Examples:
          modpressure token new tokens.toml --name ci --role load --role read --days 30 --output ci.token
          MODPRESSURE_CLIENT_TOKEN_FILE=ci.token modpressure load xfs
        """
    )
)
def new(
    file: _File,
    name: Annotated[str, typer.Option(help="Name of the token, for messages.")],
    role: Annotated[list[Role], typer.Option(help="What it is for; may be given more than once.")],
    system: Annotated[
        list[str] | None, typer.Option(help="Systems it is for, a shell pattern; may be given more than once.")
    ] = None,
    days: Annotated[
        float | None, typer.Option(parser=_days, metavar="DAYS", help="How long it is good.", show_default="for ever")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the token there instead, into a new file that its owner alone can read.",
            show_default=False,
        ),
    ] = None,
    json: _JSON = False,
) -> None:
    """Make a token."""
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days) if days else None
    systems = system or ["*"]
    token = new_token()
    text = entry(token, name, role, systems, expires)
    there = file.exists()
    if there:
        # What makes no sense now would make none after, and the services would not take it.
        taken = {grant.name for grant in read_tokens(file).values()}
        if name in taken:
            raise ModpressureError(f"{file} has a token {name!r} already")
    if output is not None:
        _write(output, token + "\n", os.O_EXCL)
    try:
        # One write, so that no service sees half of it.
        _write(file, ("\n" if there else "") + text, os.O_APPEND)
    except ModpressureError:
        if output is not None:
            output.unlink()
        raise
    if json:
        print_json(
            {
                **({"token": token} if output is None else {"token_file": str(output)}),
                "name": name,
                "roles": [str(one) for one in role],
                "systems": systems,
                "expires": expires.isoformat() if expires else None,
            }
        )
    elif output is None:
        print_text(token + "\n")


def _write(file: Path, text: str, how: int) -> None:
    """Write a text in one piece; a new file its owner alone can read. ``how`` are further flags of open(2)."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | how, 0o600)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModpressureError(f"{file} can't be written: {(error.strerror or str(error)).lower()}") from error


@app.command("list")
def list_(file: _File, json: _JSON = False) -> None:
    """List what a file of tokens allows; the tokens themselves are not in it.

    Example:
      modpressure token list tokens.toml
    """
    grants = sorted(read_tokens(file).values(), key=lambda grant: grant.name)
    rows = [
        {
            "name": grant.name,
            "roles": sorted(grant.roles),
            "systems": list(grant.systems),
            "expires": grant.expires.isoformat() if grant.expires else None,
        }
        for grant in grants
    ]
    if json:
        print_json({"tokens": rows})
        return
    for row in rows:
        expires = row["expires"] or "never"
        print_text(f"{row['name']}: {', '.join(row['roles'])}; systems {' '.join(row['systems'])}; expires {expires}\n")  # type: ignore[arg-type]
