"""``modpressure verify``: compare the simulation with what a real kernel was measured to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from modpressure.cli.output import print_json, print_text
from modpressure.cli.session import JSON_HELP
from modpressure.cli.verify_boots import boots
from modpressure.errors import BadRequest
from modpressure.identity_files import load_identity

if TYPE_CHECKING:
    from loader_svc.init_results import InitResults
    from loader_svc.verify import Agreement

app = typer.Typer(
    name="verify",
    help="Compare the simulation with measurements of a real kernel: each row that differs, and how many agree.",
    no_args_is_help=True,
)

app.command()(boots)

DEFAULT_IDENTITY: Final = "measured-6.12"

CsvOption = Annotated[Path, typer.Option("--csv", metavar="CSV", help="The measurements.")]
ScriptOption = Annotated[Path, typer.Option("--script", metavar="SCRIPT", help="The calls that were measured.")]
FilesOption = Annotated[
    list[Path], typer.Option("--files", metavar="DIR", help="Directory with the files; more may follow.")
]
MoreFiles = Annotated[list[Path] | None, typer.Argument(metavar="DIR", help="More directories with files.")]
InitOption = Annotated[
    Path | None,
    typer.Option("--init", metavar="FILE", help="CSV with what init functions return, and how long they take."),
]
IdentityOption = Annotated[
    str, typer.Option("--identity", metavar="NAME|FILE", help="The kernel: built in, or a file of identity from.")
]
JsonOption = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


@app.command()
def layout(
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="Sizes of modules as measured.")],
    tree: Annotated[Path, typer.Argument(metavar="TREE", help="Directory with their files.")],
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: JsonOption = False,
) -> None:
    """Compare the sizes of modules with those laid out from their files.

    Example:
      modpressure verify layout sizes.csv /lib/modules/$(uname -r) --identity mine.toml
    """
    from loader_svc.verify import verify_layout

    _show(verify_layout(csv, tree, load_identity(identity)), json=json)


@app.command()
def failures(
    script: ScriptOption,
    csv: CsvOption,
    files: FilesOption,
    more: MoreFiles = None,
    init: InitOption = None,
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: JsonOption = False,
) -> None:
    """Compare the errno and every counter of single calls, in the order of a script.

    Example:
      modpressure verify failures --script calls.script --csv calls.csv --files DIR
    """
    from loader_svc.verify import verify_failures

    kernel = load_identity(identity)
    _show(verify_failures(script, csv, [*files, *(more or ())], _init_results(init), kernel), json=json)


@app.command()
def waits(
    script: ScriptOption,
    csv: CsvOption,
    files: FilesOption,
    more: MoreFiles = None,
    init: InitOption = None,
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: JsonOption = False,
) -> None:
    """Compare what two loaders of one slow module get, and when.

    Example:
      modpressure verify waits --script waits.script --csv waits.csv --files DIR --init init.csv
    """
    from loader_svc.verify import verify_waits

    kernel = load_identity(identity)
    _show(verify_waits(script, csv, [*files, *(more or ())], _init_results(init), kernel), json=json)


@app.command()
def storms(
    csv: CsvOption,
    files: FilesOption,
    more: MoreFiles = None,
    init: InitOption = None,
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: JsonOption = False,
) -> None:
    """Compare what many workers released together come to: exactly what is no race, in its order what is one.

    Example:
      modpressure verify storms --csv storms.csv --files DIR
    """
    from loader_svc.verify import verify_storms

    _show(verify_storms(csv, [*files, *(more or ())], load_identity(identity), _init_results(init)), json=json)


@app.command()
def stress(
    csv: CsvOption,
    files: FilesOption,
    more: MoreFiles = None,
    init: InitOption = None,
    identity: IdentityOption = DEFAULT_IDENTITY,
    json: JsonOption = False,
) -> None:
    """Compare what workers that load and unload again and again come to: totals and what must add up.

    Example:
      modpressure verify stress --csv stress.csv --files DIR
    """
    from loader_svc.verify import verify_stress

    _show(verify_stress(csv, [*files, *(more or ())], load_identity(identity), _init_results(init)), json=json)


@app.command()
def stats(
    paths: Annotated[list[Path], typer.Argument(metavar="TEXT|DIR...", help="Texts, or directories with *.txt.")],
    json: JsonOption = False,
) -> None:
    """Read the texts of /sys/kernel/debug/modules/stats, rebuild each from what it says, and compare the bytes.

    Example:
      modpressure verify stats stats.txt
    """
    from loader_svc.verify import verify_stats

    _show(verify_stats(paths), json=json)


def _init_results(path: Path | None) -> InitResults:
    from loader_svc.init_results import InitResults, InitResultsError
    from loader_svc.verify.agreement import read_text

    try:
        return InitResults.parse(read_text(path)) if path is not None else InitResults()
    except InitResultsError as error:
        raise BadRequest(f"{path}: {error}") from None


def _show(agreement: Agreement, *, json: bool) -> None:
    """Print what a comparison came to; exit code 1 unless all rows agree."""
    if json:
        document: dict[str, Any] = {
            "agreed": agreement.agreed,
            "total": agreement.total,
            "differences": agreement.differences,
            "notes": agreement.notes,
        }
        print_json(document)
    else:
        lines = [*agreement.notes, *agreement.differences, agreement.summary]
        print_text("".join(f"{line}\n" for line in lines))
    if not agreement.is_complete:
        raise typer.Exit(1)
