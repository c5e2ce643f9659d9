"""``modpressure boot`` and ``machine`` as a user calls them, and a boot whose calls a stats_svc counts."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loader_svc.virtual.costs import KINDS
from modpressure.cli.main import main
from tests.services import Process

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command line and returns its exit code and what it printed."""

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_a_boot_tells_its_spread_by_figure_and_module(run: Run) -> None:
    code, out, err = run("boot", "--cpus", "6", "--repeat", "3", "--seed", "5")
    assert (code, err) == (0, "")
    assert out.startswith(
        "nvme-255: 6 CPUs, 32.0 GiB; modules of the catalogue; v6.4, kmod 30; 3 boots, seeds 5 to 7\n"
    )
    assert "duplicates found at becoming" in out
    assert "kvm_intel" in out
    again = run("boot", "--cpus", "6", "--repeat", "3", "--seed", "5")
    assert again == (code, out, err)


def test_one_boot_alone_says_that_it_is_one(run: Run) -> None:
    _, out, _ = run("boot", "--repeat", "1")
    assert "That is one boot; which call is first is chance." in out


def test_a_boot_as_json_and_as_the_kernel_s_report(run: Run) -> None:
    _, out, _ = run("boot", "--repeat", "2", "--format", "json", "--policy", "v6.3")
    document = json.loads(out)
    assert document == json.loads(run("boot", "--repeat", "2", "--json", "--policy", "v6.3")[1])
    figures, boots = document["figures"], document["boots"]
    assert [boot["seed"] for boot in boots] == [0, 1]
    duplicates = [boot["counters"]["duplicates"] for boot in boots]
    assert figures["duplicates"]["least"] == min(duplicates)
    assert figures["duplicates"]["most"] == max(duplicates)
    assert figures["failed_becoming"]["most"] == 0
    _, report, _ = run("boot", "--policy", "v6.3", "--format", "mainline")
    assert report == boots[0]["report"]
    assert report.startswith("         Mods ever loaded\t")
    assert run("boot", "--policy", "v6.3", "--format", "rfc")[1].startswith("           Modules loaded\t")


def test_what_is_changed_about_modules_shows(run: Run) -> None:
    def loaded(*arguments: str) -> set[str]:
        return set(json.loads(run("boot", "--repeat", "1", "--json", *arguments)[1])["boots"][0]["loaded"])

    assert {"kvm_intel", "kvm", "irqbypass"} <= loaded()
    assert not {"kvm_intel", "kvm", "irqbypass"} & loaded("--blacklist", "kvm_intel")
    assert "kvm" not in loaded("--builtin", "kvm", "--builtin", "kvm_intel")
    _, out, _ = run("boot", "--repeat", "1", "--json", "--files", "zst", "--policy", "v6.5")
    boot = json.loads(out)["boots"][0]
    assert boot["finit_calls"] == boot["gate_joins"] == 0
    assert boot["init_calls"] > 50
    _, out, _ = run("boot", "--repeat", "1", "--json", "--files", "zst", "--policy", "v6.5", "--kmod", "34")
    assert json.loads(out)["boots"][0]["init_calls"] == 0
    workers = json.loads(run("boot", "--repeat", "1", "--json", "--udev-workers", "3")[1])["boots"][0]["workers"]
    assert workers == 3


