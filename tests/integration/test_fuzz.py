"""The fuzzer itself: it reaches every RPC, and it tells when one of them does what it must not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from fuzz.messages import Dice
from fuzz.services import ways
from fuzz.sessions import Session
from fuzz.tally import Tally
from fuzz.targets import targets
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
    assert "(session " in tally.findings[0]


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


def test_a_process_that_dies_is_a_crash() -> None:
    code = "import os; from fuzz import files, worker; files.fuzz = lambda count, seed: os.abort(); worker.main()"
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
            for number in range(40):
                for over_grpc, found in statuses.items():
                    tally = Tally(name)
                    dice = Dice(f"{SEED} {number}")
                    await Session(rpc, to[rpc.where], dice, tally, deque(), over_grpc=over_grpc).run()
                    found.append((name, number, *tally.statuses))
    assert statuses[False] == statuses[True]
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= {status for _, _, status in statuses[True]}


async def test_most_messages_are_of_their_type_and_are_read_by_the_service() -> None:
    for name in ("StatsService/ListSystems", "LedgerService/Connect"):
        tally = await fuzz(target(name), 300, SEED)
        assert 300 <= tally.messages < 600
        assert tally.parsed > tally.messages / 2
        assert not tally.bad, tally.findings
