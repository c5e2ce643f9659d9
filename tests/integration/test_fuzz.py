"""The fuzzer itself: it reaches every RPC, and it tells when one of them does what it must not."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory

from fuzz import files
from fuzz.__main__ import INTERRUPTED
from fuzz.calls import Way
from fuzz.invariants import broken
from fuzz.messages import MODULES, SYSTEMS, Dice, Maker
from fuzz.pulse import Pulse
from fuzz.services import ways
from fuzz.sessions import History, Session
from fuzz.tally import Tally
from fuzz.targets import Where, targets
from fuzz.worker import fuzz
from stats_svc.names import check_system_id
from stats_svc.system import System

SEED = 20261127


def target(name: str) -> Any:
    return next(target for target in targets() if target.name == name)


def test_every_rpc_of_both_services_is_a_target() -> None:
    names = {target.name for target in targets()}
    assert len(names) == len(targets())
    assert {"StatsService/GetReport", "LedgerService/Connect", "LoaderService/RunStorm", "Health/Watch"} <= names
    contract = "\n".join(path.read_text() for path in (Path(__file__).parents[2] / "protos").rglob("*.proto"))
    assert {name.partition("/")[2] for name in names} >= set(re.findall(r"^  rpc (\w+)", contract, re.MULTILINE))


async def test_an_error_that_nobody_foresaw_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlooked(value: str) -> str:
        if "\0" in value:
            raise ValueError("embedded null byte")
        return check_system_id(value)

    monkeypatch.setattr("stats_svc.servicer.check_system_id", overlooked)
    tally = await fuzz(target("StatsService/GetStats"), 300, SEED)
    assert tally.internal
    assert tally.bad
    assert "INTERNAL: something went wrong" in tally.findings[0]
    # It names what did it, and the session alone does it again.
    found = re.search(r"(\w+)\), session (\d+)$", tally.findings[0])
    assert found, tally.findings[0]
    again = await fuzz(target("StatsService/GetStats"), 1, SEED, only=int(found[2]))
    assert any(f"{found[1]}), session" in finding for finding in again.findings)


async def test_what_does_not_add_up_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that logs each call, and counts all but the first."""
    add = System._add
    forgotten: list[Any] = []

    def forgetful(self: System, delta: Any, counted: Any) -> None:
        if forgotten:
            add(self, delta, counted)
        forgotten.append(counted)

    monkeypatch.setattr(System, "_add", forgetful)
    tally = await fuzz(target("LoaderService/LoadModule"), 50, SEED)
    assert tally.wrong
    assert any("its events say" in finding for finding in tally.findings)


