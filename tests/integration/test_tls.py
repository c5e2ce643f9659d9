"""TLS and mutual TLS between real processes, with certificates made by openssl."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modpressure.client import Client
from modpressure.client_errors import NoAnswer
from modpressure.tls import BadCredentials, ClientTls, ServerTls, client_tls, server_tls
from modpressure.v1.stats_service_pb2 import GetStatsRequest, WatchStatsRequest
from tests.certificates import Authority, Pair
from tests.postgres import free_port
from tests.services import Launch, Process


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.sign("server")


def start_stats(launch: Launch, tmp_path: Path, pair: Pair, *options: str) -> Process:
    arguments = (
        "--database",
        str(tmp_path / "stats.sqlite3"),
        "--tls-cert",
        str(pair.cert),
        "--tls-key",
        str(pair.key),
    )
    return launch("stats_svc", "--listen", "127.0.0.1:0", *arguments, *options)


def client(process: Process, tls: ClientTls | None) -> Client:
    return Client(stats=process.address, timeout_seconds=5, tls=tls)


async def says_no(process: Process, tls: ClientTls | None) -> str:
    """Return why a client that must be refused is refused."""
    async with client(process, tls) as one:
        with pytest.raises(NoAnswer) as raised:
            await one.stats("default")
    return str(raised.value)


async def test_a_load_and_a_report_over_mutual_tls(
    launch: Launch, tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    only_ours = ("--tls-client-ca", str(authority.cert))
    stats = start_stats(launch, tmp_path, pair, *only_ours)
    mine = authority.sign("client")
    loader = launch(
        *("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, *only_ours),
        *("--tls-cert", str(pair.cert), "--tls-key", str(pair.key)),
        *("--stats-ca", str(authority.cert), "--stats-cert", str(mine.cert), "--stats-key", str(mine.key)),
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODPRESSURE_")}
    environment |= {
        "MODPRESSURE_CLIENT_LOADERS": loader.address,
        "MODPRESSURE_CLIENT_STATS": stats.address,
        "MODPRESSURE_CLIENT_CA": str(authority.cert),
        "MODPRESSURE_CLIENT_CERT": str(mine.cert),
        "MODPRESSURE_CLIENT_KEY": str(mine.key),
    }

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)

    well = command(
        *(sys.executable, "-m", "modpressure.healthcheck", stats.address, "--ca", str(authority.cert)),
        *("--cert", str(mine.cert), "--key", str(mine.key)),
    )
    assert (well.returncode, well.stdout) == (0, "SERVING\n"), well.stderr
    load = command(str(Path(sys.executable).with_name("modpressure")), "load", "minix")
    assert load.returncode == 0, load.stderr
    async with client(stats, ClientTls(authority.cert, mine.cert, mine.key)) as one:
        assert (await one.stats("default")).modcount == 1


async def test_who_has_no_certificate_or_a_strangers_is_not_let_in(
    launch: Launch, tmp_path: Path, authority: Authority, stranger: Authority, pair: Pair
) -> None:
    stats = start_stats(launch, tmp_path, pair, "--tls-client-ca", str(authority.cert))
    theirs = stranger.sign("client")
    for tls in (ClientTls(authority.cert), ClientTls(authority.cert, theirs.cert, theirs.key), None):
        assert "it closed the connection, as one does that wants TLS or another" in await says_no(stats, tls)


async def test_a_server_of_another_name_or_authority_is_not_believed(
    launch: Launch, tmp_path: Path, authority: Authority, stranger: Authority, pair: Pair
) -> None:
    stats = start_stats(launch, tmp_path, pair)
    assert f"{stats.address}: its certificate is not believed" in await says_no(stats, ClientTls(stranger.cert))
    elsewhere = authority.sign("elsewhere", host="DNS:elsewhere.example")
    other = launch(
        *("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "other.sqlite3")),
        *("--tls-cert", str(elsewhere.cert), "--tls-key", str(elsewhere.key)),
    )
    assert f"{other.address}: its certificate is for another name" in await says_no(other, ClientTls(authority.cert))


async def test_tls_to_a_plain_port_and_plain_to_a_tls_port_are_no_answer(
    launch: Launch, tmp_path: Path, authority: Authority, pair: Pair, stats: Process
) -> None:
    assert f"{stats.address}: it does not speak TLS" in await says_no(stats, ClientTls(authority.cert))
    encrypted = start_stats(launch, tmp_path, pair)
    assert f"{encrypted.address}: it closed the connection, as one does that wants TLS" in await says_no(
        encrypted, None
    )


async def test_a_certificate_that_is_replaced_is_shown_at_the_next_handshake(
    launch: Launch, tmp_path: Path, authority: Authority, stranger: Authority, pair: Pair
) -> None:
    shown = Pair(tmp_path / "shown.pem", tmp_path / "shown.key")
    shutil.copy(pair.cert, shown.cert)
    shutil.copy(pair.key, shown.key)
    stats = start_stats(launch, tmp_path, shown)
    async with client(stats, ClientTls(authority.cert)) as before:
        await before.stats("default")
        theirs = stranger.sign("server")
        # Half of it only: the pair makes no sense yet, so the old one is kept.
        theirs.cert.replace(shown.cert)
        async with client(stats, ClientTls(authority.cert)) as meanwhile:
            await meanwhile.stats("default")
        theirs.key.replace(shown.key)
        async with client(stats, ClientTls(stranger.cert)) as after:
            await after.stats("default")
        assert stats.address in await says_no(stats, ClientTls(authority.cert))
        # Who is connected stays so.
        await before.stats("default")
    assert any("kept the old certificate" in line for line in stats.lines)


async def test_a_client_takes_up_a_certificate_that_is_replaced_and_leaves_its_streams_alone(
    launch: Launch, tmp_path: Path, authority: Authority, stranger: Authority, pair: Pair
) -> None:
    shown = Pair(tmp_path / "mine.pem", tmp_path / "mine.key")
    mine, theirs = authority.sign("mine"), stranger.sign("theirs")
    shutil.copy(mine.cert, shown.cert)
    shutil.copy(mine.key, shown.key)
    believed = tmp_path / "believed.pem"
    shutil.copy(authority.cert, believed)
    options = ("--listen", f"127.0.0.1:{free_port()}", "--tls-client-ca", str(believed))
    stats = start_stats(launch, tmp_path, pair, *options)
    async with client(stats, ClientTls(authority.cert, shown.cert, shown.key)) as one:
        watch = one.stats_stub().WatchStats(WatchStatsRequest(system="default"))
        assert (await watch.read()).stats.system == "default"
        # From now on a handshake needs the other authority's.
        shutil.copy(stranger.cert, tmp_path / "new")
        (tmp_path / "new").replace(believed)
        assert "it closed the connection" in await says_no(stats, ClientTls(authority.cert, mine.cert, mine.key))
        # Half of it only: the pair makes no sense yet, and the old one, and its connection, are kept.
        theirs.cert.replace(shown.cert)
        await one.stats()
        theirs.key.replace(shown.key)
        await one.stats()
        loader = launch(
            *("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, "--stats-ca", str(authority.cert)),
            *("--stats-cert", str(shown.cert), "--stats-key", str(shown.key)),
        )
        async with Client([loader.address]) as loading:
            await loading.load("minix")
        while not (await watch.read()).stats.calls:
            pass
        loader.stop()
        stats.stop()
        # Nor does it need its old connection.
        start_stats(launch, tmp_path, pair, *options)
        asked = one.stats_stub().GetStats(GetStatsRequest(), wait_for_ready=True, timeout=30)
        assert (await asked).stats.modcount == 1
    assert not any("kept the old certificate" in line or "Traceback" in line for line in stats.lines)


def cases(authority: Authority, pair: Pair, tmp_path: Path) -> Iterator[tuple[ServerTls | ClientTls, str]]:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate\n")
    other = authority.sign("other")
    away = tmp_path / "away.pem"
    yield ServerTls(pair.cert, other.key), "make no certificate and key: key values mismatch"
    yield ServerTls(away, pair.key), f"{away} can't be read: no such file or directory"
    yield ServerTls(junk, pair.key), f"{junk} and {pair.key} make no certificate and key"
    yield ServerTls(pair.cert, pair.key, junk), f"{junk} holds no certificate"
    yield ClientTls(junk), f"{junk} holds no certificate"
    yield ClientTls(authority.cert, pair.cert, other.key), "make no certificate and key"


def test_files_that_make_no_credentials_are_named(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    for tls, sentence in cases(authority, pair, tmp_path):
        with pytest.raises(BadCredentials) as raised:
            tls.read()
        assert sentence in raised.value.sentence


def test_a_file_that_goes_while_it_is_looked_at_is_named(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = authority.sign("mine")
    load = ssl.SSLContext.load_cert_chain

    def load_late(self: ssl.SSLContext, cert: Path, key: Path, password: Any) -> None:
        key.unlink()
        load(self, cert, key, password)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_late)
    with pytest.raises(BadCredentials, match="can't be read: no such file or directory"):
        ServerTls(mine.cert, mine.key).read()


def test_half_of_what_tls_needs_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x"
    assert server_tls(None, None, None) is None
    assert client_tls(None, None, None) is None
    for make, arguments, missing in (
        (server_tls, (file, None, None), "needs tls_key"),
        (server_tls, (None, file, None), "needs tls_cert"),
        (server_tls, (None, None, file), "needs tls_cert and tls_key"),
        (client_tls, (file, file, None), "needs key"),
        (client_tls, (None, file, file), "needs ca"),
    ):
        with pytest.raises(BadCredentials, match=missing):
            make(*arguments)


def test_a_service_with_bad_files_does_not_start(tmp_path: Path, pair: Pair) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "stats_svc", "--listen", "127.0.0.1:0", "--tls-cert", str(pair.cert)),
            *("--tls-key", str(tmp_path / "away.key"), "--database", str(tmp_path / "stats.sqlite3")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr.endswith("away.key can't be read: no such file or directory\n")
    assert "Traceback" not in ended.stderr


def test_a_key_with_a_password_is_refused_and_not_asked_for(tmp_path: Path, pair: Pair) -> None:
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", str(pair.key), "-out", str(locked), "-passout", "pass:x"], check=True
    )
    with pytest.raises(BadCredentials, match="is encrypted"):
        ServerTls(pair.cert, locked).read()
