"""Tokens at the doors of real services: who may do what, in which systems, until when."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from modpressure.access import Door, role_of, systems_of
from modpressure.client import Client
from modpressure.errors import Forbidden, ModpressureError, NotFound, Unauthenticated, Unavailable
from modpressure.grpc_errors import translate_errors
from modpressure.grpc_server import GrpcServer
from modpressure.tls import BadCredentials, open_channel, read_token
from modpressure.tokens import BadTokenFile, Role, TokenFile, digest, entry, new_token, read_tokens
from modpressure.v1 import call_pb2, ledger_service_pb2, loader_service_pb2, stats_service_pb2
from modpressure.v1.loader_service_pb2_grpc import (
    LoaderServiceServicer,
    LoaderServiceStub,
    add_LoaderServiceServicer_to_server,
)
from modpressure.v1.stats_service_pb2_grpc import (
    StatsServiceServicer,
    StatsServiceStub,
    add_StatsServiceServicer_to_server,
)
from tests.services import Launch, Process

COMING = stats_service_pb2.LoadedModule.STATE_COMING

RPCS = [
    f"/{service.full_name}/{method.name}"
    for file in (ledger_service_pb2, loader_service_pb2, stats_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


class Doors:
    """A stats_svc and a loader with tokens, and clients that have one."""

    def __init__(self, launch: Launch, tmp_path: Path) -> None:
        self.file = tmp_path / "tokens.toml"
        self.file.touch()
        self._launch = launch
        self._path = tmp_path
        self.clients: list[Client] = []
        machine = tmp_path / "machine.token"
        machine.write_text(self.add("machine", Role.LOAD) + "\n")
        self.stats = launch(
            *("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "stats.sqlite3")),
            *("--tokens", str(self.file)),
        )
        self.loader = self.start_loader(machine)

    def start_loader(self, token_file: Path, *arguments: str) -> Process:
        return self._launch(
            *("loader_svc", "--listen", "127.0.0.1:0", "--stats", self.stats.address),
            *("--tokens", str(self.file), "--stats-token-file", str(token_file), *arguments),
        )

    def add(self, name: str, *roles: Role, systems: tuple[str, ...] = ("*",), expires: datetime | None = None) -> str:
        """Make a token known; return it."""
        token = new_token()
        with self.file.open("a") as file:
            file.write(entry(token, name, roles, systems, expires))
        return token

    def client(self, token: str) -> Client:
        client = Client([self.loader.address], self.stats.address, timeout_seconds=20, token=token)
        self.clients.append(client)
        return client


@pytest.fixture
def doors(launch: Launch, tmp_path: Path) -> Doors:
    return Doors(launch, tmp_path)


async def refused(asked: Awaitable[object], kind: type[ModpressureError]) -> str:
    with pytest.raises(kind) as raised:
        await asked
    assert type(raised.value) is kind
    return raised.value.sentence


async def loaded(client: Client, system: str = "default") -> str:
    """Load a module as soon as the loader has found stats_svc; return the outcome's errno."""
    async with asyncio.timeout(60):
        while True:
            try:
                return (await client.load("minix", system=system)).call.errno
            except Unavailable:
                await asyncio.sleep(0.05)


async def test_each_role_opens_its_own_doors(doors: Doors) -> None:
    load, read, admin = (doors.client(doors.add(role, role)) for role in (Role.LOAD, Role.READ, Role.ADMIN))
    assert await loaded(load) == ""
    assert (await read.stats("default")).modcount == 1
    assert await refused(read.load("xfs"), Forbidden) == "token 'read' may not load: it is for read"
    assert await refused(load.stats("default"), Forbidden) == "token 'load' may not read: it is for load"
    assert await refused(load.create_system("more"), Forbidden) == "token 'load' may not admin: it is for load"
    await admin.create_system("more")
    assert (await admin.stats("more")).modcount == 0
    for client in doors.clients:
        await client.close()


