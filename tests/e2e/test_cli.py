"""Every command of ``modpressure``, as its users run it, on services that ``modpressure up`` has started."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import signal
import socket
import sqlite3
import subprocess
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import pytest

from modpressure.cli.output import plain
from modpressure.client import Client
from modpressure.errors import BadRequest
from modpressure.settings import LoaderSettings
from tests.certificates import Authority
from tests.e2e.conftest import EXECUTABLE, TIMEOUT_SECONDS, Cli, Done, StartUp, Up, alive, end

T = TypeVar("T")


@pytest.fixture
def system(machine: Up) -> str:
    """A system of the test's own, policy v6.4."""
    name = f"t{uuid.uuid4().hex[:12]}"
    through_client(machine.cli, lambda client: client.create_system(name))
    return name


@pytest.fixture
def cli_on(machine: Up, system: str) -> Cli:
    """Commands about the test's own system."""
    return Cli({**machine.cli.environment, "MODPRESSURE_CLIENT_SYSTEM": system}, machine.cli.directory)


def through_client(cli: Cli, action: Callable[[Client], Awaitable[T]]) -> T:
    """Do something about which the command line is not in question, at once."""

    async def act() -> T:
        loaders = cli.environment["MODPRESSURE_CLIENT_LOADERS"].split(",")
        async with Client(loaders, cli.environment["MODPRESSURE_CLIENT_STATS"]) as client:
            return await action(client)

    return asyncio.run(act())


def stats_of(cli: Cli) -> dict[str, Any]:
    return plain(through_client(cli, lambda client: client.stats(cli.environment["MODPRESSURE_CLIENT_SYSTEM"])))


def load(cli: Cli, *modules: str) -> None:
    """Load modules without what they depend on, whatever comes of it."""

    async def act(client: Client) -> None:
        for module in modules:
            await client.load(module, system=cli.environment["MODPRESSURE_CLIENT_SYSTEM"], with_dependencies=False)

    through_client(cli, act)


# --- loading -------------------------------------------------------------------------------------------------------


def test_load_brings_in_dependencies_first_and_again_makes_no_call(cli_on: Cli) -> None:
    done = cli_on("load", "xfs")
    assert (done.code, done.err) == (0, "")
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0][:3] == ["Module", "Outcome", "Errno"]
    assert [row[1] for row in rows[1:]] == ["live"] * len(rows[1:])
    assert rows[-1][0] == "xfs"
    assert "libcrc32c" in [row[0] for row in rows[1:-1]]

    again = cli_on("load", "xfs")
    assert again == Done(0, "", "modpressure load: xfs is already loaded or built in; no call was made\n")
    assert cli_on("load", "xfs", "--strict").code == 1
    assert stats_of(cli_on)["calls"] == len(rows) - 1


def test_load_without_dependencies_is_a_call_each_time(cli_on: Cli) -> None:
    assert cli_on("load", "pcspkr", "--no-deps").code == 0
    again = cli_on("load", "pcspkr", "--no-deps")
    assert again.code == 0
    assert again.err == "modpressure load: pcspkr is already loaded: EEXIST: File exists (becoming, duplicate)\n"
    strict = cli_on("load", "pcspkr", "--no-deps", "--strict", "--policy", "v6.3", "--json")
    assert strict.code == 1
    [loaded] = strict.json["loads"]
    assert (loaded["call"]["errno"], loaded["call"]["outcome"]) == ("EEXIST", "OUTCOME_LOAD")
    assert loaded["error"].startswith("pcspkr is already loaded: EEXIST: File exists (load")
    assert stats_of(cli_on)["duplicates"] == 2


def test_several_modules_are_all_tried(cli_on: Cli) -> None:
    done = cli_on("load", "pcspkr", "no_such_module", "loop", "--json")
    assert done.code == 1
    assert [bool(loaded.get("error")) for loaded in done.json["loads"]] == [False, True, False]
    assert "no_such_module" in done.err
    assert stats_of(cli_on)["live_modules"] == 2


