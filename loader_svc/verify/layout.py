"""Sizes of modules: what a kernel's /sys/module and counters said of each, against the layout of its file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from loader_svc.image import ImageProblem, algorithm_of, plan_layout, read_elf, strip_signature, user_decompress
from loader_svc.image.compression import SUFFIXES
from loader_svc.plan import layout_config
from loader_svc.verify.agreement import Agreement, Row, number, read_table
from modpressure.errors import NotFound
from modpressure.kernel.identity import KernelIdentity

COLUMNS: Final = ("module", "relpath", "coresize")

MEASURES: Final = {
    "coresize": "core_bytes",
    "total_mod_size_delta": "total_bytes",
    "total_text_size_delta": "text_bytes",
}
"""Columns, and the layout's own words for them."""

_LARGEST_BYTES: Final = 1 << 30


def verify_layout(table: Path, tree: Path, identity: KernelIdentity) -> Agreement:
    """Lay out every module of a table whose file is in a tree, as it was measured, and compare.

    The files may be packed where the measured ones were not. NotFound, BadRequest.
    """
    rows = read_table(table, COLUMNS)
    if not tree.is_dir():
        raise NotFound(f"there is no directory {str(tree)!r}", field="tree")
    agreement = Agreement()
    absent = 0
    for row in rows:
        path = _file_of(tree, row["relpath"])
        if path is None:
            absent += 1
        else:
            _compare(agreement, row, path, identity)
    if absent:
        agreement.notes.append(f"{absent} of {len(rows)} rows not compared: their files are not in {tree}")
    return agreement


def _file_of(tree: Path, relpath: str) -> Path | None:
    for suffix in ("", *SUFFIXES):
        path = tree / (relpath + suffix)
        if path.is_file():
            return path
    return None


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _compare(agreement: Agreement, row: Row, path: Path, identity: KernelIdentity) -> None:
    where = row["relpath"]
    content = path.read_bytes()
    try:
        algorithm = algorithm_of(path.name, content[:6])
        if algorithm is not None:
            content = b"".join(user_decompress(content, algorithm, limit_bytes=_LARGEST_BYTES))
        # A signature is behind all else, and changes nothing of what is measured here.
        unsigned = memoryview(content)[: strip_signature(content)[0]]
        if row.get("sha256") and row["sha256"] not in (_sha256(content), _sha256(unsigned)):
            agreement.notes.append(f"{where}: not compared, another file than the one that was measured")
            return
        layout = plan_layout(read_elf(unsigned), layout_config(identity, 0))
    except ImageProblem as problem:
        agreement.add(where, [str(problem)])
        return
    differing = []
    for column, measure in MEASURES.items():
        if row.get(column):
            measured, simulated = number(row, column), getattr(layout, measure)
            if measured != simulated:
                differing.append(f"{column} measured {measured}, simulated {simulated}")
    agreement.add(where, differing)
