"""``modpressure sweep`` and ``what-if`` as a user calls them: real processes, a real cluster, real signals."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from modpressure.cli.main import main

pytestmark = pytest.mark.slow

MACHINE = """\
name = "toy"
cpus = 4
memory_bytes = 17179869184

[[device]]
path = "/devices/system/cpu/cpu{cpu}"
modalias = "cpu:type:x86,ven0000fam0006mod0055:feature:,0081,0099,0085"
"""


def start(*arguments: object, **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from modpressure.cli.main import run; run()", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "COLUMNS": "200"}  # tables as wide as in a file
    return subprocess.Popen(command, **{**pipes, "env": env, **more})  # type: ignore[call-overload, no-any-return]


def modpressure(*arguments: object, **more: object) -> tuple[int, str, str]:
    with start(*arguments, **more) as process:
        out, err = process.communicate(timeout=110)
        return process.returncode, out, err


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(MACHINE)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_sweep_prints_a_table_and_lines_and_writes_files(machine: Path, tmp_path: Path) -> None:
    table, picture = tmp_path / "a.csv", tmp_path / "a.svg"
    names = ("a.csv", "a.svg", "a.json", "a.parquet", "a.png")
    outputs = [f"--output={tmp_path / name}" for name in names]
    arguments = ("--machine", machine, "--cpus", "2,4..8:2", "--policy", "v6.3,v6.4", "--repeat", 2, "--jobs", 2)
    code, out, err = modpressure("sweep", *arguments, *outputs)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Wasted virtual memory, GiB"
    assert lines[1].split()[:5] == ["Machine", "Policy", "Remedy", "CPUs", "Mean"]
    assert [line.split()[:4] for line in lines[2:10]] == [
        ["toy", policy, "none", cpus] for policy in ("v6.3", "v6.4") for cpus in "2468"
    ]
    assert [line.split(":")[0] for line in lines[10:]] == ["v6.3", "v6.4"]
    assert all("GiB for each CPU" in line and "R²" in line for line in lines[10:])
    found = rows(table)
    assert len(found) == 2 * 4 * 2
    assert {(each["policy"], each["cpus"], each["seed"]) for each in found} == {
        (policy, cpus, seed) for policy in ("v6.3", "v6.4") for cpus in "2468" for seed in "12"
    }
    assert sum(int(each["load"]) for each in found) > 0, "nobody collided"
    assert json.loads((tmp_path / "a.json").read_text())["series"][0]["seeds"] == 2
    parquet = pytest.importorskip("pyarrow.parquet")
    read = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [{name: str(value) for name, value in each.items()} for each in read] == found
    ElementTree.parse(picture)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    # Once more, with nothing left to simulate: the same bytes.
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert modpressure("sweep", *arguments, *outputs) == (0, out, "")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_processes_come_to_what_one_process_comes_to(machine: Path) -> None:
    arguments = ("sweep", "--machine", machine, "--cpus", "2,4", "--repeat", 2, "--json")
    assert modpressure(*arguments, "--jobs", 1) == modpressure(*arguments, "--jobs", 2)


def _first_line(path: Path, process: subprocess.Popen[str]) -> None:
    """Return when a sweep has finished a point, by its journal."""
    while not path.exists() or not path.read_bytes().count(b"\n"):
        assert process.poll() is None, "it ended before"
        os.sched_yield()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_goes_on_where_it_was(machine: Path, tmp_path: Path, jobs: int) -> None:
    path = tmp_path / "a.csv"
    points = tmp_path / "a.csv.points"
    arguments = ("sweep", "--machine", machine, "--cpus", "2..40:2", "--repeat", 10, "--jobs", jobs, "-o", path)
    with start(*arguments) as process:
        _first_line(points, process)
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    kept = points.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    assert not path.exists()
    assert 0 < whole.count(b"\n") < 200, "killed in the middle"
    assert modpressure(*arguments)[0] == 0
    assert points.read_bytes().startswith(whole), "what was finished is not simulated again"
    assert points.read_bytes().count(b"\n") == len(rows(path)) == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_a_kill_keeps_what_is_finished(machine: Path, tmp_path: Path, number: signal.Signals) -> None:
    path, points = tmp_path / "a.csv", tmp_path / "a.csv.points"
    with start("sweep", "--machine", machine, "--cpus", "2..64", "--repeat", 50, "-o", path) as process:
        _first_line(points, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    kept = points.read_bytes().count(b"\n")
    assert err.splitlines() == [f"interrupted; {kept} finished boots are kept in {points}"]
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system that is soon full")
def test_a_full_disk_keeps_what_is_finished(machine: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        code, out, err = modpressure(
            "sweep", "--machine", machine, "--cpus", "2..64", "--repeat", 20, "-o", disk / "a.csv"
        )
        kept = (disk / "a.csv.points").read_text().splitlines()
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert f"No space left on device; {len(kept)} finished points are kept in it" in err
        assert os.listdir(disk) == ["a.csv.points"]
        assert all(json.loads(line)["key"] for line in kept)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def cluster() -> Iterator[str]:
    """A scheduler and two workers, in processes of their own."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as made:
        yield made.scheduler_address


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_comes_to_the_same(cluster: str, machine: Path, tmp_path: Path) -> None:
    arguments = ("sweep", "--machine", machine, "--cpus", "2,4", "--repeat", 3, "--json")
    code, out, err = modpressure(*arguments, "--dask", cluster, "-o", tmp_path / "a.csv")
    assert (code, err) == (0, "")
    assert modpressure(*arguments, "--jobs", 1) == (0, out, "")
    assert len(rows(tmp_path / "a.csv")) == 6