def test_an_errno_has_its_words(cli_on: Cli) -> None:
    sentence = cli_on("load", "nonsense").err
    assert sentence.startswith("modpressure load: nonsense: ENOEXEC: Exec format error (")
    assert cli_on("load", "nonsense").code == 1
    assert cli_on("load", "empty").code == 1


def test_what_is_no_module_is_one_sentence(cli_on: Cli) -> None:
    assert "'no_such_module'" in cli_on.fails(1, "load", "no_such_module")
    assert "'../pcspkr'" in cli_on.fails(2, "load", "../pcspkr")
    assert "no_such_module" in cli_on.fails(1, "storm", "-m", "no_such_module", "-w", "2")
    assert "no_such_module" in cli_on.fails(1, "modules", "info", "no_such_module")


def test_unload(cli_on: Cli) -> None:
    load(cli_on, "pcspkr")
    assert cli_on("unload", "pcspkr") == Done(0, "", "")
    assert cli_on.fails(1, "unload", "pcspkr") == "modpressure unload: pcspkr: ENOENT: No such file or directory"
    done = cli_on("unload", "pcspkr", "--json")
    assert done.json["unloads"][0]["unload"]["errno"] == "ENOENT"
    assert stats_of(cli_on)["unloads"] == 1


def test_what_has_an_id_is_done_once(cli_on: Cli) -> None:
    first = cli_on("load", "pcspkr", "--request-id", "first", "--json")
    assert cli_on("unload", "pcspkr", "--request-id", "second") == Done(0, "", "")
    assert cli_on("load", "pcspkr", "--request-id", "first", "--json") == first
    assert cli_on("unload", "pcspkr", "--request-id", "second") == Done(0, "", "")
    assert (stats_of(cli_on)["modcount"], stats_of(cli_on)["unloads"]) == (1, 1)
    sentence = "modpressure: request_id 'first' was used for another request; it stands for that one for a day"
    assert cli_on.fails(1, "load", "loop", "--request-id", "first") == sentence
    sentence = "modpressure: --request-id x is for one module, but 2 are given"
    assert cli_on.fails(2, "unload", "loop", "xfs", "--request-id", "x") == sentence


def test_what_another_module_uses_is_listed_so_and_stays(cli_on: Cli) -> None:
    cli_on("load", "xfs")
    rows = {row[0]: row[1:] for row in (line.split() for line in cli_on("modules", "loaded").out.splitlines())}
    assert rows["Module"][:3] == ["Size", "Used", "By"]
    assert rows["libcrc32c"][1:4] == ["1", "xfs", "live"]
    assert rows["xfs"][1:3] == ["0", "live"]
    sentence = "modpressure unload: libcrc32c: EWOULDBLOCK: Resource temporarily unavailable"
    assert cli_on.fails(1, "unload", "libcrc32c") == sentence
    assert cli_on.fails(1, "unload", "--force", "libcrc32c") == sentence
    [loaded] = [one for one in cli_on("modules", "loaded", "--json").json["modules"] if one["module"] == "libcrc32c"]
    assert (loaded["references"], loaded["used_by"]) == (1, ["xfs"])
    assert cli_on("unload", "xfs", "libcrc32c") == Done(0, "", "")


# --- storms --------------------------------------------------------------------------------------------------------


def recounted(cli: Cli) -> dict[str, Any]:
    """Return what the events of a system add up to."""
    events = [json.loads(line) for line in cli("events", "--limit", "0", "--json").out.splitlines()]
    assert [event["event_id"] for event in events] == list(range(1, len(events) + 1))
    calls = [event["call"] for event in events if "call" in event]
    return {
        "calls": len(calls),
        "duplicates": sum(call["duplicate"] for call in calls),
        "unloads": len(events) - len(calls),
        "events": len(events),
        "modcount": sum(call["outcome"] == "OUTCOME_LIVE" for call in calls),
    }


