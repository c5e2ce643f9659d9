"""Capturing single calls on the running kernel: what reaches it, as strace sees it, and the table that comes of it.

Kernels that tests run on have no CONFIG_MODULE_STATS, many no modules at all: the counters are files of the test's own.
"""

from __future__ import annotations

import csv
import io
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loader_svc.verify import capture
from loader_svc.verify.failures import COLUMNS
from loader_svc.verify.script import _CALLERS as CALLERS

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of the system calls are x86-64's")

IMAGE = b"\x7fELF" + bytes(20_000)
"""No kernel takes it."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "files" / "below").mkdir(parents=True)
    (tmp_path / "files" / "below" / "none.ko").write_bytes(IMAGE)
    (tmp_path / "counters").mkdir()
    for name in capture.COUNTERS:
        (tmp_path / "counters" / name).write_text("7\n")
    return tmp_path


def run(directory: Path, script: str, *before: str) -> tuple[int, list[dict[str, str]], str]:
    (directory / "calls.script").write_text(script)
    arguments = ("calls.script", "--files", "files", "--counters", "counters", "--kernel", "v6.4")
    done = subprocess.run(
        [*before, sys.executable, capture.__file__, *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, list(csv.DictReader(io.StringIO(done.stdout))), done.stderr


CALLS = {
    "finit /t/none.ko": r'finit_module\(\d+<.*/below/none.ko>, "", 0\)',
    "finit /t/none.ko 3 a=1 b=2": r'finit_module\(\d+<.*none.ko>, "a=1 b=2", \S*VERSIONS\S*VERMAGIC\)',
    "finit_badargs /t/none.ko": r"finit_module\(\d+<.*none.ko>, 0x8, 0\)",
    "finit_dir /t": r'finit_module\(\d+<.*/files>, "", 0\)',
    "finit_pipe /t/none.ko": r'finit_module\(\d+<pipe:.*>, "", 0\)',
    "finit_wronly /t/none.ko": r'finit_module\(\d+<.*none.ko>, "", 0\)',
    "finit_rdwr /t/none.ko": r'finit_module\(\d+<.*none.ko>, "", 0\)',
    "finit_opath /t/none.ko": r'finit_module\(\d+<.*none.ko>, "", 0\)',
    "finit_badfd /t/none.ko": r'finit_module\(-1, "", 0\)',
    "finit_closedfd /t/none.ko 8": r'finit_module\(999, "", 0x8 ',
    "finit_nocap /t/none.ko": r'finit_module\(\d+<.*none.ko>, "", 0\)',
    "init /t/none.ko": r'init_module\(0x[0-9a-f]{6,}, 20004, ""\)',
    "init_badptr /t/none.ko": r'init_module\(0x8, 20004, ""\)',
    "init_partial /t/none.ko": r'init_module\(0x[0-9a-f]{6,}000, 20004, ""\)',
    "init_len0 /t/none.ko": r'init_module\(0x[0-9a-f]{6,}, 0, ""\)',
    "init_len63 /t/none.ko": r'init_module\(0x[0-9a-f]{6,}, 63, ""\)',
    "init_huge /t/none.ko": r'init_module\(0x[0-9a-f]{6,}, 1099511627776, ""\)',
    "init_nocap /t/none.ko": r'init_module\(0x[0-9a-f]{6,}, 20004, ""\)',
    "del no_such_module": r'delete_module\("no_such_module", O_NONBLOCK\)',
}


def test_each_operation_reaches_the_kernel_as_it_says(directory: Path) -> None:
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no strace on this machine, or it may not trace")
    script = "".join(f"case{number} {line}\n" for number, line in enumerate(CALLS))
    tracing = (strace, "-f", "-y", "-o", "trace", "-e", "trace=init_module,finit_module,delete_module,open,openat")
    code, rows, err = run(directory, script + "last stats x\n", *tracing)
    assert (code, err) == (0, "")
    trace = (directory / "trace").read_text()
    made = [line for line in trace.splitlines() if re.search(r"\w+_module\(", line)]
    assert len(made) == len(CALLS)
    for line, (operation, expected) in zip(made, CALLS.items(), strict=True):
        assert re.search(expected, line), (operation, line)
    for flag in ("O_WRONLY", "O_RDWR", "O_PATH"):
        assert re.search(rf'none.ko", \S*{flag}', trace), flag
    # Unloading is no row; of each other call there is what the kernel said.
    said = [re.search(r"= -1 (E\w+)", line) for line in made[:-1]]
    assert [row["errno_name"] for row in rows] == [each[1] for each in said if each]
    assert {row["kernel"] for row in rows} == {"v6.4"}
    assert all(row[f"d_{name}"] == "0" for row in rows for name in capture.COUNTERS)
    assert set(COLUMNS) <= rows[0].keys()


def test_it_knows_the_operations_that_verify_knows() -> None:
    assert {operation: tuple(variants) for operation, variants in CALLERS.items()} == {
        "finit": capture.FINIT,
        "init": capture.INIT,
    }


def test_what_can_not_be_done_is_said_in_a_sentence(directory: Path) -> None:
    assert run(directory, "a finit /t/away.ko\n") == (0, [], "a: not run, there is no file /t/away.ko\n")
    assert run(directory, "a jump /t/none.ko\n")[2] == "capture: calls.script, line 1: there is no operation 'jump'\n"
    assert "'a' is not" in run(directory, "a\n")[2]
    (directory / "counters" / "modcount").unlink()
    code, rows, err = run(directory, "a finit_badfd /t/none.ko\n")
    assert (code, rows) == (1, [])
    assert "counters/modcount can't be read" in err
    assert "CONFIG_MODULE_STATS" in err
    assert err.count("\n") == 1
