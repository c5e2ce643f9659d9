"""What the README tells people to type, typed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Up

README = Path(__file__).resolve().parents[2] / "README.md"


def shell_lines() -> list[str]:
    """Return the README's grpcurl lines."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("grpcurl ")]


def typed(line: str, machine: Up) -> str:
    """Run a line as a person would, on the services of the test; return what it prints."""
    for program in ("grpcurl", "jq", "bash"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here")
    stats, loader = machine.running["stats"], machine.running["loaders"][0]
    assert "localhost:50050" in line or "localhost:50051" in line
    line = line.replace("localhost:50050", stats).replace("localhost:50051", loader)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_line_for_the_report_prints_it_as_a_person_would_see_it(machine: Up) -> None:
    [line] = [line for line in shell_lines() if "GetReport" in line]
    printed = typed(line, machine)
    assert printed.splitlines()[0].startswith("           Modules loaded\t")
    assert printed == machine.cli("report").out + "\n", "jq -r ends with a line feed of its own"


def test_the_line_for_a_load_loads(machine: Up) -> None:
    [line] = [line for line in shell_lines() if "with_dependencies" in line]
    before = machine.cli("stats", "--json").json
    # The test's tree has other modules than the catalogue.
    answer = json.loads(typed(line.replace("nvme", "pcspkr"), machine))
    assert answer["call"]["outcome"] == "OUTCOME_LIVE"
    after = machine.cli("stats", "--json").json
    assert after["modcount"] == before["modcount"] + 1
    assert machine.cli("unload", "pcspkr").code == 0


def test_the_line_with_an_id_has_the_same_answer_twice(machine: Up) -> None:
    [line] = [line.replace("nvme", "pcspkr") for line in shell_lines() if "request_id" in line]
    first = json.loads(typed(line, machine))
    assert first["call"]["outcome"] == "OUTCOME_LIVE"
    assert machine.cli("unload", "pcspkr").code == 0
    assert json.loads(typed(line, machine)) == first


def test_the_line_for_a_request_of_the_kernel_asks(machine: Up) -> None:
    [line] = [line for line in shell_lines() if "RequestModule" in line]
    # The test's tree has other modules than the catalogue, and its files no aliases of the kernel's.
    answer = json.loads(typed(line.replace("fs-xfs", "pcspkr"), machine))
    assert [call["origin"] for call in answer["calls"]] == ["ORIGIN_AUTOLOAD"]
    assert machine.cli("unload", "pcspkr").code == 0
