"""Ctrl-C while a program starts: its imports take most of that time."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize("words", ["stats_svc", "loader_svc", "modpressure up", "modpressure watch"])
def test_ctrl_c_while_a_program_starts_is_no_stack_trace(words: str) -> None:
    # It tells each module that it has imported.
    command = [sys.executable, "-X", "importtime", "-m", *words.split()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.split()[-1] == "asyncio" for line in process.stderr)
        process.send_signal(signal.SIGINT)
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.returncode, said) == (130, [])


def test_ctrl_c_that_is_ignored_stays_so() -> None:
    code = (
        "import signal; from modpressure.starting import starting\nwith starting(): signal.raise_signal(signal.SIGINT)"
    )
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {code}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 130
    assert subprocess.run([sys.executable, "-c", ignoring]).returncode == 0
