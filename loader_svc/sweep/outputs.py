"""What a sweep leaves behind: tables and pictures, each there whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from loader_svc.sweep.extra import needed
from loader_svc.sweep.finished import COLUMNS, Finished
from loader_svc.sweep.summary import QUANTITIES, Quantity, Reference, Summary
from modpressure.errors import BadRequest, ModpressureError

TABLES: Final = (".csv", ".json", ".parquet")
PICTURES: Final = (".svg", ".png")


def check_output(path: Path) -> None:
    """Make sure, before anything is simulated, that a file of that name can be written.

    BadRequest for a suffix that is none of those; ModpressureError if a library that it needs is not there, or there
    is no directory for it.
    """
    if path.suffix not in TABLES + PICTURES:
        raise BadRequest(f"--output {str(path)!r} ends with none of {', '.join(TABLES + PICTURES)}")
    if not path.parent.is_dir():
        raise ModpressureError(f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}")
    if path.suffix == ".parquet":
        with needed("pyarrow"):
            import pyarrow.parquet  # noqa: F401
    elif path.suffix in PICTURES:
        with needed("matplotlib"):
            import matplotlib  # noqa: F401


def write_output(
    path: Path, points: Sequence[Finished], quantity: Quantity, title: str, references: Sequence[Reference] = ()
) -> None:
    """Write finished points in the format that the name's end says.

    A picture shows the quantity against the CPUs, and the references beside it. ModpressureError if it can't be
    written; what was there is then as before.
    """
    replace_file(path, _bytes(path.suffix, points, quantity, title, references))


def _bytes(
    suffix: str, points: Sequence[Finished], quantity: Quantity, title: str, references: Sequence[Reference]
) -> bytes:
    if suffix == ".csv":
        return csv_bytes(points)
    if suffix == ".json":
        return (json.dumps(document(points), indent=1) + "\n").encode()
    if suffix == ".parquet":
        return parquet_bytes(points)
    from loader_svc.sweep.plots import against_cpus

    return against_cpus(Summary.of(points), quantity, title, suffix.removeprefix("."), references)


def csv_bytes(points: Sequence[Finished]) -> bytes:
    """Return a table of points, a row each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.row() for point in points)
    return text.getvalue().encode()


def parquet_bytes(points: Sequence[Finished]) -> bytes:
    """Return the same table as a Parquet file: texts and 64-bit numbers."""
    with needed("pyarrow"):
        import pyarrow
        import pyarrow.parquet
    rows = [point.row() for point in points]
    kinds = {name: pyarrow.string() if isinstance(value, str) else pyarrow.int64() for name, value in rows[0].items()}
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(kinds.items())))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue())


def document(points: Sequence[Finished]) -> dict[str, Any]:
    """Return points, their spread over seeds and their lines against CPUs as JSON's types."""
    summary = Summary.of(points)
    series = []
    for each, by_cpus in summary.points.items():
        quantities: dict[str, Any] = {}
        for word, quantity in QUANTITIES.items():
            fit = summary.fit(each, quantity)
            quantities[word] = {
                "unit": quantity.unit,
                "by_cpus": {cpus: spread._asdict() for cpus, spread in summary.spreads(each, quantity).items()},
                "fit": fit._asdict() if fit else None,
            }
        seeds = max(len(boots) for boots in by_cpus.values())
        series.append({**each._asdict(), "seeds": seeds, "quantities": quantities})
    return {
        "points": [{**point.row(), "duplicates": point.duplicates} for point in points],
        "series": series,
    }


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is there whole or stays what it was. ModpressureError says why it can't be written."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                umask = os.umask(0)
                os.umask(umask)
                os.fchmod(file.fileno(), 0o666 & ~umask)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ModpressureError(f"cannot write {str(path)!r}: {error.strerror}") from None
