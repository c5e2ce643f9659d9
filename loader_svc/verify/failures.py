"""Calls that fail, and those between them: errno and every counter of each, in the order of a script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from loader_svc.init_results import InitResults
from loader_svc.verify.agreement import (
    Agreement,
    Row,
    counter_differences,
    errno_difference,
    errno_number,
    number,
    read_table,
)
from loader_svc.verify.files import Files
from loader_svc.verify.kernels import identity_of, policy_of
from loader_svc.verify.script import WITHOUT_CALL, Line, ScriptRunner, read_script
from loader_svc.virtual.machine import VirtualMachine
from modpressure.errors import BadRequest, OverLimit
from modpressure.kernel.identity import KernelIdentity

COLUMNS: Final = ("kernel", "case", "op", "path", "errno")

Key = tuple[str, str, str]


def verify_failures(
    script: Path, table: Path, directories: Sequence[Path], init_results: InitResults, identity: KernelIdentity
) -> Agreement:
    """Run a script on each kernel of a table that has rows of it, from a fresh boot, and compare.

    A line without a row is run all the same. NotFound, BadRequest for files that are not there or make no sense.
    """
    lines = read_script(script)
    rows = read_table(table, COLUMNS)
    cases = {_key_of_line(line) for line in lines}
    kernels = list(dict.fromkeys(row["kernel"] for row in rows if _key_of_row(row) in cases))
    if not kernels:
        raise BadRequest(f"{table} has no row of {script}")
    agreement = Agreement()
    with Files(directories) as files:
        for kernel in kernels:
            measured: dict[Key, list[Row]] = {}
            for row in rows:
                if row["kernel"] == kernel:
                    measured.setdefault(_key_of_row(row), []).append(row)
            machine = VirtualMachine(identity_of(kernel, identity), init_results=init_results)
            runner = ScriptRunner(machine, policy_of(kernel), files)
            for line in lines:
                pending = measured.get(_key_of_line(line))
                _run_line(agreement, kernel, runner, line, pending.pop(0) if pending else None)
            for left in measured.values():
                agreement.notes += [f"{kernel} {row['case']}: not in the script" for row in left]
    agreement.notes = list(dict.fromkeys(agreement.notes))
    return agreement


def _key_of_line(line: Line) -> Key:
    return line.case, line.operation, line.file


def _key_of_row(row: Row) -> Key:
    return row["case"], row["op"], row["path"]


def _run_line(agreement: Agreement, kernel: str, runner: ScriptRunner, line: Line, row: Row | None) -> None:
    before = replace(runner.machine.counters)
    where = f"{kernel} {line.case}"
    try:
        errno = runner.run(line)
    except OverLimit as error:
        # Too large to be taken on here: the rest of the script can be run all the same.
        if row is not None:
            agreement.add(where, [str(error)])
        else:
            agreement.notes.append(f"{where}: {error}")
        return
    if errno is None:
        if row is not None:
            agreement.add(where, [f"not run, there is no file {line.file}"])
        else:
            agreement.notes.append(f"{where}: not run, there is no file {line.file}")
    elif row is not None and line.operation not in WITHOUT_CALL:
        differing = errno_difference("errno", number(row, "errno"), errno_number(errno))
        agreement.add(where, differing + counter_differences(row, before, runner.machine.counters))
