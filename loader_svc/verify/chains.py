"""Storms on a chain of modules, loaded one after the other, of which not all are at hand: held against themselves."""

from __future__ import annotations

from collections.abc import Sequence

from loader_svc.verify.agreement import Row, number
from loader_svc.verify.kernels import policy_of


def chain_differences(row: Row, rows: Sequence[Row]) -> list[str]:
    """Hold a row of a chain of modules against its arithmetic and that of the other rows of its kind."""
    workers, modules = number(row, "N"), number(row, "files_per_worker")
    calls = sum(number(row, column) for column in ("ok", "eexist", "ebusy", "other"))
    becoming, late = number(row, "failed_becoming"), number(row, "failed_load")
    differing = []
    if calls != workers * modules:
        differing.append(f"{calls} results of {workers * modules} calls")
    if number(row, "modcount") != modules:
        differing.append(f"modcount {row['modcount']} of {modules} modules")
    differing += [
        f"{column} {row[column]} is not that of the other rows"
        for column in ("total_mod_size", "total_text_size")
        if any(row[column] != other[column] for other in rows if other["module"] == row["module"])
    ]
    early_bytes, late_bytes = number(row, "invalid_becoming_bytes"), number(row, "invalid_mod_bytes")
    if bool(becoming) != bool(early_bytes) or bool(late) != bool(late_bytes) or late_bytes % 2:
        differing.append(f"bytes {early_bytes} and {late_bytes} of {becoming} and {late} duplicates")
    if _is_unshared(row):
        # Every worker but one is a duplicate at every module, so all lengths are in there N - 1 times.
        if becoming + late != calls - number(row, "ok") or number(row, "ok") != modules:
            differing.append(f"{becoming + late} duplicates, {calls - number(row, 'ok')} failures")
        others = {_chain_bytes(other) for other in rows if other["module"] == row["module"] and _is_unshared(other)}
        if len(others - {None}) > 1:
            differing.append(f"the files' lengths come to {_chain_bytes(row)} bytes, elsewhere to other ones")
    elif becoming + late > calls - number(row, "ok"):
        differing.append(f"{becoming + late} duplicates counted, {calls - number(row, 'ok')} calls failed")
    return differing


def _is_unshared(row: Row) -> bool:
    return not policy_of(row["kernel"]).share_in_flight or row["separate_copies"] != "0"


def _chain_bytes(row: Row) -> float | None:
    """Return the sum of the lengths of a chain's files by what a row says was wasted; None where that was nothing."""
    workers = number(row, "N")
    if workers < 2:
        return None
    return (number(row, "invalid_becoming_bytes") + number(row, "invalid_mod_bytes") / 2) / (workers - 1)
