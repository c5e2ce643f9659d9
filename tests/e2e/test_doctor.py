"""``modpressure doctor`` on services that are well, and on some that are not."""

from __future__ import annotations

import asyncio
import json
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from modpressure.admission import TIME_HEADER
from modpressure.cli.doctor import _skew_seconds
from modpressure.client import Client
from modpressure.client_errors import NoAnswer
from modpressure.tls import ClientTls
from modpressure.tokens import Role, entry, new_token
from tests.certificates import Authority
from tests.e2e.conftest import Cli, Up
from tests.services import Launch


def problems(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("OK ")]


def with_settings(cli: Cli, **settings: str) -> Cli:
    names = {f"MODPRESSURE_{name.upper()}": value for name, value in settings.items()}
    return Cli({**cli.environment, **names}, cli.directory)


def test_all_is_well_where_all_is_well(machine: Up) -> None:
    done = machine.cli("doctor")
    assert (done.code, done.err, problems(done.out)) == (0, "", [])
    stats = machine.cli.environment["MODPRESSURE_CLIENT_STATS"]
    assert f"OK       stats_svc at {stats}: serving" in done.out.splitlines()
    assert done.out.count("loader_svc at ") == len(machine.cli.environment["MODPRESSURE_CLIENT_LOADERS"].split(","))