def test_an_unreachable_scheduler_gets_one_sentence(machine: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        found = modpressure("sweep", "--machine", machine, "--dask", address, "-o", tmp_path / "a.csv")
    assert found == (1, "", f"modpressure: no dask scheduler answers at {address!r}\n")
    assert list(tmp_path.glob("a.*")) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--cpus", "0"), 2, "'0'"),
        (("--cpus", "10000000"), 2, "'10000000'"),
        (("--cpus", "many"), 2, "'many'"),
        (("--cpus", "8..2"), 2, "'8..2' ends before it begins"),
        (("--cpus", "2..8:0"), 2, "'2..8:0' has a step of less than 1"),
        (("--cpus", "1..1000", "--repeat", "10000"), 1, "10000000 boots"),
        (("--policy", "v2.6"), 2, "'v2.6'"),
        (("--remedy", "prayer"), 2, "'prayer'"),
        (("--machine", "abacus"), 1, "'abacus'"),
        (("--output", "a.xls"), 2, "'a.xls'"),
        (("--output", "/nowhere/a.csv"), 1, "'/nowhere'"),
        (("--tree", "/nowhere"), 1, "'/nowhere'"),
        (("--dask", "tcp://127.0.0.1:1"), 2, "--jobs 1"),
    ],
)
def test_bad_usage_gets_one_sentence(
    machine: Path, arguments: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got = main(["sweep", "--machine", str(machine), "--jobs", "1", *arguments])
    out, err = capsys.readouterr()
    assert (got, out) == (code, ""), err
    assert said in err
    assert err.count("\n") == 1


def test_an_address_that_is_none_is_bad_usage(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed")
    for address in ("nonsense://x", "nonsense"):
        assert main(["sweep", "--machine", str(machine), "--dask", address]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"modpressure: --dask {address!r} is no address of a dask scheduler")


def test_what_answers_must_be_a_dask_scheduler(machine: Path) -> None:
    pytest.importorskip("distributed")

    class Chatter(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20)

    with socketserver.TCPServer(("127.0.0.1", 0), Chatter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, out, err = modpressure(
            "sweep", "--machine", machine, "--dask", f"tcp://127.0.0.1:{server.server_address[1]}"
        )
        server.shutdown()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "dask scheduler" in err


@pytest.mark.parametrize(("suffix", "library"), [("parquet", "pyarrow"), ("svg", "matplotlib")])
def test_what_the_extra_brings_is_asked_for(machine: Path, tmp_path: Path, suffix: str, library: str) -> None:
    (tmp_path / f"{library}.py").write_text("raise ImportError\n")
    found = modpressure(
        "sweep", "--machine", machine, "-o", tmp_path / f"a.{suffix}", env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert found[:2] == (1, "")
    assert "pip install 'modpressure[sweep]'" in found[2]
    assert not (tmp_path / f"a.{suffix}.points").exists()


# --- what-if ---


def test_what_if_ranks_remedies(machine: Path) -> None:
    code, out, err = modpressure("what-if", "--machine", machine, "--cpus", 8, "--repeat", 2, "--format", "json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["machine"], document["cpus"], len(document["base"])) == ("toy", 8, 2)
    savings = {each["remedy"]: each for each in document["savings"]}
    saved = [each["wasted_bytes_saved"]["mean"] for each in document["savings"]]
    assert saved == sorted(saved, reverse=True)
    wasted = sum(each["wasted_bytes"] for each in document["base"]) / 2
    assert wasted > 0
    assert savings["newer-kernel"]["wasted_bytes_saved"]["mean"] == pytest.approx(wasted, rel=0.05)
    assert savings["request-once"]["wasted_bytes_saved"]["mean"] == wasted
    for each in savings.values():
        spread = each["wasted_bytes_saved"]
        assert spread["low"] <= spread["mean"] <= spread["high"]
    assert "early-check" in document["unchanged"]


def test_what_if_prints_a_table_and_draws(machine: Path, tmp_path: Path) -> None:
    arguments = ("--remedy", "builtin:kvm,kvm_intel", "--remedy", "request-once+newer-kernel", "--by", "seconds")
    picture = tmp_path / "a.svg"
    code, out, err = modpressure("what-if", "--machine", machine, "--repeat", 2, "--jobs", 1, *arguments, "-o", picture)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("toy, 4 CPUs, v6.4: wastes ")
    assert lines[2].split()[:3] == ["Remedy", "Waste", "saved"]
    assert (
        {line.split()[0] for line in lines[3:5]}
        == {line.split(": ")[0] for line in lines[6:]}
        == {"builtin:kvm,kvm_intel", "request-once+newer-kernel"}
    )
    assert "builtin:kvm,kvm_intel" in " ".join(ElementTree.parse(picture).getroot().itertext())


OWN = '''
"""A remedy of my own, as docs/sweep.md has it."""

from dataclasses import replace


class Uniprocessor:
    name = "uniprocessor"
    sentence = "boot with maxcpus=1, bring the others online later"

    def apply(self, spec):
        return replace(spec, machine=spec.machine.with_cpus(1))


class Broken:
    name = "broken"
    sentence = "does not work"

    def apply(self, spec):
        return spec.colour
'''


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    """An environment with a package that has remedies of its own."""
    site = tmp_path / "site"
    info = site / "own_remedies-1.dist-info"
    info.mkdir(parents=True)
    (site / "own_remedies.py").write_text(OWN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-remedies\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[modpressure.remedies]\nuniprocessor = own_remedies:Uniprocessor\nbroken = own_remedies:Broken\n"
    )
    return {**os.environ, "PYTHONPATH": str(site)}


def test_an_own_remedy_is_ranked_with_the_others(machine: Path, own: dict[str, str]) -> None:
    arguments = ("what-if", "--machine", machine, "--repeat", 2, "--json", "--remedy")
    code, out, err = modpressure(*arguments, "uniprocessor", "--remedy", "request-once", env=own)
    assert (code, err) == (0, "")
    savings = {each["remedy"]: each for each in json.loads(out)["savings"]}
    assert savings.keys() == {"uniprocessor", "request-once"}
    assert savings["uniprocessor"]["wasted_bytes_saved"]["mean"] > 0
    assert modpressure(*arguments, "uniprocessor")[0] == 2, "without the package there is no such remedy"


def test_an_own_remedy_that_breaks_is_named(machine: Path, own: dict[str, str]) -> None:
    code, out, err = modpressure("what-if", "--machine", machine, "--repeat", 1, "--remedy", "broken", env=own)
    assert (code, out) == (2, "")
    assert err.startswith("modpressure: remedy 'broken' can't be applied: AttributeError:")
    assert err.count("\n") == 1


# --- what was published ---


def test_published_figures_come_out_within_their_bounds() -> None:
    code, out, err = modpressure("verify", "published", "--repeat", 5, "--json")
    assert err == ""
    document = json.loads(out)
    rows = [row for table in document["tables"] for row in table["rows"] if row["bound"]]
    assert [row for row in rows if not row["agrees"]] == []
    assert code == 0
    assert document["agreed"] == document["total"] == len(rows) == 23
