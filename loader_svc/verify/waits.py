"""Two loaders of one slow module: who waits for whom, what each gets, and when.

A line of the script is ``case waittest FILE1 FLAGS FILE2 INIT_MS INIT_RESULT SIGNAL_MS SA_RESTART``. The module has to
take its duration and result as parameters ``ms`` and ``ret``, as the init results say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from loader_svc.init_results import InitResults
from loader_svc.verify.agreement import (
    DELTA_COLUMNS,
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
from loader_svc.verify.script import Line, ScriptRunner, read_script
from loader_svc.virtual.machine import VirtualCall, VirtualMachine
from modpressure.errors import BadRequest
from modpressure.kernel.identity import KernelIdentity

COLUMNS: Final = ("kernel", "case", "errno1", "end1_ms", "errno2", "start2_ms", "end2_ms", *DELTA_COLUMNS)

DEFAULT_START2_MS: Final = 300

LATE_MS: Final = 300
LATE_SHARE: Final = 0.1
"""How much later than simulated an end may have been measured: the simulation's calls take no time of their own."""

_NS_PER_MS: Final = 1_000_000


def verify_waits(
    script: Path, table: Path, directories: Sequence[Path], init_results: InitResults, identity: KernelIdentity
) -> Agreement:
    """Run a script of pairs on each kernel of a table, from a fresh boot, and compare. NotFound, BadRequest."""
    lines = read_script(script)
    rows = {(row["kernel"], row["case"]): row for row in read_table(table, COLUMNS)}
    agreement = Agreement()
    with Files(directories) as files:
        for kernel in dict.fromkeys(kernel for kernel, _ in rows):
            machine = VirtualMachine(identity_of(kernel, identity), init_results=init_results)
            runner = ScriptRunner(machine, policy_of(kernel), files)
            for line in lines:
                if line.operation == "waittest":
                    _run_pair(agreement, kernel, runner, line, rows.pop((kernel, line.case), None))
                else:
                    runner.run(line)
    agreement.notes += [f"{kernel} {case}: not in the script" for kernel, case in rows]
    return agreement


def _run_pair(agreement: Agreement, kernel: str, runner: ScriptRunner, line: Line, row: Row | None) -> None:
    where = f"{kernel} {line.case}"
    try:
        flags, file2, init_ms, result, signal_ms, restarts = line.rest
        signal_ns, parameters = int(signal_ms) * _NS_PER_MS, f"ms={int(init_ms)} ret={int(result)}"
    except ValueError:
        raise BadRequest(f"line {line.number}: a waittest has FILE1 FLAGS FILE2 and four numbers") from None
    if signal_ns < 0 or int(init_ms) < 0:
        raise BadRequest(f"line {line.number}: {min(int(signal_ms), int(init_ms))} ms is no time")
    first = runner.call(replace(line, operation="finit", rest=(flags,)), parameters=parameters)
    second = runner.call(replace(line, operation="finit", file=file2, rest=(flags,)), parameters=parameters)
    if first is None or second is None:
        said = f"not run, there is no file {line.file if first is None else file2}"
        if row is not None:
            agreement.add(where, [said])
        else:
            agreement.notes.append(f"{where}: {said}")
        return
    machine = runner.machine
    before = replace(machine.counters)
    begun_ns = machine.clock.now_ns
    start2_ns = begun_ns + (number(row, "start2_ms") if row else DEFAULT_START2_MS) * _NS_PER_MS
    second.restarts = restarts != "0"
    machine.begin(first)
    machine.begin(second, start2_ns)
    if signal_ns:
        machine.interrupt(second, start2_ns + signal_ns)
    machine.run()
    if row is not None:
        differing = [
            *_call_differences(row, "1", first, begun_ns),
            *_call_differences(row, "2", second, begun_ns),
            *counter_differences(row, before, machine.counters),
        ]
        agreement.add(where, differing)


def _call_differences(row: Row, which: str, call: VirtualCall, begun_ns: int) -> list[str]:
    assert call.ending is not None
    differing = errno_difference(f"errno{which}", number(row, f"errno{which}"), errno_number(call.ending.errno))
    simulated_ms = (call.ended_ns - begun_ns) / _NS_PER_MS
    measured_ms = number(row, f"end{which}_ms")
    if not -1 <= measured_ms - simulated_ms <= LATE_MS + LATE_SHARE * simulated_ms:
        differing.append(f"end{which} measured at {measured_ms} ms, simulated at {simulated_ms:.0f} ms")
    return differing
