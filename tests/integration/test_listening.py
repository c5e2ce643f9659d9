"""Nobody is let in from other machines by accident: real processes, asked to listen beyond the loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from modpressure.loopback import is_local
from modpressure.settings import LoaderSettings, StatsSettings
from tests.services import Launch


def start(*arguments: str, timeout_seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=timeout_seconds)


@pytest.mark.parametrize(("service", "listen"), [("stats_svc", "0.0.0.0:0"), ("loader_svc", "[::]:0")])
def test_beyond_the_loopback_without_tls_a_service_does_not_start(service: str, listen: str) -> None:
    section = service.removesuffix("_svc").upper()
    variables = f"MODPRESSURE_{section}_TLS_CERT, MODPRESSURE_{section}_TLS_KEY"
    ended = start(service, "--listen", listen)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"{service}: {listen!r} can be reached from other machines: set tls_cert and tls_key ({variables}), or give "
        f"--insecure to do without TLS (see {service} --help)\n"
    )


def test_up_does_not_start_either() -> None:
    modpressure = str(Path(sys.executable).with_name("modpressure"))
    ended = subprocess.run(
        [modpressure, "up", "--host", "0.0.0.0", "--port", "0"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "'0.0.0.0:0' can be reached from other machines" in ended.stderr
    assert "_TLS_CERT" in ended.stderr and "--tls" not in ended.stderr, "up has no such option"
    assert ended.stderr.count("\n") == 1


def test_who_says_so_is_obeyed(launch: Launch, tmp_path: Path) -> None:
    stats = launch("stats_svc", "--listen", "0.0.0.0:0", "--insecure", "--database", str(tmp_path / "stats.sqlite3"))
    with socket.create_connection(("127.0.0.1", int(stats.address.rpartition(":")[2])), 10):
        pass


def test_the_defaults_are_local() -> None:
    for settings in (StatsSettings(), LoaderSettings()):
        settings.check()


@pytest.mark.parametrize(
    ("listen", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.0.2.1:1", False),
        ("no-such-host.invalid:1", False),
        ("unix-host.invalid:1", False),
    ],
)
def test_what_only_this_machine_reaches(listen: str, local: bool) -> None:
    assert is_local(listen) is local
