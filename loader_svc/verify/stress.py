"""Stress workers: 100 of them load a module again and again; no timing is compared, only what must add up.

Rows with ``no_unload`` are one storm, and their totals have to be the simulation's. The others are held against their
invariants (sizes = modcount times the module's, bytes = the rule times the counts, a result for every failure), and so
is a simulation of the same loop, with fewer turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from loader_svc.init_results import InitResults
from loader_svc.plan import Plan
from loader_svc.verify.agreement import DELTA_COLUMNS, MAX_WORKERS, Agreement, Row, bounded, number, read_table
from loader_svc.verify.crowd import Crowd, Repeater, Target, Targets
from loader_svc.verify.files import Files
from loader_svc.verify.kernels import identity_of, policy_of
from loader_svc.verify.sharing import shared_differences
from modpressure.kernel.identity import KernelIdentity

COLUMNS: Final = ("kernel", "case", "path", "workers", "no_unload", "ok", "eexist", "ebusy", "other", *DELTA_COLUMNS)

CPUS: Final = 4
TURNS: Final = 2
"""How often each worker of the simulation loads; invariants do not need more."""


def verify_stress(
    table: Path, directories: Sequence[Path], identity: KernelIdentity, init_results: InitResults | None = None
) -> Agreement:
    """Repeat every run of a table in virtual time and compare. NotFound, BadRequest."""
    agreement = Agreement()
    with Files(directories) as files:
        for row in read_table(table, COLUMNS):
            where = f"{row['kernel']} {row['case']}"
            bounded(row, "workers", MAX_WORKERS)
            kernel = identity_of(row["kernel"], identity)
            targets = Targets(files, kernel, init_results or InitResults())
            target = targets.find(PurePosixPath(row["path"]).name.partition(".")[0])
            if target is None:
                agreement.add(where, [f"not run, there is no file {row['path']} or of what it needs"])
                continue
            plan = targets.plan(target)
            once = row["no_unload"] != "0"
            simulated = _simulate(row, target, plan, targets, kernel, once=once)
            measured = {column: number(row, column) for column in simulated}
            if once:
                is_shared = policy_of(row["kernel"]).share_in_flight
                differing = _total_differences(measured, simulated, is_shared=is_shared)
            else:
                differing = [f"measured: {each}" for each in _broken(measured, plan, row)]
            agreement.add(where, differing + [f"simulated: {each}" for each in _broken(simulated, plan, row)])
    return agreement


def _simulate(
    row: Row, target: Target, plan: Plan, targets: Targets, identity: KernelIdentity, *, once: bool
) -> dict[str, int]:
    crowd = Crowd(targets, identity, policy_of(row["kernel"]), cpus=CPUS, seed=1, separate_copies=False)
    crowd.prepare(target)
    if once:
        crowd.release(target, number(row, "workers"))
    else:
        for worker in range(number(row, "workers")):
            Repeater(crowd, target, plan.module, worker, TURNS).begin()
    crowd.machine.run()
    errnos = crowd.errnos
    result = {"ok": errnos[""], "eexist": errnos["EEXIST"], "ebusy": errnos["EBUSY"]}
    result["other"] = errnos.total() - sum(result.values())
    result |= {column: getattr(crowd.machine.counters, name) for column, name in DELTA_COLUMNS.items()}
    return result


def _total_differences(measured: Mapping[str, int], simulated: Mapping[str, int], *, is_shared: bool) -> list[str]:
    columns = ["d_modcount", "d_total_mod_size", "d_total_text_size"]
    if not is_shared:
        columns += ["ok", "eexist", "ebusy", "other"]
    differing = [
        f"{column} measured {measured[column]}, simulated {simulated[column]}"
        for column in columns
        if measured[column] != simulated[column]
    ]
    if is_shared:
        for which, values in (("measured", measured), ("simulated", simulated)):
            calls = sum(values[column] for column in ("ok", "eexist", "ebusy", "other"))
            differing += shared_differences(which, values, _found(values), calls)
    elif sum(_found(measured)) != sum(_found(simulated)):
        differing.append(f"duplicates measured {sum(_found(measured))}, simulated {sum(_found(simulated))}")
    return differing


def _found(values: Mapping[str, int]) -> tuple[int, int]:
    """Return how many duplicates were found early, and late."""
    return values["d_failed_becoming"], values["d_failed_load_modules"]


def _broken(values: Mapping[str, int], plan: Plan, row: Row) -> list[str]:
    """Say which of the invariants do not hold."""
    assert plan.layout is not None
    loaded, becoming, late = values["d_modcount"], values["d_failed_becoming"], values["d_failed_load_modules"]
    failures = values["eexist"] + values["ebusy"] + values["other"]
    expected = {
        "d_total_mod_size": loaded * plan.layout.total_bytes,
        "d_total_text_size": loaded * plan.layout.text_bytes,
        "d_invalid_becoming_bytes": becoming * plan.image_bytes,
        "d_invalid_mod_bytes": late * 2 * plan.image_bytes,
        "d_invalid_kread_bytes": 0,
        "d_invalid_decompress_bytes": 0,
    }
    broken = [f"{name} is {values[name]}, must be {value}" for name, value in expected.items() if values[name] != value]
    if policy_of(row["kernel"]).share_in_flight:
        if loaded > values["ok"] or becoming + late > failures:
            broken.append(f"{loaded} loads and {becoming + late} duplicates, {values['ok']} and {failures} results")
    elif loaded != values["ok"] or becoming + late != failures:
        broken.append(f"{loaded} loads and {becoming + late} duplicates, {values['ok']} and {failures} results")
    return broken
