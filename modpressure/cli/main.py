"""The command ``modpressure``: its commands, its exit codes, and what it says when something goes wrong.

Exit codes: 0 done; 1 the run failed; 2 bad usage; 130 interrupted (128 plus the number of the signal).
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Sequence
from typing import Annotated, Final, NoReturn

import typer

from modpressure import __version__
from modpressure.cli import (
    backup,
    boot,
    calibrate,
    counts,
    doctor,
    events,
    identity,
    limit,
    load,
    machine,
    modules,
    published,
    replay,
    request_module,
    storm,
    sweep,
    systems,
    token,
    up,
    verify,
    whatif,
)
from modpressure.cli.output import print_json, print_text, printable
from modpressure.cli.session import JSON_HELP, help_of
from modpressure.errors import BadRequest, ModpressureError

DEBUG_VARIABLE: Final = "MODPRESSURE_DEBUG"

_HELP: Final = """See what loading kernel modules costs in memory when many CPUs do it at once.

A first session, in two terminals:
  modpressure up --loaders 4
  modpressure storm --workers 100 --module xfs
  modpressure report

Every command has --json. Settings are flags, MODPRESSURE_* variables and keys of modpressure.toml alike.
Exit codes: 0 done, 1 the run failed, 2 bad usage, 130 interrupted.
"""

app = typer.Typer(
    name="modpressure",
    help=help_of(_HELP),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_RUN: Final = "Run"
_SIMULATE: Final = "Simulate in virtual time"
_LOOK: Final = "Look"
app.command(rich_help_panel=_RUN)(up.up)
app.command(rich_help_panel=_RUN)(load.load)
app.command(rich_help_panel=_RUN)(load.unload)
app.command("request-module", rich_help_panel=_RUN)(request_module.request_module)
app.command(rich_help_panel=_RUN)(storm.storm)
app.command(rich_help_panel=_SIMULATE)(boot.boot)
app.command(rich_help_panel=_SIMULATE)(replay.replay)
app.command(rich_help_panel=_SIMULATE)(limit.limit)
app.command(rich_help_panel=_SIMULATE)(sweep.sweep)
app.command("what-if", rich_help_panel=_SIMULATE)(whatif.what_if)
app.command(rich_help_panel=_SIMULATE)(calibrate.calibrate)
app.command(rich_help_panel=_LOOK)(counts.report)
app.command(rich_help_panel=_LOOK)(counts.stats)
app.command(rich_help_panel=_LOOK)(counts.duplicates)
app.command(rich_help_panel=_LOOK)(events.events)
app.command(rich_help_panel=_LOOK)(events.watch)
app.command(rich_help_panel=_LOOK)(doctor.doctor)
app.command(rich_help_panel=_RUN)(backup.backup)
app.add_typer(modules.app, rich_help_panel=_LOOK)
app.add_typer(systems.app, rich_help_panel=_RUN)
app.add_typer(identity.app, rich_help_panel=_LOOK)
app.add_typer(machine.app, rich_help_panel=_LOOK)
verify.app.command()(published.published)
app.add_typer(verify.app, rich_help_panel=_LOOK)
app.add_typer(token.app, rich_help_panel=_RUN)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print_text(f"modpressure {__version__}\n")
        raise typer.Exit


@app.callback()
def modpressure(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take what stands before the command."""


@app.command(rich_help_panel=_LOOK)
def version(json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False) -> None:
    """Print the version.

    Example:
      modpressure version --json
    """
    if json:
        print_json({"modpressure": __version__, "python": platform.python_version()})
    else:
        print_text(f"modpressure {__version__}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; what goes wrong is said in one sentence on standard error."""
    if DEBUG_VARIABLE not in os.environ:
        # Its complaints about tasks come with stack traces.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    try:
        command = typer.main.get_command(app)
        code = command.main(args=arguments, prog_name="modpressure", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        return _usage(error)
    except BadRequest as error:
        return _fail(error.sentence, 2)
    except ModpressureError as error:
        return _fail(error.sentence, 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # Who read the output has gone, as head does; what is left in the buffer has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        what = " ".join(str(error).split()) or "no more is known"
        return _fail(f"unexpected {type(error).__name__}: {what} ({DEBUG_VARIABLE}=1 shows where)", 1)


def run() -> NoReturn:
    """Run the command line of this process."""
    sys.exit(main())


def _usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "modpressure"
    message = " ".join(error.format_message().replace("Value error, ", "").split())
    if not message:  # no_args_is_help has printed the help
        return 2
    print_error(f"{path}: {message.rstrip('.')} (see {path} --help)")
    return 2 if error.exit_code else 0


def _fail(sentence: str, code: int) -> int:
    print_error(f"modpressure: {sentence}")
    return code


def print_error(text: str) -> None:
    """Print one line on standard error, wherever that leads."""
    try:
        sys.stderr.write(printable(text) + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        pass