def test_a_storm_over_three_loaders_adds_up(cli_on: Cli) -> None:
    done = cli_on("storm", "--workers", "20", "--module", "xfs", "--ops", "3", "--json")
    assert done.code == 0, done
    total, loaders = done.json["total"], done.json["loaders"]
    assert [loader["workers"] for loader in loaders] == [7, 7, 6]
    assert total["operations"] == 60 == total["unloads"]
    for name in ("calls", "operations", "duplicates", "wasted_bytes"):
        assert total[name] == sum(loader[name] for loader in loaders)
    assert total["calls"] == sum(count["count"] for count in total["outcomes"])

    counters = stats_of(cli_on)
    assert {name: counters[name] for name in recounted(cli_on)} == recounted(cli_on)
    dependencies = counters["calls"] - total["calls"]
    assert dependencies == counters["live_modules"] > 0
    assert counters["duplicates"] == total["duplicates"]
    assert counters["virtual_mem_wasted_bytes"] == total["wasted_bytes"]


def test_a_storm_prints_tables_and_lines(cli_on: Cli) -> None:
    done = cli_on("storm", "-w", "6", "-m", "pcspkr,loop", "--mode", "once", "--policy", "v6.3", "--separate-copies")
    assert done.code == 0
    assert done.err.splitlines()[0] == "storm: 6 workers, pcspkr, loop"
    rows = [line.split() for line in done.out.splitlines()]
    assert ["live", "2"] in rows
    assert ["load", "EEXIST", "10"] in rows
    assert [row[:3] for row in rows if row and row[0].startswith("loader-")] == [
        ["loader-1", "2", "4"],
        ["loader-2", "2", "4"],
        ["loader-3", "2", "4"],
    ]
    assert next(row for row in rows if row[:1] == ["total"])[:5] == ["total", "6", "12", "0", "10"]

    listed = cli_on("duplicates", "--json").json["modules"]
    assert sorted((each["module"], each["load_count"], each["reason"]) for each in listed) == [
        ("loop", 5, "Load"),
        ("pcspkr", 5, "Load"),
    ]
    assert "pcspkr" in cli_on("duplicates").out


def test_a_storm_without_dependencies_fails_as_modules_without_theirs_do(cli_on: Cli) -> None:
    done = cli_on("storm", "-w", "2", "-m", "xfs", "--no-deps", "--json")
    assert stats_of(cli_on)["modcount"] == sum(
        count["count"] for count in done.json["total"]["outcomes"] if count["outcome"] == "OUTCOME_LIVE"
    )


def test_ctrl_c_stops_a_storm_and_prints_what_was_counted(cli_on: Cli) -> None:
    with cli_on.start("storm", "-w", "9", "-m", "pcspkr", "--seconds", "600", "--json") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "duplicates" in line:
                break
        process.send_signal(signal.SIGINT)
        done = end(process)
    assert done.code == 130
    assert done.json["interrupted"]
    total = done.json["total"]
    assert total["stopped"]
    assert total["calls"] > 0
    counters = stats_of(cli_on)
    assert {name: counters[name] for name in recounted(cli_on)} == recounted(cli_on)
    assert counters["calls"] == total["calls"]


def test_a_terminal_shows_a_bar(cli_on: Cli) -> None:
    leader, follower = pty.openpty()
    with cli_on.start("storm", "-w", "3", "-m", "pcspkr", "--ops", "20", stderr=follower) as process:
        os.close(follower)
        shown = b""
        try:
            while data := os.read(leader, 65536):
                shown += data
        except OSError:  # the other side has been closed
            pass
        finally:
            os.close(leader)
        assert end(process).code == 0
    text = shown.decode()
    assert "━" in text
    assert " ops, " in text
    assert "100 %" in text


# --- what was counted ----------------------------------------------------------------------------------------------


def test_reports(cli_on: Cli) -> None:
    load(cli_on, "pcspkr", "pcspkr")
    counters = stats_of(cli_on)
    rfc = cli_on("report").out
    assert rfc.splitlines()[0].split() == ["Modules", "loaded", "1"]
    assert rfc.endswith(f"Failed modules:\n{'pcspkr':>25}\n")
    mainline = cli_on("report", "--format", "mainline").out
    assert f"{'Total module size':>25}\t{counters['total_mod_size']}\n" in mainline
    assert cli_on("report", "--format", "rfc-as-posted", "--json").json["text"].startswith(rfc.splitlines()[0])
    cut = cli_on("report", "--format", "mainline", "--kernel-buffer").out
    assert mainline.startswith(cut)