def test_a_boot_without_memory_fails_and_says_for_which_module(run: Run) -> None:
    code, out, _ = run("boot", "--machine", "nvme-255", "--cpus", "30", "--limit-memory", "20MiB", "--repeat", "2")
    assert code == 1
    assert re.search(r"calls that found no room \(ENOMEM\) +[1-9]", out)
    assert "2 of 2 boots failed: no room (pages) from " in out
    assert re.search(r"missing in the end: .*\bkvm\b", out)
    code, out, _ = run("boot", "--cpus", "30", "--limit-memory", "50%", "--repeat", "1", "--json")
    assert (code, json.loads(out)["boots"][0]["lost"]) == (0, [])
    assert "found no room" not in run("boot", "--repeat", "1")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--machine", "vax"), "there is no machine 'vax'; there are nvme-255, server-2s, server-8s, virtio-8"),
        (("--cpus", "0"), "0 is not of at least 1"),
        (("--cpus", "10000000"), "cpus 10000000 is not between 1 and 65536"),
        (("--udev-workers", "5000"), "udev_workers 5000 is not between 1 and 2048"),
        (("--tree", "/nonexistent"), "there is no directory '/nonexistent'"),
        (("--modprobe-dir", "/nonexistent"), "there is no configuration '/nonexistent'"),
        (("--machine", "/nonexistent.toml"), "/nonexistent.toml can't be read: No such file or directory"),
        (("--limit-memory", "lots"), "--limit-memory: 'lots' is not a number of bytes"),
        (("--limit-module-area", "0"), "--limit-module-area 0 leaves no memory at all"),
        (("--repeat", "0"), "0 is not between 1 and 10000"),
        (("--costs", "/nonexistent.toml"), "can't be read"),
    ],
)
def test_bad_input_is_named_in_one_sentence(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = run("boot", *arguments)
    assert code in (1, 2)
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_a_tree_whose_list_is_damaged_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_bytes(bytes(range(128, 255)))
    (tmp_path / "modules.alias").write_text("alias virtio:d00000002v* virtio_blk\n")
    code, out, err = run("boot", "--tree", str(tmp_path))
    assert (code, out) == (2, "")
    assert err == f"modpressure: the module tree {tmp_path.name} has no modules, or a modules.dep that names none\n"


def test_a_machine_that_makes_no_sense_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('name = "m"\ncpus = 4\nmemory_bytes = 1073741824\ncolour = "red"\ndevice = []\n')
    code, _, err = run("boot", "--machine", str(path))
    assert code == 2
    assert "there is no key 'colour'" in err


def test_a_recorded_machine_can_be_shown_and_booted(run: Run, tmp_path: Path) -> None:
    code, text, _ = run("machine", "record", "--name", "here")
    assert code == 0
    path = tmp_path / "here.toml"
    path.write_text(text)
    assert run("machine", "show", str(path))[1] == text.partition("\n")[2]
    document = json.loads(run("machine", "show", str(path), "--json")[1])
    assert document["name"] == "here"
    assert document["triggered_devices"] > 0
    code, _, err = run("boot", "--machine", str(path), "--repeat", "1", "--json")
    # This machine may have nothing that the catalogue has a module for.
    assert code == 0 or "has no module for any device" in err
    listed = run("machine", "list", "--json")[1]
    assert {machine["name"] for machine in json.loads(listed)} == {"nvme-255", "server-2s", "server-8s", "virtio-8"}


def start(*arguments: str) -> tuple[int, str, str]:
    """Run a command line in a process of its own: it sets up logging."""
    command = [sys.executable, "-c", "from modpressure.cli.main import run; run()", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_the_calls_of_a_boot_count_in_stats_svc_as_any_others(run: Run, stats: Process) -> None:
    arguments = ("--machine", "nvme-255", "--cpus", "40", "--repeat", "1", "--seed", "9")
    code, out, err = start("boot", *arguments, "--json", "--stats", stats.address, "--system", "booted")
    assert (code, err) == (0, "")
    boot = json.loads(out)["boots"][0]
    asked = ("--stats", stats.address, "--system", "booted")
    assert run("report", "--format", "mainline", *asked)[1] == boot["report"]
    counters = json.loads(run("stats", "--json", *asked)[1])
    for name in ("modcount", "failed_becoming", "failed_load_modules", "duplicates", "calls", "invalid_mod_bytes"):
        assert int(counters[name]) == boot["counters"][name]
    calls = [json.loads(line)["call"] for line in run("events", "--limit", "0", "--json", *asked)[1].splitlines()]
    # Found a duplicate before anything was laid out, as the live driver says of it.
    early = [call for call in calls if call["outcome"] == "OUTCOME_BECOMING"]
    assert early
    assert {(int(call["mod_bytes"]), int(call["text_bytes"])) for call in early} == {(0, 0)}
    assert all(int(call["mod_bytes"]) for call in calls if call["outcome"] == "OUTCOME_LIVE")
    assert {(call["requester"], call["origin"]) for call in calls} == {("udev", "ORIGIN_USERSPACE")}


def test_a_stats_svc_that_is_away_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = start("boot", "--repeat", "1", "--stats", address)
    assert (code, out, err) == (1, "", f"modpressure: stats_svc at {address} does not answer\n")


def test_the_events_of_a_boot_can_be_replayed(run: Run, stats: Process, tmp_path: Path) -> None:
    arguments = ("--repeat", "1", "--seed", "2")
    assert start("boot", *arguments, "--stats", stats.address, "--system", "again")[0] == 0
    asked = ("--stats", stats.address, "--system", "again")
    path = tmp_path / "events.jsonl"
    path.write_text(run("events", "--limit", "0", "--json", *asked)[1])
    code, out, err = run("replay", str(path), "--machine", "virtio-8", "--repeat", "1", "--json")
    assert (code, err) == (0, "")
    booted = json.loads(run("boot", *arguments, "--json")[1])["boots"][0]
    replayed = json.loads(out)["boots"][0]
    assert replayed["counters"]["calls"] == booted["counters"]["calls"]
    assert set(replayed["loaded"]) == set(booted["loaded"])
    path.write_text(path.read_text()[:-20])
    code, _, err = run("replay", str(path))
    assert code == 2
    assert "is cut short" in err
    assert run("replay", str(tmp_path / "none.csv"))[0] == 1


@pytest.mark.slow
def test_how_much_hangs_on_the_costs(tmp_path: Path) -> None:
    costs = tmp_path / "costs.toml"
    # All but a few figures are nought, so that there is little to try.
    lines = [f"{name} = 0" for name in KINDS if name.endswith("_ns") and not name.endswith(("slice_ns", "tick_ns"))]
    costs.write_text("\n".join(lines).replace("fork_ns = 0", "fork_ns = 400000") + "\n")
    code, out, err = start("boot", "--cpus", "4", "--repeat", "1", "--sensitivity", "--costs", str(costs), "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert "fork_ns" in {each["cost"] for each in document["costs"]}
    assert document["base"]["duration_ns"]["mean"] > 0
    assert document["seeds"] == 1
    code, out, err = start("boot", "--cpus", "4", "--repeat", "2", "--sensitivity", "--costs", str(costs))
    assert (code, err) == (0, "")
    assert re.search(r"^fork_ns +[-+~]", out, re.MULTILINE)
    assert re.search(r"^No more than chance with 2 seeds: .*copy_user_ns_per_byte", out, re.MULTILINE)