async def test_who_shows_no_token_or_a_strangers_is_not_let_in(doors: Doors) -> None:
    for token, sentence in (
        ("", "a token is needed: metadata 'authorization: Bearer TOKEN'"),
        (new_token(), "the token is not known here"),
        (doors.add("old", Role.ADMIN, expires=datetime(2020, 1, 31, tzinfo=UTC)), "token 'old' expired at 2020-01-31"),
    ):
        client = doors.client(token)
        for asked in (client.stats("default"), client.load("xfs"), client.create_system("more")):
            assert (await refused(asked, Unauthenticated)).startswith(sentence)
        with pytest.raises(Unauthenticated, match=sentence):
            async for _ in client.watch("default"):
                raise AssertionError
        await client.close()
    # Whether it is well, everybody may ask.
    probe = [sys.executable, "-m", "modpressure.healthcheck", doors.stats.address]
    assert subprocess.run(probe, capture_output=True, text=True, timeout=60).stdout == "SERVING\n"


async def test_a_token_is_good_for_its_systems_alone(doors: Doors) -> None:
    admin = doors.client(doors.add("admin", Role.ADMIN))
    for system in ("ci-1", "other"):
        await admin.create_system(system)
    client = doors.client(doors.add("ci", Role.LOAD, Role.READ, systems=("ci-*",)))
    assert await loaded(client, "ci-1") == ""
    assert (await client.stats("ci-1")).modcount == 1
    for asked in (client.stats("other"), client.load("xfs", system="other")):
        assert await refused(asked, Forbidden) == "token 'ci' is not for system 'other'"
    # Where none is said it is the default, which is another one, too.
    assert await refused(client.stats(), Forbidden) == "token 'ci' is not for system 'default'"
    with pytest.raises(Forbidden, match="token 'ci' is not for all systems"):
        async for _ in client.systems():
            raise AssertionError
    for one in doors.clients:
        await one.close()


async def test_a_loader_with_a_token_for_some_systems_loads_in_these(doors: Doors, tmp_path: Path) -> None:
    own = tmp_path / "own.token"
    own.write_text(doors.add("own", Role.LOAD, systems=("ci-*",)))
    loader = doors.start_loader(own)
    client = Client([loader.address], doors.stats.address, timeout_seconds=20, token=doors.add("all", Role.ADMIN))
    assert await loaded(client, "ci-1") == ""
    assert (await client.unload("minix", system="ci-1")).unload.errno == ""
    await client.close()


async def test_what_a_loaders_own_token_is_not_for_is_refused_to_who_asks_it_and_to_nobody_else(
    doors: Doors, tmp_path: Path
) -> None:
    own = tmp_path / "own.token"
    own.write_text(doors.add("own", Role.LOAD, systems=("ci-*",)))
    loader = doors.start_loader(own)
    client = Client([loader.address], doors.stats.address, timeout_seconds=20, token=doors.add("all", Role.ADMIN))
    assert await loaded(client, "ci-1") == ""
    for asked in (
        client.load("romfs", system="other"),
        client.load("romfs", system="other", request_id="one"),
        client.unload("minix", system="other"),
        client.request_module("romfs", system="other"),
    ):
        assert await refused(asked, Forbidden) == "the loader's token is not for system 'other'"
        assert (await client.unload("minix", system="ci-1")).unload.errno == ""
        assert await loaded(client, "ci-1") == ""
    assert not any("lost stats_svc" in line for line in loader.lines)
    await refused(client.stats("other"), NotFound)
    await client.close()