def test_stats_as_text_have_every_counter(cli_on: Cli) -> None:
    counters = cli_on("stats", "--json").json
    assert counters == stats_of(cli_on)
    names = [line.split()[0] for line in cli_on("stats").out.splitlines()[1:]]
    assert set(counters) - {"origins"} <= set(names)


def test_the_kernel_asks_for_a_module(cli_on: Cli) -> None:
    done = cli_on("request-module", "loop", "--requester", "mount")
    assert (done.code, done.err) == (0, "modpressure request-module: loop: 0 (modprobe exited with 0)\n")
    assert done.out.splitlines()[1].split()[:2] == ["loop", "live"]
    again = cli_on("request-module", "loop", "--workers", "20", "--repeat", "2", "--json")
    assert [request["calls"] for request in again.json["requests"]] == [[]] * 40
    unknown = cli_on("request-module", "net-pf-99")
    assert (unknown.code, unknown.err) == (
        1,
        "modpressure request-module: net-pf-99: 256 (modprobe exited with 1)\n",
    )
    [autoload] = cli_on("stats", "--json").json["origins"]
    assert (autoload["origin"], autoload["requesters"][0]["requester"]) == ("ORIGIN_AUTOLOAD", "mount")
    many = cli_on("request-module", "fs-xfs-none", "-w", "3")
    assert many.code == 1
    assert many.out.splitlines()[1].split()[:1] == ["256"]
    assert "3 of 3 requests did not return 0" in many.err


def test_stats_say_who_asked(cli_on: Cli) -> None:
    cli_on("load", "pcspkr", "--no-deps", "--origin", "autoload", "--requester", "net/core")
    cli_on("load", "pcspkr", "--no-deps", "--requester", "modprobe")
    counters = cli_on("stats", "--json").json
    userspace, autoload = counters["origins"]
    assert (autoload["origin"], autoload["calls"], autoload["failures"]) == ("ORIGIN_AUTOLOAD", 1, 0)
    assert (userspace["origin"], userspace["calls"], userspace["failures"]) == ("ORIGIN_USERSPACE", 1, 1)
    assert userspace["requesters"][0]["requester"] == "modprobe"
    assert userspace["wasted_bytes"] == counters["virtual_mem_wasted_bytes"] > 0
    rows = [line.split() for line in cli_on("stats").out.splitlines()]
    assert ["autoload", "1", "0", "0", "B"] in rows
    assert ["net/core", "1", "0", "0", "B"] in rows


def test_events_are_filtered_and_limited(cli_on: Cli) -> None:
    load(cli_on, "pcspkr", "loop", "pcspkr")
    cli_on("unload", "loop")

    def shown(*arguments: str) -> list[int]:
        return [json.loads(line)["event_id"] for line in cli_on("events", "--json", *arguments).out.splitlines()]

    assert shown() == [1, 2, 3, 4]
    assert shown("--limit", "2") == [3, 4]
    assert shown("--module", "pcspkr") == [1, 3]
    assert shown("--outcome", "live") == [1, 2]
    assert shown("--outcome", "live,becoming", "--limit", "2") == [2, 3]
    lines = cli_on("events").out.splitlines()
    assert "load pcspkr  becoming EEXIST" in lines[2]
    assert "unload loop" in lines[3]


def test_events_are_followed(cli_on: Cli) -> None:
    load(cli_on, "pcspkr")
    with cli_on.start("events", "--follow", "--json", "--limit", "1") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["call"]["module"] == "pcspkr"
        load(cli_on, "loop")
        cli_on("unload", "loop")
        assert json.loads(process.stdout.readline())["call"]["module"] == "loop"
        assert json.loads(process.stdout.readline())["unload"]["module"] == "loop"
        process.send_signal(signal.SIGINT)
        assert end(process).code == 130


