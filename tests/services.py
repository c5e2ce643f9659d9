"""Real services for tests, and a hand on the ledger that plays another loader."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as ledger
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceStub

START_SECONDS = 60
STOP_SECONDS = 20


@dataclass
class Process:
    """A service that runs, and what it has logged."""

    popen: subprocess.Popen[str]
    address: str = ""
    lines: list[str] = field(default_factory=list)
    status: int = 0
    """What it is to exit with, unless it is killed."""

    _reader: threading.Thread | None = None

    def start(self) -> None:
        """Read its log until it says where it listens, and go on reading."""
        listening = threading.Event()

        def read() -> None:
            assert self.popen.stderr is not None
            for line in self.popen.stderr:
                self.lines.append(line)
                with contextlib.suppress(json.JSONDecodeError, AttributeError):
                    self.address = self.address or json.loads(line).get("address", "")
                if self.address:
                    listening.set()
            listening.set()

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        assert listening.wait(START_SECONDS), "it neither listens nor ends"
        assert self.address, f"it ended with {self.popen.wait()}: {''.join(self.lines)}"

    def resident_bytes(self) -> int:
        """Return its resident set."""
        pages = Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()

    def stop(self) -> int:
        """End it gracefully; return its exit status."""
        if self.popen.poll() is None:
            self.popen.terminate()
        try:
            status = self.popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise
        if self._reader is not None:
            self._reader.join()
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        return status


Launch = Callable[..., Process]


@contextlib.contextmanager
def launching(state_home: Path) -> Iterator[Launch]:
    """Give what starts ``python -m`` with arguments; at the end all are stopped, and none may have crashed."""
    processes: list[Process] = []
    # What a developer has set must not change what is tested.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODPRESSURE_")}
    environment["XDG_STATE_HOME"] = str(state_home)

    def start(*arguments: str) -> Process:
        popen = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--log-format", "json"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        process = Process(popen)
        processes.append(process)
        process.start()
        return process

    yield start
    ends = [(process.stop(), process.status) for process in reversed(processes)]
    logged = "".join(line for process in processes for line in process.lines)
    assert all(end in (status, -signal.SIGKILL) for end, status in ends), logged
    assert "Traceback" not in logged, logged


class Hand:
    """A hand on the ledger: asks single operations, as some other loader's calls would."""

    def __init__(self, address: str, name: str, system: str = "default") -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stream = LedgerServiceStub(self._channel).Connect()
        self._name = name
        self._system = system
        self._sequence = 0

    async def open(self) -> None:
        """Say hello and open the system."""
        await self._stream.write(ledger.ConnectRequest(hello=ledger.Hello(instance_id=self._name, loader=self._name)))
        await self._stream.read()
        await self.ask(ledger.Operation(call_id=1, open_system=ledger.OpenSystem()))

    async def tell(self, operation: ledger.Operation) -> None:
        """Send an operation."""
        operation.system = self._system
        await self.send([operation])

    async def send(self, operations: list[ledger.Operation]) -> None:
        """Send operations as one batch, as they are."""
        self._sequence += 1
        has_claims = any(operation.HasField("claim_request") for operation in operations)
        batch = ledger.OperationBatch(sequence=self._sequence, operations=operations, has_claims=has_claims)
        await self._stream.write(ledger.ConnectRequest(batch=batch))

    async def answer(self) -> ledger.OperationResult:
        """Return the next answer."""
        while True:
            response = await self._stream.read()
            assert isinstance(response, ledger.ConnectResponse), await self._stream.details()
            if response.results.results:
                [result] = response.results.results
                return result

    async def ask(self, operation: ledger.Operation) -> ledger.OperationResult:
        """Send an operation and return its answer."""
        await self.tell(operation)
        return await self.answer()

    async def reserve(self, call_id: int, module: str) -> ledger.OperationResult:
        """Insert a name as unformed."""
        return await self.ask(ledger.Operation(call_id=call_id, reserve_name=ledger.ReserveName(module=module)))

    async def give_up(self, call_id: int, module: str) -> None:
        """End the call that has inserted a name, as one whose init fails."""
        call = call_pb2.Call(module=module, outcome=call_pb2.OUTCOME_INIT, errno="ENODEV")
        finish = ledger.FinishCall(call=call, reserved=True)
        result = await self.ask(ledger.Operation(call_id=call_id, finish_call=finish))
        assert result.verdict == ledger.OperationResult.VERDICT_PROCEED, result

    async def close(self) -> None:
        """Hang up."""
        self._stream.cancel()
        await self._channel.close()