async def test_a_loader_whose_token_is_made_good_for_less_goes_on_in_what_is_left(doors: Doors, tmp_path: Path) -> None:
    own, init = tmp_path / "own.token", tmp_path / "init.csv"
    own.write_text(doors.add("own", Role.LOAD, systems=("ci-1", "ci-2")))
    init.write_text("module,condition,duration_ms,result\nromfs,always,3600000,0\n")
    loader = doors.start_loader(own, "--init", str(init))
    client = Client([loader.address], doors.stats.address, timeout_seconds=60, token=doors.add("all", Role.ADMIN))
    assert await loaded(client, "ci-1") == ""
    assert await loaded(client, "ci-2") == ""
    in_flight = asyncio.ensure_future(client.load("romfs", system="ci-2"))
    async with asyncio.timeout(60):
        while not any([module.state == COMING async for module in client.loaded_modules("ci-2")]):
            await asyncio.sleep(0.05)
    doors.file.write_text(doors.file.read_text().replace('["ci-1", "ci-2"]', '["ci-1"]'))
    with pytest.raises(Unavailable, match=r"not counted: the token of .* is no longer for system 'ci-2'"):
        await in_flight
    assert (await client.unload("minix", system="ci-1")).unload.errno == ""
    assert await refused(client.unload("minix", system="ci-2"), Forbidden) == (
        "the loader's token is not for system 'ci-2'"
    )
    # What its call held there is given back, and what was live there stays so.
    assert (await client.stats("ci-2")).abandoned_calls == 1
    there = [module.module async for module in client.loaded_modules("ci-2")]
    assert "minix" in there and "romfs" not in there
    await client.close()