def test_watch(cli_on: Cli) -> None:
    with cli_on.start("watch", "--json", "--interval", "0.05") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["calls"] == 0
        load(cli_on, "pcspkr")
        for line in process.stdout:
            if json.loads(line)["modcount"] == 1:
                break
        process.send_signal(signal.SIGINT)
        assert end(process).code == 130
    done = cli_on("watch", "--count", "1")
    assert done.code == 0
    assert "1 calls, 1 loaded" in done.out


def test_a_reader_that_leaves_early_is_no_error_to_show(cli_on: Cli) -> None:
    load(cli_on, "pcspkr", "pcspkr", "pcspkr")
    command = f"'{EXECUTABLE}' events --limit 0 | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=cli_on.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


# --- modules and systems -------------------------------------------------------------------------------------------


def test_modules(machine: Up) -> None:
    cli = machine.cli
    listed = cli("modules", "list", "--json").json["modules"]
    assert {"pcspkr", "empty", "loop", "nonsense", "xfs"} <= {module["name"] for module in listed}
    assert [line.split()[0] for line in cli("modules", "list", "pc*").out.splitlines()] == ["Module", "pcspkr"]

    info = cli("modules", "info", "xfs", "--json").json
    assert info["layout"]["total_bytes"] == sum(size for name, size in info["layout"].items() if name != "total_bytes")
    rows = [line.split() for line in cli("modules", "info", "xfs").out.splitlines()]
    assert ["name", "xfs"] in rows
    assert next(row for row in rows if row[0] == "total_bytes")[1] == str(info["layout"]["total_bytes"])
    assert cli("modules", "deps", "xfs").out.splitlines() == info["load_order"]
    assert cli("modules", "deps", "xfs", "--json").json["load_order"] == info["load_order"]


def test_systems(machine: Up, system: str) -> None:
    cli = machine.cli
    other = f"{system}-b"
    created = cli("systems", "create", other, "--policy", "v6.5", "--json").json
    assert (created["id"], created["policy"]) == (other, "POLICY_V6_5")
    assert other in cli.fails(1, "systems", "create", other)
    assert {system, other} <= {each["id"] for each in cli("systems", "list", "--json").json["systems"]}
    assert [line.split()[:2] for line in cli("systems", "show", other).out.splitlines()] == [
        ["System", "Policy"],
        [other, "v6.5"],
    ]
    cli("load", "pcspkr", "--system", other)
    assert cli("systems", "reset", other).code == 0
    assert cli("stats", "--system", other, "--json").json["calls"] == 0
    assert cli("systems", "delete", other).code == 0
    assert other in cli.fails(1, "systems", "show", other)
    assert other in cli.fails(1, "systems", "delete", other)
    assert "'No'" in cli.fails(2, "systems", "create", "No")


def test_a_system_with_limits(machine: Up, system: str) -> None:
    cli = machine.cli
    small = f"{system}-small"
    cli("systems", "create", small, "--memory", "64MiB", "--module-area", "16k")
    refused = cli("load", "pcspkr", "--system", small)
    assert refused.code == 1
    assert "ENOMEM" in refused.out + refused.err
    event = cli("events", "--system", small, "--json").json
    assert (event["call"]["outcome"], event["call"]["check"]) == ("OUTCOME_BECOMING", "memory: module area")
    assert re.fullmatch(r"\d+ bytes asked, \d+ left", event["call"]["value"])
    found = cli("systems", "show", small, "--json").json
    assert found["limits"] == {"memory_bytes": 64 << 20, "vmalloc_bytes": 0, "module_area_bytes": 16 << 10}
    assert set(found["taken"].values()) == {0}
    assert 0 < found["peak_taken"]["module_area_bytes"] <= 16 << 10
    rows = [line.split() for line in cli("systems", "show", small).out.splitlines()]
    assert ["module", "area", "16.0", "KiB", "0", "B"] in [row[1:7] for row in rows]
    assert "0 MiB" in cli.fails(2, "systems", "create", f"{small}-2", "--memory", "0 MiB")


