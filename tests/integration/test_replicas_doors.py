"""Several stats_svc over one PostgreSQL database, and who is let in where one hands on to another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from modpressure.client import Client
from modpressure.errors import AlreadyExists, Unavailable
from modpressure.tls import ClientTls
from modpressure.v1 import stats_service_pb2 as pb
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from stats_svc.forward import CLIENT, Vouching
from tests.certificates import Authority, Pair
from tests.postgres import free_port
from tests.services import Launch, Process

WAIT_SECONDS = 60
Replica = Callable[..., Process]


@pytest.fixture
def replica(postgres_database: str, launch: Launch) -> Replica:
    def start(*arguments: object, listen: str = "127.0.0.1:0") -> Process:
        texts = map(str, arguments)
        options = ("--listen", listen, "--database", postgres_database, "--lead-seconds", "1")
        return launch("stats_svc", *options, *texts)

    return start


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def mutual(authority: Authority, pair: Pair) -> tuple[object, ...]:
    """Return the settings of a stats_svc that lets in, and trusts, whom an authority has signed."""
    served = ("--tls-cert", pair.cert, "--tls-key", pair.key)
    return (*served, "--tls-client-ca", authority.cert, "--peer-ca", authority.cert)


# --- TLS ---


async def test_replicas_talk_mutual_tls_to_each_other(replica: Replica, launch: Launch, authority: Authority) -> None:
    first = await asyncio.to_thread(replica, *mutual(authority, authority.sign("first")))
    second = await asyncio.to_thread(replica, *mutual(authority, authority.sign("second")))
    mine = authority.sign("client")
    loader = await asyncio.to_thread(
        launch,
        *("loader_svc", "--listen", "127.0.0.1:0", "--stats", second.address, "--stats-ca", str(authority.cert)),
        *("--stats-cert", str(mine.cert), "--stats-key", str(mine.key)),
    )
    tls = ClientTls(authority.cert, mine.cert, mine.key)
    async with Client(stats=second.address, tls=tls) as client, Client([loader.address]) as loading:
        await client.create_system("small")
        assert (await loading.load("minix", system="small")).call.errno == ""
        assert (await client.stats("small")).loaders == 1
    async with Client(stats=first.address, tls=tls) as client:
        assert (await client.stats("small")).modcount == 1


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("another name", "its certificate is for another name"),
        ("another authority", "its certificate is not believed"),
        ("no certificate", "it closed the connection, as one does that wants TLS or another certificate"),
        ("no TLS", "it closed the connection, as one does that wants TLS or another certificate"),
    ],
)
async def test_who_stands_by_says_why_it_can_not_reach_the_leader(
    replica: Replica, authority: Authority, tmp_path: Path, fault: str, sentence: str
) -> None:
    port = free_port()
    place = f"localhost:{port}" if fault == "another name" else f"127.0.0.1:{port}"
    elsewhere = ("--advertise", place)
    pair = authority.sign("leader", host="IP:127.0.0.1")
    await asyncio.to_thread(replica, *mutual(authority, pair), *elsewhere, listen=f"127.0.0.1:{port}")
    own = authority.sign("second")
    options = list(mutual(authority, own))
    if fault == "another authority":
        options[-1] = Authority(tmp_path, "stranger").cert
    elif fault == "no certificate":
        # It shows one that nobody has signed whom the leader trusts.
        theirs = Authority(tmp_path, "stranger").sign("second")
        options[1], options[3] = theirs.cert, theirs.key
    elif fault == "no TLS":
        options = []
    second = await asyncio.to_thread(replica, *options)
    mine = authority.sign("client")
    ca = tmp_path / "stranger.pem" if fault == "no certificate" else authority.cert
    tls = ClientTls(ca, mine.cert, mine.key) if options else None
    async with Client(stats=second.address, tls=tls) as client:
        with pytest.raises(Unavailable, match=f"^no answer from the stats_svc that leads at {place}: {sentence}"):
            await client.create_system("small")
        # What is stored it tells all the same.
        assert (await client.stats()).calls == 0
    # Once, however often it is asked.
    assert sum("can't hand on" in line and sentence in line for line in second.lines) == 1


async def test_certificates_of_replicas_are_replaced_while_they_run(
    replica: Replica, authority: Authority, tmp_path: Path
) -> None:
    """The leader closes connections after a second, so that none is left from before."""
    shown = Pair(tmp_path / "shown.pem", tmp_path / "shown.key")
    trusted = tmp_path / "trusted.pem"

    def install(by: Authority) -> ClientTls:
        new = by.sign("replica")
        for source, target in ((new.cert, shown.cert), (new.key, shown.key), (by.cert, trusted)):
            # At once, as whoever replaces a file that is in use has to.
            shutil.copy(source, tmp_path / "new").replace(target)
        mine = by.sign("client")
        return ClientTls(by.cert, mine.cert, mine.key)

    before = install(authority)
    options = ("--tls-cert", shown.cert, "--tls-key", shown.key, "--tls-client-ca", trusted, "--peer-ca", trusted)
    first = await asyncio.to_thread(replica, *options, "--age-seconds", "1")
    second = await asyncio.to_thread(replica, *options)
    async with Client(stats=second.address, tls=before) as client:
        await client.create_system("one")
        after = install(Authority(tmp_path, "later"))
        async with Client(stats=second.address, tls=after) as later, asyncio.timeout(WAIT_SECONDS):
            while not any("took a new certificate" in line for line in first.lines):
                with pytest.raises(AlreadyExists):
                    await later.create_system("one")
            await later.create_system("two")
        # Who is connected to it stays so.
        assert [system.id async for system in client.systems()] == ["default", "one", "two"]


# --- limits ---


@contextlib.asynccontextmanager
async def another_host(address: str) -> AsyncIterator[str]:
    """Give an address; who connects to it reaches ``address`` as a client from 127.0.0.2."""
    host, _, port = address.rpartition(":")

    relays: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port), local_addr=("127.0.0.2", 0))
        copies = [asyncio.ensure_future(copy(reader, back)), asyncio.ensure_future(copy(there, writer))]
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in copies:
                one.cancel()
            for end in (writer, back):
                end.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relays.add(asyncio.ensure_future(relay(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for one in relays:
            one.cancel()
        await asyncio.gather(*relays, return_exceptions=True)


async def watched(stub: Any, metadata: Any = ()) -> Any:
    """Begin to watch, and return the call; AioRpcError if it is refused."""
    call = stub.WatchStats(pb.WatchStatsRequest(), metadata=metadata)
    if await call.read() is grpc.aio.EOF:
        raise grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )
    return call


async def watch_all(stub: Any, metadata: Any = ()) -> tuple[list[Any], str]:
    """Begin to watch until that is refused; return the calls, and the sentence."""
    calls: list[Any] = []
    try:
        while True:
            calls.append(await watched(stub, metadata))
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
        return calls, str(error.details())


async def test_clients_behind_another_replica_have_limits_of_their_own(
    replica: Replica, postgres_database: str
) -> None:
    first = await asyncio.to_thread(replica, "--rpc-limit", 8)
    second = await asyncio.to_thread(replica)
    async with (
        another_host(second.address) as address,
        grpc.aio.insecure_channel(first.address) as direct,
        grpc.aio.insecure_channel(second.address) as handed_on,
        grpc.aio.insecure_channel(address) as of_other,
    ):
        calls, sentence = await watch_all(StatsServiceStub(handed_on))
        assert len(calls) == 4
        assert "127.0.0.1 has 4 RPCs in progress" in sentence
        # It is the same client that has used up its share, whichever of them it asks.
        calls, sentence = await watch_all(StatsServiceStub(direct))
        assert (calls, "127.0.0.1 has 4 RPCs in progress" in sentence) == ([], True)
        calls, sentence = await watch_all(StatsServiceStub(of_other))
        assert len(calls) == 2
        assert "127.0.0.2 has 2 RPCs in progress" in sentence
        # Nobody says that he is somebody else, but who can read the database.
        name = b"192.0.2.1"
        for forged in (name, bytes(32) + name, b"", Vouching(lambda: "guessed").metadata(name.decode())[0][1]):
            calls, sentence = await watch_all(StatsServiceStub(direct), ((CLIENT, forged),))
            assert (calls, "127.0.0.1 has 4 RPCs in progress" in sentence) == ([], True)
        engine = sa.create_engine(postgres_database, poolclass=sa.NullPool)
        with engine.connect() as connection:
            leader = connection.execute(sa.text("SELECT leader FROM modpressure")).scalar_one()
        await watched(StatsServiceStub(direct), Vouching(lambda: leader).metadata(name.decode()))
    refusals = [entry for line in first.lines if (entry := json.loads(line))["event"] == "client refused"]
    assert {entry["client"] for entry in refusals} == {"127.0.0.1", "127.0.0.2"}
