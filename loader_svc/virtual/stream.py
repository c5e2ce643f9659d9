"""Sending the calls of a simulation to stats_svc as it goes on, where they count as those of a system like any other.

At its end follow the modules that it left live, with their links, and the most that it held, so that they are listed.

The simulation runs in a thread and hands over one call after the other; they leave in batches, and the next batch waits
until the one before is committed. So memory stays as it is however many calls there are, and a simulation that is
faster than stats_svc is held up.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from loader_svc.call_links import ExportTables
from loader_svc.ledger_client import LedgerClient
from loader_svc.memory import Meter
from loader_svc.presence import IN_FLIGHT_PATIENCE_SECONDS, PATIENCE_SECONDS
from loader_svc.requests import POLICIES
from loader_svc.virtual.call import VirtualCall
from loader_svc.virtual.machine import VirtualMachine
from modpressure.kernel.outcome import Outcome
from modpressure.kernel.policy import Policy
from modpressure.tls import ClientTls
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb

BATCH_CALLS: Final = 1000
"""Calls that are sent, committed and answered together."""

Result = TypeVar("Result")

Send = Callable[[call_pb2.Call], None]
"""Takes one call that has ended; for the thread that the simulation runs in."""


@dataclass(frozen=True, slots=True)
class StatsTarget:
    """Where the calls go."""

    address: str
    system: str
    """The system's id; made if there is none."""

    tls: ClientTls | None = None
    token_file: Path | None = None


Simulation = Callable[[Send], tuple[Result, VirtualMachine]]
"""Carries a simulation out, sending each call; returns what came of it, and the machine that is left."""


async def streamed(target: StatsTarget, loader: str, simulate: Simulation[Result]) -> Result:
    """Run ``simulate`` in a thread, and have stats_svc count each call that it sends; return once all are committed.

    ``loader`` is what the simulation calls itself, as loaders have names. Unavailable if stats_svc does not answer,
    NotNow if it makes no sense of a call; what was committed until then stays. Else what ``simulate`` raises.
    """
    client = LedgerClient(
        target.address,
        tls=target.tls,
        token_file=target.token_file,
        instance_id=uuid.uuid4().hex,
        meter=Meter(),
        on_released=lambda call_id: None,
        on_connected=lambda connected: None,
    )
    client.loader = loader
    running = asyncio.ensure_future(client.run())
    try:
        try:
            await asyncio.wait_for(client.wait_connected(), PATIENCE_SECONDS)
        except TimeoutError:
            raise client.unavailable() from None
        await client.policy_of(target.system)
        return await _run(client, target.system, simulate)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _run(client: LedgerClient, system: str, simulate: Simulation[Result]) -> Result:
    loop = asyncio.get_running_loop()
    batch: list[call_pb2.Call] = []
    made = 0

    async def ask(**asked: Any) -> None:
        operation = pb.Operation(call_id=client.new_call_id(), system=system, **asked)
        try:
            await asyncio.wait_for(client.ask(operation), IN_FLIGHT_PATIENCE_SECONDS)
        except TimeoutError:
            raise client.unavailable() from None

    def send(call: call_pb2.Call) -> None:
        nonlocal made
        made += 1
        call.system, call.call_id = system, made
        batch.append(call)
        if len(batch) >= BATCH_CALLS:
            # Waiting here holds the simulation up while stats_svc is slower than it.
            asked = ask(record_calls=pb.RecordCalls(calls=batch))
            asyncio.run_coroutine_threadsafe(asked, loop).result()
            batch.clear()

    result, machine = await asyncio.to_thread(simulate, send)
    if batch:
        await ask(record_calls=pb.RecordCalls(calls=batch))
    await ask(record_modules=_modules_of(machine))
    return result


def _modules_of(machine: VirtualMachine) -> pb.RecordModules:
    """Return what is in a machine's list, oldest first, and the most that it held."""
    record = pb.RecordModules(peak_held_bytes=machine.areas.peak_bytes)
    tables = ExportTables()
    for entry in reversed(list(machine.modules)):
        module = record.modules.add(module=entry.name, core_bytes=entry.core_bytes)
        if entry.name in machine.links:
            formation = machine.links.of(entry.name)
            module.formation.exports = tables.of(formation.exports, entry.name)
            for owner in formation.uses:
                module.formation.uses.add(module=owner)
            module.formation.proprietary = formation.is_proprietary
            module.formation.permanent = formation.is_permanent
            module.formation.percpu_bytes = formation.percpu_bytes
    return record


class Messages:
    """Makes messages of calls in virtual time, which begins at a moment of real time."""

    def __init__(self, policy: Policy, epoch_ns: int | None = None) -> None:
        """``epoch_ns`` is that moment, since 1970; now if None."""
        self._policy = next(number for number, each in POLICIES.items() if each == policy)
        self._epoch_ns = time.time_ns() if epoch_ns is None else epoch_ns

    def of(
        self, call: VirtualCall, requester: str, origin: call_pb2.Origin.ValueType = call_pb2.ORIGIN_USERSPACE
    ) -> call_pb2.Call:
        """Return the message of one call that has ended; ``requester`` and ``origin`` say who asked."""
        ending, spec = call.ending, call.spec
        assert ending is not None
        message = call_pb2.Call(
            worker=call.worker,
            origin=origin,
            requester=requester,
            module=ending.module,
            file=call.path,
            policy=self._policy,  # type: ignore[arg-type]
            syscall=int(spec.syscall),  # type: ignore[arg-type]
            flags=spec.flags,
            outcome=int(ending.outcome),  # type: ignore[arg-type]
            errno=ending.errno,
            check=ending.check,
            value=ending.value,
            duplicate=ending.duplicate,
            duration_ns=call.ended_ns - call.begun_ns,
            wait_ns=call.wait_ns,
            peak_held_bytes=call.peak_held_bytes,
        )
        if call.plan is not None:
            loadable, outcome = call.loadable, ending.outcome
            message.file_bytes = call.plan.version.size_bytes
            message.image_bytes = loadable.length_bytes if outcome is Outcome.KREAD else loadable.image_bytes
            message.compressed_bytes = loadable.compressed_bytes
            if outcome in (Outcome.LIVE, Outcome.LOAD, Outcome.INIT):
                message.mod_bytes, message.text_bytes = loadable.layout_bytes, loadable.text_bytes
        message.start_time.FromNanoseconds(self._epoch_ns + call.begun_ns)
        return message