# --- up ------------------------------------------------------------------------------------------------------------


def test_up_tells_where_it_is_and_leaves_nothing_behind(start_up: StartUp, small_tree: Path, tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    up = start_up("--loaders", "2", "--tree", str(small_tree), "--ready-file", str(ready_file), "--policy", "v6.3")
    assert json.loads(ready_file.read_text()) == up.running
    assert list(up.running["pids"]) == ["stats", "loader-1", "loader-2"]
    assert all(alive(pid) for pid in up.pids)
    assert up.cli("systems", "show", "--json").json["policy"] == "POLICY_V6_3"
    assert up.cli("load", "pcspkr").code == 0
    database = Path(up.running["database"])
    assert database.exists()

    done = up.stop()

    assert done.code == 130
    assert not ready_file.exists()
    assert not database.parent.exists()
    assert "loader-2" in done.err
    # They share what a single one would have taken.
    limits = [int(limit) for limit in re.findall(r"memory_limit_bytes=(\d+)", done.err)]
    assert len(limits) == 2 and sum(limits) <= LoaderSettings().memory_limit_bytes


def test_a_client_writes_no_line_of_its_own_among_what_up_prints(start_up: StartUp, small_tree: Path) -> None:
    up = start_up("--tree", str(small_tree))
    forged = "x\nstats      12:00:00 error   database is lost"

    async def act(client: Client) -> None:
        for fields in ({"request_id": forged}, {"system": "\x1b]0;owned\x07\x1b[2J"}):
            with pytest.raises(BadRequest):
                await client.load("pcspkr", **fields)

    through_client(up.cli, act)
    lines = up.stop().err.splitlines()
    assert r"request_id='x\nstats      12:00:00 error   database is lost'" in "".join(lines)
    assert r"system='\x1b]0;owned\x07\x1b[2J'" in "".join(lines)
    assert all(line.isprintable() and not line.startswith("stats      12:00:00") for line in lines)


def test_up_with_tls_on_all_addresses_tells_where_this_machine_reaches_it(
    cli: Cli, small_tree: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    tls = {
        f"{section}_TLS_{name.upper()}": str(file)
        for section in ("STATS", "LOADER")
        for name, file in asdict(pair).items()
    }
    tls |= {"LOADER_STATS_CA": str(authority.cert), "CLIENT_CA": str(authority.cert)}
    cli.environment.update({f"MODPRESSURE_{name}": value for name, value in tls.items()})
    up = ("up", "--host", "0.0.0.0", "--port", "0", "--tree", str(small_tree))
    process = cli.start(*up, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    said = list(takewhile(lambda line: not line.startswith("Ctrl-C"), process.stdout))
    process.send_signal(signal.SIGINT)
    assert end(process).code == 130
    assert [re.sub("[0-9]+$", "", line.rstrip()) for line in said[:2]] == [
        "stats_svc   127.0.0.1:",
        "loader_svc  127.0.0.1:",
    ]
    assert f"  grpcurl -cacert {authority.cert} {said[0].split()[1]} " in "".join(said)

    del cli.environment["MODPRESSURE_LOADER_STATS_CA"]
    sentence = cli.fails(2, *up)
    assert "MODPRESSURE_STATS_TLS_CERT asks for TLS, for which MODPRESSURE_LOADER_STATS_CA must be set" in sentence
    elsewhere = authority.sign("elsewhere", host="DNS:elsewhere.example")
    tls |= {"STATS_TLS_CERT": str(elsewhere.cert), "STATS_TLS_KEY": str(elsewhere.key)}
    cli.environment.update({f"MODPRESSURE_{name}": value for name, value in tls.items()})
    done = cli(*up, "--quiet")
    assert done.code == 1
    assert "stats_svc at 127.0.0.1:" in done.err and "its certificate is for another name" in done.err


def test_up_keeps_a_database_that_it_is_given(start_up: StartUp, small_tree: Path, tmp_path: Path) -> None:
    database = tmp_path / "kept.sqlite3"
    arguments = ("--tree", str(small_tree), "--database", str(database), "--quiet")
    first = start_up(*arguments)
    assert first.cli("load", "pcspkr").code == 0
    assert first.stop(signal.SIGTERM).code == 143
    second = start_up(*arguments, "--policy", "v6.4")
    assert second.cli("stats", "--json").json["calls"] == 1
    second.stop()
    # What was counted under one policy is not to be mixed with another.
    sentence = first.cli.fails(1, "up", "--port", "0", *arguments, "--policy", "v6.5")
    assert "--policy v6.5" in sentence
    assert "v6.4" in sentence


def test_up_stops_all_if_one_dies(start_up: StartUp, small_tree: Path) -> None:
    up = start_up("--loaders", "2", "--tree", str(small_tree), "--quiet")
    os.kill(up.running["pids"]["loader-2"], signal.SIGKILL)
    done = up.wait()
    assert done.code == 1
    assert "modpressure: loader-2 ended with signal SIGKILL" in done.err


def test_the_services_end_if_up_is_killed(start_up: StartUp, small_tree: Path) -> None:
    up = start_up("--tree", str(small_tree))
    watching = [os.pidfd_open(pid) for pid in up.pids]
    up.process.kill()
    up.process.wait()
    for descriptor in watching:
        assert select.select([descriptor], [], [], 60)[0]
        os.close(descriptor)
    up.wait()


def test_up_stops_when_nobody_reads_what_it_says(cli: Cli, small_tree: Path) -> None:
    command = f"'{EXECUTABLE}' up --port 0 --tree '{small_tree}' 2>&1 | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        env=cli.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )
    first, code = done.stdout.splitlines()
    assert "stats_svc listening" in first
    assert (code, done.stderr) == ("143", "")
    assert list(cli.directory.iterdir()) == []  # no temporary database either


def one_line(done: Done) -> str:
    """Return the last line on standard error, below the services' own."""
    assert "Traceback" not in done.err
    return done.err.splitlines()[-1]


def test_up_with_a_port_in_use(cli: Cli, small_tree: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("up", "--port", str(port), "--tree", str(small_tree))
    assert done.code == 1
    assert one_line(done).startswith("modpressure: stats ended with exit code ")
    assert f"127.0.0.1:{port}" in one_line(done)
    assert "in use" in one_line(done)


def test_up_with_a_database_that_is_none(cli: Cli, tmp_path: Path, small_tree: Path) -> None:
    database = tmp_path / "notes.txt"
    database.write_text("not a database, but text that somebody needs\n" * 100)
    done = cli("up", "--port", "0", "--tree", str(small_tree), "--database", str(database))
    assert done.code == 1
    assert str(database) in one_line(done)
    assert database.read_text().startswith("not a database")


def test_up_with_a_directory_for_a_database(cli: Cli, tmp_path: Path, small_tree: Path) -> None:
    done = cli("up", "--port", "0", "--tree", str(small_tree), "--database", str(tmp_path))
    assert done.code == 1
    assert f"{tmp_path}: is a directory" in one_line(done)


def test_up_with_another_programs_database(cli: Cli, tmp_path: Path, small_tree: Path) -> None:
    database = tmp_path / "other.sqlite3"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE systems (x INTEGER)")
    connection.close()
    done = cli("up", "--port", "0", "--tree", str(small_tree), "--database", str(database))
    assert done.code == 1
    assert "other.sqlite3" in one_line(done)


def test_up_with_a_tree_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    done = cli("up", "--port", "0", "--tree", str(missing))
    assert done.code == 1
    assert one_line(done).startswith("modpressure: loader-1 ended with exit code ")
    assert str(missing) in one_line(done)


def test_nobody_there(cli: Cli) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    expected = f"modpressure: no answer from stats_svc at {address}: connection refused"
    for command in (["report"], ["watch"]):
        assert cli.fails(1, *command, "--stats", address) == expected
    for command in (["load", "pcspkr"], ["storm", "-m", "pcspkr"]):
        assert address in cli.fails(1, *command, "--loaders", address)
