"""``modpressure calibrate``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from modpressure.cli.output import print_json, print_text
from modpressure.cli.session import JSON_HELP, help_of
from modpressure.errors import BadRequest, NotNow


def calibrate(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the costs there.", show_default="standard output"),
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Tree of modules to measure with.", show_default="the bundled catalogue"),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Costs to take over what is not measured.", show_default="as bundled"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Measure what things take on this machine, for simulations in virtual time.

    Reading, copying and decompressing by the byte, pages, system calls, programs: a few seconds of work, best on an
    idle machine. What only a kernel could measure of itself is taken over; the file says of each figure which it is.

    Examples:
      modpressure calibrate --output costs.toml
      modpressure storm --virtual -m xfs --costs costs.toml
    """
    from loader_svc.catalogue import catalogue_tree
    from loader_svc.trees import open_tree
    from loader_svc.virtual.calibrate import calibrate as measure
    from loader_svc.virtual.costs import KINDS, read_costs

    if output is not None and not output.parent.is_dir():
        raise BadRequest(f"there is no directory {str(output.parent)!r} to write {output.name!r} to", field="output")
    opened = open_tree(catalogue_tree() if tree is None else tree)
    base_costs = None if base is None else read_costs(base)
    try:
        with tempfile.TemporaryDirectory(prefix="modpressure-") as directory:
            costs = measure(opened, Path(directory), base_costs)
        if output is not None:
            _write(output, costs.text())
    except OSError as error:
        raise NotNow(f"{error.filename or output}: {error.strerror}") from None
    measured = [name for name in KINDS if costs.source.get(name, "").startswith("measured")]
    if json:
        document: dict[str, Any] = {name: getattr(costs, name) for name in KINDS}
        print_json({**document, "init": dict(costs.init), "source": dict(costs.source)})
    elif output is None:
        print_text(costs.text())
    else:
        print_text(f"{output}: {len(measured)} of {len(KINDS)} figures measured here, the others taken over\n")


calibrate.__doc__ = help_of(calibrate.__doc__ or "")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all. OSError."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are for their owner only.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