async def test_a_damaged_file_of_a_system_is_read_to_where_it_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that stores events as they come, so that whoever lists them meets what nobody foresaw."""
    monkeypatch.setattr("stats_svc.system_file._check_segment", lambda *_: None)
    tally = await fuzz(target("StatsService/ImportSystem"), 6000, SEED)
    assert tally.statuses["OK"] and tally.statuses["INVALID_ARGUMENT"]
    assert any("ListEventsRequest in the imported system" in finding for finding in tally.findings), tally.findings


async def test_a_service_that_is_gone_in_the_end_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def of_another(to: dict[Where, Way]) -> list[str]:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/nobody.sock") as channel:
            return await broken({**to, "loader": Way(channel, to["loader"].service)})

    monkeypatch.setattr("fuzz.worker.broken", of_another)
    tally = await fuzz(target("StatsService/GetStats"), 50, SEED)
    assert tally.wrong == 1
    assert tally.findings[0].startswith("the services do not answer any more: UNAVAILABLE: failed to connect")


def test_a_process_that_dies_is_a_crash() -> None:
    code = "import os; from fuzz import files, worker; files.fuzz = lambda *_: os.abort(); worker.main()"
    done = subprocess.run([sys.executable, "-c", code, "1", "1"], input="files\n", text=True, capture_output=True)
    assert done.returncode
    assert not done.stdout


def test_a_tally_survives_the_way_between_processes() -> None:
    tally = Tally("x", messages=3, hangs=1, findings=["y"])
    tally.statuses["answer UNKNOWN"] += 2
    again = Tally.from_json(json.loads(json.dumps(tally.to_json())))
    assert again == tally
    assert (again.internal, again.bad) == (2, True)


READS = ("StatsService/GetReport", "StatsService/ListEvents", "LoaderService/ListModules", "LoaderService/GetModule")


async def test_what_begins_inside_of_a_service_ends_as_it_does_over_grpc(tmp_path: Path) -> None:
    """Of reads, with nobody else about: then the same messages must have the same status, each time."""
    statuses: dict[bool, list[Any]] = {False: [], True: []}
    async with ways(tmp_path) as to:
        for name in READS:
            rpc = target(name)
            for number in range(4):
                for over_grpc, found in statuses.items():
                    tally = Tally(name)
                    dice = Dice(f"{SEED} {number}")
                    await Session(rpc, to[rpc.where], dice, tally, History(rpc), Pulse(), over_grpc).run()
                    found.append((name, number, tally.statuses))
    assert statuses[False] == statuses[True]
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= {status for *_, found in statuses[True] for status in found}


async def test_most_messages_are_of_their_type_and_are_read_by_the_service() -> None:
    for name in ("StatsService/ListSystems", "LedgerService/Connect"):
        tally = await fuzz(target(name), 300, SEED)
        assert 300 <= tally.messages < 600
        assert tally.parsed > tally.messages / 2
        assert not tally.bad, tally.findings


async def test_a_request_that_a_service_has_seen_is_known() -> None:
    history = History(target("StatsService/GetStats"))
    assert history.is_new(b"\x0a\x01x")
    assert not history.is_new(b"\x0a\x01x")
    # A field that the service does not know, an earlier value of one that it knows.
    assert not history.is_new(b"\x0a\x01x\x50\x01")
    assert not history.is_new(b"\x0a\x01y\x0a\x01x")
    assert history.is_new(b"\x0a\x01y")
    # What is no message is like nothing else.
    assert history.is_new(b"\x0a\x05x")
    assert not history.is_new(b"\x0a\x05x")
    assert history.is_new(b"\x0a" + bytes([99]) + b"x" * 99)
    assert history.is_new(b"\x0a" + bytes([99]) + b"x" * 99)


def test_messages_have_the_values_that_a_client_may_mean() -> None:
    """In the wire format, for each type of field that the contract has."""
    meant: dict[str, Any] = {"system": SYSTEMS, "module": ("", *MODULES), "page_size": (0, 1, 2, 10, 1000, 10_000, -1)}
    for rpc in targets():
        make = message_factory.GetMessageClass(rpc.request)
        for number in range(50):
            message = make.FromString(Maker(Dice(f"{SEED} {number}")).message(rpc.request, 0.0))
            again = make.FromString(message.SerializeToString())
            again.DiscardUnknownFields()
            assert again == message or "nan" in str(message)
            for name, values in meant.items():
                assert getattr(message, name, "") in values or name not in _scalars(rpc), message


def _scalars(rpc: Any) -> set[str]:
    return {field.name for field in rpc.request.fields if not field.message_type and not field.is_repeated}


async def test_what_does_not_end_is_given_up() -> None:
    pulse = Pulse(answer_seconds=0.3)
    with pulse.watched():
        with pytest.raises(TimeoutError), pulse.limited():
            await asyncio.Event().wait()
        with pulse.limited():
            pass
        # Who is cancelled by somebody else is cancelled.
        task = asyncio.ensure_future(_limited_for_ever(pulse))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def _limited_for_ever(pulse: Pulse) -> None:
    with pulse.limited():
        await asyncio.Event().wait()


@pytest.mark.parametrize("name", ["StatsService/GetStats", files.NAME])
def test_a_process_that_nobody_asks_any_more_ends(name: str) -> None:
    """As after kill -9 of the run, which closes what the names come through."""
    command = [sys.executable, "-m", "fuzz.worker", "1000000000", str(SEED)]
    done = subprocess.run(command, input=f"{name}\n", text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert Tally.from_json(json.loads(done.stdout)).messages < 1_000_000


@pytest.mark.parametrize("name", ["StatsService/GetStats", files.NAME])
def test_an_interrupted_run_tells_what_it_has(name: str) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "fuzz", name, "StatsService/GetReport", "Health/Check"],
        env={**os.environ, "FUZZ_MESSAGES": "1000000000", "FUZZ_SEED": str(SEED)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stderr is not None
    begun = run.stdout.readline()
    assert run.stderr.readline().split() == [name, "begun"]
    run.send_signal(signal.SIGINT)
    told, errors = run.communicate()
    assert begun.startswith(f"seed {SEED}: ")
    assert run.returncode == INTERRUPTED, (told, errors)
    assert re.search(rf"^{name} +\d+ messages", told, re.MULTILINE)
    assert "interrupted: " in told
    assert "crashes 0\n" in told