def test_each_problem_is_one_line_with_what_to_do(machine: Up, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    cli = with_settings(
        machine.cli,
        client_stats="127.0.0.1:1",
        client_system="nosuch",
        loader_tree="/nosuch/modules",
        loader_cache_dir=str(file / "cache"),
        stats_database=str(file / "stats.sqlite3"),
    )
    done = cli("doctor")
    assert done.code == 1
    said = problems(done.out)
    assert [line.split(":")[0].removeprefix("problem  ") for line in said] == [
        "cache",
        "database",
        "tree",
        "stats_svc at 127.0.0.1",
    ]
    assert all("; " in line for line in said), "what to do"


def test_a_service_is_not_taken_for_the_other_one(machine: Up) -> None:
    environment = machine.cli.environment
    loader = environment["MODPRESSURE_CLIENT_LOADERS"].split(",")[0]
    swapped = with_settings(machine.cli, client_stats=loader, client_loaders=environment["MODPRESSURE_CLIENT_STATS"])
    said = problems(swapped("doctor").out)
    assert len(said) == 2 and all("another service answers there" in line for line in said)


def test_as_json_it_says_the_same(machine: Up) -> None:
    done = with_settings(machine.cli, client_system="nosuch")("doctor", "--json")
    findings = json.loads(done.out)["findings"]
    assert done.code == 1
    [problem] = [finding for finding in findings if not finding["ok"]]
    assert problem["what"] == "system" and "'nosuch'" in problem["text"]


def said_of(what: str, text: str) -> str:
    """Return the one line about a thing."""
    [line] = [line for line in text.splitlines() if line[9:].startswith(f"{what}: ")]
    return line


def test_what_services_here_would_use_is_looked_at_before_they_are_started(machine: Up, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    tokens = tmp_path / "tokens.toml"
    soon = datetime.now(UTC) + timedelta(days=2)
    tokens.write_text(entry(new_token(), "ci", [Role.LOAD], ["*"], soon))
    token = tmp_path / "ci.token"
    token.write_text(new_token())
    token.chmod(0o644)
    pair = Authority(tmp_path).sign("server")
    cli = with_settings(
        machine.cli,
        loader_tree=str(empty),
        loader_listen="0.0.0.0:50051",
        stats_database="postgresql+psycopg://me:secret@127.0.0.1:1/x",
        stats_tokens=str(tokens),
        client_token_file=str(token),
        stats_tls_cert=str(pair.cert),
        stats_tls_key=str(pair.key),
    )
    done = cli("doctor")
    assert done.code == 1
    assert said_of("tree", done.out).startswith(f"problem  tree: there are no modules in {str(empty)!r}; ")
    assert "loader_svc would not start: '0.0.0.0:50051' can be reached" in said_of("listening", done.out)
    database = said_of("database", done.out)
    assert database.startswith("problem  database: postgresql+psycopg://me:***@127.0.0.1:1/x: ")
    assert "secret" not in done.out + done.err
    assert f"'ci' expires at {soon:%Y-%m-%d %H:%M}Z; modpressure token new" in said_of("tokens", done.out)
    assert said_of("token files", done.out).startswith(f"problem  token files: anybody here can read {token}; ")
    certificates = said_of("own certificates", done.out)
    assert certificates.startswith(f"problem  own certificates: {pair.cert} is good for 0 days, until ")
    assert certificates.endswith("; renew it; a service takes new files without a restart")


def test_a_certificate_that_nobody_would_believe_is_named(machine: Up, tmp_path: Path) -> None:
    pair = Authority(tmp_path).sign("server")
    cli = with_settings(machine.cli, stats_tls_cert=str(pair.cert), stats_tls_key=str(pair.cert))
    line = said_of("own certificates", cli("doctor").out)
    assert line.startswith(f"problem  own certificates: {pair.cert} and {pair.cert} make no certificate and key")


def test_no_answer_is_told_as_any_command_tells_it(machine: Up, launch: Launch, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    pair = authority.sign("server")
    stats = launch(
        *("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "tls.sqlite3")),
        *("--tls-cert", str(pair.cert), "--tls-key", str(pair.key)),
    )
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"

    def no_answer(ca: Path | None, *services: str) -> str:
        """Return what doctor says of stats_svc and a loader, each as any command does, and of nobody but them."""
        settings = {"client_ca": str(ca)} if ca else {}
        cli = with_settings(machine.cli, client_stats=services[0], client_loaders=services[-1], **settings)
        out = cli("doctor").out
        for what, address in zip(("stats_svc", "loader_svc"), services, strict=False):
            reason, _, remedy = said_of(f"{what} at {address}", out).partition("no answer: ")[2].partition("; ")
            assert reason == why_not(address, ca)
            assert ("start it" in remedy) == (address == nobody)
        return out

    def why_not(address: str, ca: Path | None) -> str:
        async def ask() -> str:
            async with Client(stats=address, tls=ClientTls(ca) if ca else None) as client:
                with pytest.raises(NoAnswer) as raised:
                    await client.stats("default")
            return raised.value.sentence.partition(f" {address}: ")[2]

        return asyncio.run(ask())

    assert "wants TLS" in no_answer(None, stats.address, nobody)
    plain = machine.cli.environment["MODPRESSURE_CLIENT_STATS"]
    out = no_answer(stranger.cert, stats.address, plain)
    line = said_of(f"certificate of {stats.address}", out)
    assert line.endswith("not believed: unable to get local issuer certificate; see the setting ca")
    assert said_of(f"certificate of {plain}", out).endswith(
        "no TLS: wrong version number; see the settings ca, cert, key"
    )
    assert "certificate of 127" not in no_answer(authority.cert, nobody), "nothing that was not said already"


def test_a_clock_that_goes_wrong_is_noticed(machine: Up) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed")
    cli = Cli({**machine.cli.environment, "LD_PRELOAD": str(library), "FAKETIME": "-60s"}, machine.cli.directory)
    said = [line for line in cli("doctor").out.splitlines() if "_svc at " in line]
    assert said and all("its clock is 60 s ahead of this machine's; set the clocks" in line for line in said)


@pytest.mark.parametrize(("theirs", "skew"), [("100.5", 0), ("100", 0), ("101", 0), ("109", 8), ("90", -10), (None, 0)])
def test_a_clock_is_wrong_by_what_the_way_does_not_explain(theirs: str | None, skew: float) -> None:
    metadata = () if theirs is None else ((TIME_HEADER, theirs),)
    assert _skew_seconds(metadata, 100.0, 101.0) == skew