async def test_a_loader_without_a_good_token_says_so_and_serves_nobody(doors: Doors, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.token"
    wrong.write_text(new_token())
    loader = doors.start_loader(wrong)
    client = Client([loader.address], doors.stats.address, timeout_seconds=20, token=doors.add("load", Role.LOAD))
    with pytest.raises(ModpressureError, match="does not serve this loader: the token is not known here"):
        await client.load("minix")
    assert any("the token is not known here" in line for line in loader.lines)
    # A token that is put right is taken at the next attempt.
    wrong.write_text(doors.add("second", Role.LOAD))
    assert await loaded(client) == ""
    await client.close()


async def test_a_token_that_is_taken_out_of_the_file_opens_nothing_any_more(doors: Doors) -> None:
    client = doors.client(doors.add("short", Role.READ))
    await client.stats("default")
    doors.file.write_text("no TOML [")
    # What makes no sense leaves what was.
    await client.stats("default")
    doors.file.write_text("")
    assert await refused(client.stats("default"), Unauthenticated) == "the token is not known here"
    await client.close()


class Echo(LoaderServiceServicer, StatsServiceServicer):
    """Answers each request of a stream, and tells watchers when something has changed."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.carried_out = 0

    async def LoadModules(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async with translate_errors(context, "Echo.LoadModules"):
            async for _ in requests:
                self.carried_out += 1
                yield loader_service_pb2.LoadModulesResponse()

    async def WatchStats(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            yield stats_service_pb2.WatchStatsResponse()
            await self.changed.wait()


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        ("gone", "the token is not known here"),
        ("other role", "token 'one' may not (load|read): it is for (load|read)"),
        ("other system", "token 'one' is not for system 'default'"),
    ],
)
@pytest.mark.parametrize("role", [Role.LOAD, Role.READ])
async def test_a_stream_ends_when_its_token_is_taken_out_of_the_file(
    tmp_path: Path, role: Role, now: str, sentence: str
) -> None:
    file, token, echo = tmp_path / "tokens.toml", new_token(), Echo()
    file.write_text(entry(token, "one", [role], ["*"]))
    server = GrpcServer("127.0.0.1:0", tokens=TokenFile(file), grace_seconds=5)
    server.add(echo, add_LoaderServiceServicer_to_server, "modpressure.v1.LoaderService")
    server.add(echo, add_StatsServiceServicer_to_server, "modpressure.v1.StatsService")
    address = await server.start()
    other = Role.READ if role is Role.LOAD else Role.LOAD
    entries = {
        "gone": "",
        "other role": entry(token, "one", [other], ["*"]),
        "other system": entry(token, "one", [role], ["ci-*"]),
    }
    async with open_channel(address, None, token=token) as channel:
        if role is Role.LOAD:
            asked = loader_service_pb2.LoadModulesRequest()
            asked.requests.add().load.module = "xfs"
            call = LoaderServiceStub(channel).LoadModules()
            await call.write(asked)
            await call.read()
            file.write_text(entries[now])
            await call.write(asked)
        else:
            call = StatsServiceStub(channel).WatchStats(stats_service_pb2.WatchStatsRequest())
            await call.read()
            file.write_text(entries[now])
            echo.changed.set()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            while await call.read() is not grpc.aio.EOF:
                assert echo.carried_out <= 1
    codes = {grpc.StatusCode.UNAUTHENTICATED} if now == "gone" else {grpc.StatusCode.PERMISSION_DENIED}
    assert ended.value.code() in codes and re.fullmatch(sentence, ended.value.details() or "")
    assert echo.carried_out <= 1
    await server.stop()


async def test_a_stream_ends_when_its_token_does(doors: Doors) -> None:
    expires = datetime.now(UTC) + timedelta(seconds=2)
    token = doors.add("brief", Role.READ, expires=expires)
    client = doors.client(token)
    seen = 0
    with pytest.raises(Unauthenticated, match="token 'brief' expired at"):
        async for _ in client.watch("default", interval_seconds=0.1):
            seen += 1
    assert seen
    await client.close()


async def test_no_token_is_ever_logged(doors: Doors) -> None:
    token = doors.add("seen", Role.READ)
    client = doors.client(token)
    await client.stats("default")
    await refused(client.load("xfs"), Forbidden)
    await client.close()
    assert doors.stats.stop() == 0
    assert doors.loader.stop() == 0
    logged = "".join(doors.stats.lines + doors.loader.lines)
    assert token not in logged and digest(token) not in logged


async def test_grpcurls_metadata_is_understood(doors: Doors) -> None:
    # As grpcurl -H 'authorization: Bearer …' sends it.
    token = doors.add("curl", Role.READ)
    async with grpc.aio.insecure_channel(doors.stats.address) as channel:
        request = stats_service_pb2.GetReportRequest()
        metadata = (("authorization", f"Bearer {token}"),)
        assert (await StatsServiceStub(channel).GetReport(request, metadata=metadata)).text


@pytest.mark.parametrize("method", RPCS)
def test_every_rpc_needs_a_role(method: str) -> None:
    name = method.rpartition("/")[2]
    expected = Role.LOAD
    if name.startswith(("Get", "List", "Watch")):
        expected = Role.READ
    elif method.startswith("/modpressure.v1.StatsService/"):
        expected = Role.ADMIN
    assert role_of(method) is expected


def test_what_nobody_knows_needs_an_admin() -> None:
    assert role_of("/modpressure.v1.StatsService/Whatever") is Role.ADMIN


def test_the_systems_of_a_request_are_found_wherever_they_are() -> None:
    ledger = ledger_service_pb2
    operations = [ledger.Operation(system="a"), ledger.Operation(system="b"), ledger.Operation()]
    batch = ledger.ConnectRequest(batch=ledger.OperationBatch(operations=operations))
    assert set(systems_of(batch)) == {"a", "b", "default"}
    # What is within an operation is of its system, whether it says so again or not.
    finish = ledger.FinishCall(call=call_pb2.Call(module="xfs"))
    operations = [ledger.Operation(system="a", finish_call=finish)]
    assert set(systems_of(ledger.OperationBatch(operations=operations))) == {"a"}
    finish.call.system = "b"
    operations = [ledger.Operation(system="a", finish_call=finish)]
    assert set(systems_of(ledger.OperationBatch(operations=operations))) == {"a", "b"}
    load = loader_service_pb2.LoadModuleRequest(system="c")
    many = loader_service_pb2.LoadModulesRequest(requests=[loader_service_pb2.ModuleRequest(load=load)])
    assert set(systems_of(many)) == {"c"}
    create = stats_service_pb2.CreateSystemRequest(system=stats_service_pb2.System(id="d"))
    assert set(systems_of(create)) == {"d"}


async def test_who_may_not_see_all_systems_is_not_told_their_names(tmp_path: Path) -> None:
    file, token = tmp_path / "tokens.toml", new_token()
    # That fits a star, too, which is not the name of any.
    file.write_text(entry(token, "one", [Role.READ], ["?"]))
    server = GrpcServer("127.0.0.1:0", tokens=TokenFile(file), grace_seconds=5)
    server.add(StatsServiceServicer(), add_StatsServiceServicer_to_server, "modpressure.v1.StatsService")
    client = Client(stats=await server.start(), token=token)
    with pytest.raises(Forbidden, match="token 'one' is not for all systems"):
        await anext(client.systems())
    await client.close()
    await server.stop()


async def test_a_token_is_not_sent_where_others_could_read_it() -> None:
    for address in ("10.0.0.1:50050", "dns:///stats.example:50050", "[fe80::1]:1", "unix-stats.example:50050"):
        with pytest.raises(BadCredentials, match="could be read on its way"):
            open_channel(address, None, token="x")
    for address in ("127.0.0.1:50050", "dns:///localhost:50050", "[::1]:1", "unix:/run/x"):
        await open_channel(address, None, token="x").close()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[token]]\n", "token 1: it has no name"),
        ('[[token]]\nname = "a"\nsha256 = "abc"\n', "token 1: sha256 of 'a' is not 64 lower-case hexadecimal digits"),
        ("x = 1\n", "there is no 'x' in a file of tokens"),
        ("token = 3\n", r"tokens are tables, \[\[token\]\]"),
        ("token = [3]\n", r"token 1: it is no table, \[\[token\]\]"),
        ("[[token]]\nrole = 1\n", "token 1: there is no key 'role'"),
        ("][", "is no TOML"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(text)
    with pytest.raises(BadTokenFile, match=sentence) as raised:
        TokenFile(file)
    assert str(file) in raised.value.sentence


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('roles = ["root"]', "'root' is no role; there are load, read, admin"),
        ("roles = []", "roles is not a list of texts"),
        ('systems = "x"', "systems is not a list of texts"),
        ("expires = 2030-01-31", "expires of 'a' is no date and time with a zone"),
        ('expires = "soon"', "expires of 'a' is no date and time with a zone"),
    ],
)
def test_a_key_that_makes_no_sense_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    values = {"roles": '["read"]', "systems": '["*"]'}
    key, _, value = line.partition(" = ")
    values[key] = value
    file = tmp_path / "tokens.toml"
    lines = [f"{key} = {value}" for key, value in values.items()]
    file.write_text("\n".join(["[[token]]", 'name = "a"', f'sha256 = "{digest("x")}"', *lines]))
    with pytest.raises(BadTokenFile, match=sentence):
        read_tokens(file)


def test_a_token_is_made_by_a_command_and_known_by_its_hash_alone(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    program = str(Path(sys.executable).with_name("modpressure"))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, "token", *arguments], capture_output=True, text=True, timeout=60)

    made = command("new", str(file), "--name", "ci", "--role", "load", "--role", "read", "--system", "ci-*")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert token not in file.read_text()
    assert os.stat(file).st_mode & 0o777 == 0o600
    grant = TokenFile(file).grant(f"Bearer {token}")
    assert (grant.name, grant.roles, grant.systems) == ("ci", {Role.LOAD, Role.READ}, ("ci-*",))
    second = command("new", str(file), "--name", "b", "--role", "admin", "--days", "1")
    assert second.returncode == 0
    assert command("list", str(file)).stdout.splitlines()[1] == "ci: load, read; systems ci-*; expires never"
    output = tmp_path / "c.token"
    third = command("new", str(file), "--name", "c", "--role", "read", "--output", str(output), "--json")
    assert third.returncode == 0 and json.loads(third.stdout)["token_file"] == str(output)
    assert os.stat(output).st_mode & 0o777 == 0o600
    assert TokenFile(file).grant(f"Bearer {read_token(output)}").name == "c"
    known = file.read_text()
    over = command("new", str(file), "--name", "d", "--role", "read", "--output", str(output))
    assert (over.returncode, over.stderr) == (1, f"modpressure: {output} can't be written: file exists\n")
    nowhere = tmp_path / "nosuch" / "tokens.toml"
    assert command("new", str(nowhere), "--name", "d", "--role", "read", "--output", f"{output}2").returncode == 1
    assert file.read_text() == known and not (tmp_path / "c.token2").exists()
    again = command("new", str(file), "--name", "ci", "--role", "load")
    assert (again.returncode, again.stderr) == (1, f"modpressure: {file} has a token 'ci' already\n")
    bad = command("new", str(file), "--name", 'a"b', "--role", "load")
    assert bad.returncode == 2 and "is no name or pattern" in bad.stderr


async def test_a_token_for_one_system_gains_nothing_by_what_is_no_message(doors: Doors) -> None:
    token = doors.add("one", Role.READ, systems=("mine",))
    async with grpc.aio.insecure_channel(doors.stats.address) as channel:
        call = channel.unary_unary("/modpressure.v1.StatsService/GetStats")
        answer = call(b"\x0a\xff", metadata=(("authorization", f"Bearer {token}"),))
        assert await answer.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert await call(b"\x0a\xff").code() == grpc.StatusCode.UNAUTHENTICATED


async def test_who_is_not_let_in_is_told_so_before_a_request_is_read(launch: Launch, tmp_path: Path) -> None:
    """Else strangers could fill the memory with long ones."""
    file, loads = tmp_path / "tokens.toml", new_token()
    file.write_text(entry(loads, "loads", [Role.LOAD], ["*"]))
    database = str(tmp_path / "stats.sqlite3")
    limits = ("--tokens", str(file), "--request-seconds", "0.2")
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", database, *limits)
    async with grpc.aio.insecure_channel(stats.address) as channel:
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            ((("authorization", f"Bearer {new_token()}"),), grpc.StatusCode.UNAUTHENTICATED),
            ((("authorization", f"Bearer {loads}"),), grpc.StatusCode.PERMISSION_DENIED),
        ):
            for method in ("GetReport", "WatchStats", "ImportSystem"):
                # To the client a method that takes a stream, so that nothing follows the headers.
                call = channel.stream_stream(f"/modpressure.v1.StatsService/{method}")(metadata=metadata)
                assert await call.code() is code, (method, await call.details())


async def test_a_method_is_wrapped_once_for_all_who_call_it(tmp_path: Path) -> None:
    """Else each RPC would cost that, and so would what other interceptors remember of a handler."""
    file, tokens = tmp_path / "tokens.toml", [new_token(), new_token()]
    names = ("one", "other")
    file.write_text("".join(entry(token, name, [Role.READ], ["*"]) for token, name in zip(tokens, names, strict=True)))
    door = Door(TokenFile(file))

    async def inner(request: Any, context: Any) -> Any:
        return request

    handler = grpc.unary_unary_rpc_method_handler(inner)

    async def find(details: Any) -> Any:
        return handler

    def details(metadata: tuple[tuple[str, str], ...]) -> Any:
        return SimpleNamespace(method="/modpressure.v1.StatsService/GetStats", invocation_metadata=metadata)

    metadata = [(("authorization", f"Bearer {token}"),) for token in (*tokens, "unknown")]
    wrapped = [await door.intercept_service(find, details(each)) for each in (*metadata, ())]
    assert wrapped[0] is not handler
    assert all(each is wrapped[0] for each in wrapped)
