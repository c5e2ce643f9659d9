"""The command line without services: parsing, sentences, exit codes, and what is printed for which messages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from modpressure import __version__
from modpressure.cli import children, events, load, modules, output, storm_view, up_view
from modpressure.cli.main import app, main
from modpressure.kernel.outcome import Outcome as KernelOutcome
from modpressure.kernel.policy import POLICIES as KERNEL_POLICIES
from modpressure.kernel.report import ReportFormat as KernelReportFormat
from modpressure.storm import StormResult, StormRun
from modpressure.tls import ClientTls
from modpressure.v1.call_pb2 import Call, Event, Outcome, Unload
from modpressure.v1.loader_service_pb2 import (
    Layout,
    LoadModuleResponse,
    Module,
    Storm,
    StormProgress,
    StormReady,
    StormSummary,
)
from modpressure.v1.stats_service_pb2 import Stats

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("MODPRESSURE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; returns exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def commands() -> list[list[str]]:
    """Return all commands there are, as words."""

    def walk(command: object, words: list[str]) -> list[list[str]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return [words]
        return [found for name, child in inner.items() for found in walk(child, [*words, name])]

    return walk(typer.main.get_command(app), [])


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_and_json(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
    assert "\\b" not in result.output
    examples = result.output.partition("\n Example")[2]
    assert re.search(rf"\bmodpressure {' '.join(words)}(?![\w-])", examples), result.output


def test_all_commands_are_there() -> None:
    assert {" ".join(words) for words in commands()} >= {
        *("up", "load", "unload", "storm", "report", "stats", "duplicates", "events", "watch", "version"),
        *("modules list", "modules info", "modules deps", "modules fetch-debian"),
        *("systems create", "systems list", "systems show", "systems reset", "systems delete"),
    }


def test_version(run: Run) -> None:
    assert run("version") == (0, f"modpressure {__version__}\n", "")
    assert run("--version") == (0, f"modpressure {__version__}\n", "")
    assert json.loads(run("version", "--json")[1])["modpressure"] == __version__


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("storm", "modpressure storm: Missing option '--module' / '-m' (see modpressure storm --help)"),
        ("storm -m xfs --workers 0", "modpressure storm: Invalid value for '--workers' / '-w': 0 is not between 1 and"),
        ("storm -m xfs --workers 1000000000", ": 1000000000 is not between 1 and 100000"),
        ("storm -m xfs --workers 10^9", ": '10^9' is not a whole number"),
        ("storm -m xfs --workers 10001", "10001 workers are too many for 1 loaders: 10000 each, so at most 10000"),
        ("storm -m , --workers 1", "--module names no module"),
        ("storm -m xfs --ops 0", ": 0 is not of at least 1"),
        ("storm -m xfs --seconds 0", ": 0 is not a number of seconds between 0 and"),
        ("storm -m xfs --seconds inf", ": inf is not a number of seconds between 0 and"),
        ("storm -m xfs --seconds 5s", ": '5s' is not a number of seconds"),
        ("storm -m xfs --mode twice", "'twice' is not one of 'repeat', 'once'"),
        ("storm -m xfs --mode once --ops 3", "--ops 3 is for mode repeat"),
        ("storm -m xfs --mode once --keep-loaded", "--keep-loaded is for mode repeat"),
        ("storm -m xfs --keep-loaded", "--keep-loaded needs --seconds"),
        ("storm -m xfs --policy v7", "'v7' is not one of 'v6.3', 'v6.4', 'v6.5'"),
        ("storm -m xfs --kmod 31", "'31' is not one of '30', '34'"),
        ("storm -m xfs --loaders here", "modpressure: --loaders: 'here' is not HOST:PORT"),
        ("storm -m xfs --system A", "modpressure: --system: 'A' is no system id"),
        ("load", "Missing argument 'MODULE...'"),
        ("load a b --params x=1", "--params x=1 is for one module, but 2 are given"),
        ("load a --copy -1", ": -1 is not between 0 and 2147483647"),
        ("report --format html", "'html' is not one of 'rfc', 'rfc-as-posted', 'mainline'"),
        ("report --kernel-buffer", "--kernel-buffer is for --format mainline, not rfc"),
        ("events --outcome dead,live", "--outcome 'dead' is none of live, kread,"),
        ("events --limit x", "'x' is not a whole number"),
        ("stats --timeout-seconds 0", "--timeout-seconds: '0': input should be greater than 0"),
        ("stats --config missing.toml", "cannot read the settings file missing.toml: No such file or directory"),
        ("stats --fast", "No such option: --fast"),
        ("systems create", "Missing argument 'ID'"),
        ("up --loaders 0", ": 0 is not between 1 and 256"),
        ("up --port 65535", "--port 65535 leaves no ports for 1 loaders"),
        ("up --port 70000", ": 70000 is not between 0 and 65535"),
        ("frobnicate", "modpressure: No such command 'frobnicate'"),
        ("token new t.toml --name a --role load --days 0", "0 is not a number of days, more than 0 and at most 36500"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_2(line: str, sentence: str, run: Run) -> None:
    code, out, err = run(*line.split(" "))
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("modpressure")
    assert err.count("\n") == 1


def test_an_error_that_nobody_foresaw_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(flags: object, *_: object) -> None:
        raise ZeroDivisionError("something\nodd")

    monkeypatch.setattr("modpressure.cli.session.load_settings", broken)
    assert run("stats") == (
        1,
        "",
        "modpressure: unexpected ZeroDivisionError: something odd (MODPRESSURE_DEBUG=1 shows where)\n",
    )
    monkeypatch.setenv("MODPRESSURE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("stats")


def test_the_words_are_the_kernels_and_the_numbers_the_contracts() -> None:
    assert list(output.POLICIES) == list(KERNEL_POLICIES)
    assert list(output.POLICIES.values()) == [1, 2, 3]
    assert {word: int(number) for word, number in output.OUTCOMES.items()} == {o.word: int(o) for o in KernelOutcome}
    assert {word: int(number) for word, number in output.FORMATS.items()} == {
        f.word: int(f) for f in KernelReportFormat
    }


def test_json_has_all_fields_and_64_bit_numbers_as_numbers() -> None:
    event = Event(event_id=2**60, call=Call(module="xfs", peak_held_bytes=2**40, outcome=Outcome.OUTCOME_LIVE))
    event.commit_time.FromJsonString("2024-01-02T03:04:05.006Z")
    document = output.plain(event)
    assert document["event_id"] == 2**60
    assert document["commit_time"] == "2024-01-02T03:04:05.006Z"
    assert document["call"]["peak_held_bytes"] == 2**40
    assert document["call"]["outcome"] == "OUTCOME_LIVE"
    assert document["call"]["wait_ns"] == 0
    assert set(document["call"]) == {field.name for field in Call.DESCRIPTOR.fields} - {"start_time"}
    summary = StormSummary(outcomes=[{"count": 3}, {"count": 4}])
    assert [each["count"] for each in output.plain(summary)["outcomes"]] == [3, 4]
    assert output.plain(Module(layout=Layout(text_bytes=4096)))["layout"]["text_bytes"] == 4096


def test_errnos_have_words() -> None:
    assert output.errno_text("EEXIST") == "EEXIST: File exists"
    assert output.errno_text("ENOTSUPP") == "ENOTSUPP"  # the kernel's own, which libc does not know


def call(module: str, outcome: int, errno: str = "", **fields: object) -> Call:
    return Call(module=module, outcome=outcome, errno=errno, **fields)  # type: ignore[arg-type]


LIVE = call("xfs", Outcome.OUTCOME_LIVE)
EEXIST = call("xfs", Outcome.OUTCOME_BECOMING, "EEXIST", duplicate=True)
ENOEXEC = call("xfs", Outcome.OUTCOME_BECOMING, "ENOEXEC", check="elf: e_machine", value="183")


@pytest.mark.parametrize(
    ("response", "strict", "expected"),
    [
        (LoadModuleResponse(call=LIVE), True, (False, "")),
        (LoadModuleResponse(), False, (False, "xfs is already loaded or built in; no call was made")),
        (LoadModuleResponse(), True, (True, "xfs is already loaded or built in; no call was made")),
        (LoadModuleResponse(call=EEXIST), False, (False, "xfs is already loaded: EEXIST: File exists (becoming)")),
        (LoadModuleResponse(call=EEXIST), True, (True, "xfs is already loaded: EEXIST: File exists (becoming)")),
        (
            LoadModuleResponse(call=ENOEXEC),
            False,
            (True, "xfs: ENOEXEC: Exec format error (becoming, elf: e_machine '183')"),
        ),
        (LoadModuleResponse(call=LIVE, dependency_calls=[EEXIST]), True, (False, "")),
        (
            LoadModuleResponse(dependency_calls=[call("crc", Outcome.OUTCOME_KREAD, "EIO")]),
            False,
            (True, "xfs needs crc: EIO: Input/output error (kread)"),
        ),
    ],
)
def test_what_counts_as_a_failed_load(response: LoadModuleResponse, strict: bool, expected: tuple[bool, str]) -> None:
    assert load.judge("xfs", response, strict=strict) == expected


def test_an_event_in_one_line() -> None:
    event = Event(
        event_id=7,
        call=Call(
            loader="l1", worker="w", module="xfs", outcome=Outcome.OUTCOME_LOAD, errno="EEXIST", check="duplicate",
            peak_held_bytes=2048, duration_ns=1_500_000,
        ),
    )  # fmt: skip
    line = events.event_line(event)
    assert " ".join(line.split()) == "7 l1/w load xfs load EEXIST check duplicate held 2.0 KiB 1.5 ms"
    event = Event(event_id=8, unload=Unload(loader="l1", module="xfs", duration_ns=10))
    assert " ".join(events.event_line(event).split()) == "8 l1 unload xfs 0.0 ms"


def test_stats_in_one_line() -> None:
    line = events.stats_line(Stats(calls=5, modcount=2, duplicates=3, virtual_mem_wasted_bytes=4096, loaders=2))
    assert line == "nothing yet  5 calls, 2 loaded, 3 duplicates, 0 unloads, 4.0 KiB wasted, 0 B held, 2 loaders"


def test_a_module_shows_what_it_has() -> None:
    module = Module(name="xfs", file_bytes=100, image_bytes=2048, layout=Layout(text_bytes=4096), depends=["a", "b"])
    rows = modules.info_rows(module)
    assert ("name", "xfs") in rows
    assert ("file_bytes", "100") in rows
    assert ("image_bytes", "2048 (2.0 KiB)") in rows
    assert ("text_bytes", "4096 (4.0 KiB)") in rows
    assert [value for name, value in rows if name == "depends"] == ["a", "b"]
    assert "license" not in dict(rows)


def summary(loader: str, calls: int, seconds: float, **fields: object) -> StormSummary:
    made = StormSummary(loader=loader, calls=calls, workers=2, **fields)  # type: ignore[arg-type]
    made.elapsed.FromTimedelta(timedelta(seconds=seconds))
    return made


def test_the_total_of_a_storm(capsys: pytest.CaptureFixture[str]) -> None:
    live, load_ = Outcome.OUTCOME_LIVE, Outcome.OUTCOME_LOAD
    result = StormResult(
        summaries={
            "a:1": summary("one", 30, 2.0, duplicates=20, wasted_bytes=1000, peak_held_bytes=5, outcomes=[
                {"outcome": live, "count": 10}, {"outcome": load_, "errno": "EEXIST", "count": 20}]),
            "b:1": summary("two", 10, 4.0, duplicates=9, wasted_bytes=24, peak_held_bytes=6, errors=1,
                first_error="x", outcomes=[
                {"outcome": live, "count": 1}, {"outcome": load_, "errno": "EBUSY", "count": 9}]),
        }
    )  # fmt: skip
    total = storm_view.total_of(result)
    assert (total.calls, total.workers, total.duplicates, total.errors) == (40, 4, 29, 1)
    assert [(count.outcome, count.errno, count.count) for count in total.outcomes] == [
        (live, "", 11),
        (load_, "EBUSY", 9),
        (load_, "EEXIST", 20),
    ]
    document = storm_view.document(result)
    assert document["total"]["calls_per_second"] == 10
    assert document["total"]["wasted_bytes"] == 1024
    assert [loader["calls_per_second"] for loader in document["loaders"]] == [15, 2.5]
    storm_view.print_summary(result)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["load", "EEXIST", "20"] in rows
    assert ["one", "2", "30", "0", "20", "1000", "B", "5", "B", "2.00", "15"] in rows
    assert ["total", "4", "40", "0", "29", "1.0", "KiB", "11", "B", "4.00", "10"] in rows


def test_without_a_terminal_progress_is_a_line_a_second_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    view = storm_view.StormView(
        Storm(workers=2, modules=["xfs"], operations=5), to=output.console(stderr=True), clock=lambda: now
    )
    run = StormRun.__new__(StormRun)
    run.progress = {"a": StormProgress(calls=1, operations=1), "b": StormProgress(calls=2, active_workers=1)}
    with view:
        view.ready("a", StormReady(loader="one", dependency_calls=[LIVE]))
        for step in range(25):
            now = 100.0 + step / 10
            view.update(run)
    assert capsys.readouterr().err.splitlines() == [
        "storm: 2 workers, xfs",
        "one is ready; loaded before: xfs",
        "1 s: 1 operations, 3 calls, 0 duplicates, 1 workers at work, 0 B held",
        "2 s: 1 operations, 3 calls, 0 duplicates, 1 workers at work, 0 B held",
    ]


def test_what_up_says_can_be_pasted() -> None:
    running = up_view.Running("127.0.0.1:5", ["127.0.0.1:6", "127.0.0.1:7"], "/tmp/x", {})
    text = up_view.announcement(running)
    assert "export MODPRESSURE_CLIENT_STATS=127.0.0.1:5\n" in text
    assert "export MODPRESSURE_CLIENT_LOADERS=127.0.0.1:6,127.0.0.1:7\n" in text
    assert "grpcurl -plaintext 127.0.0.1:5 modpressure.v1.StatsService/GetReport | jq -r .text\n" in text
    plain = up_view.announcement(up_view.Running("127.0.0.1:50050", ["127.0.0.1:50051"], "/tmp/x", {}))
    assert "export" not in plain
    tls = ClientTls(Path("/c a.pem"), Path("/cert.pem"), Path("/key.pem"))
    encrypted = up_view.announcement(running, tls)
    assert "export MODPRESSURE_CLIENT_CA='/c a.pem'\n" in encrypted
    assert "grpcurl -cacert '/c a.pem' -cert /cert.pem -key /key.pem 127.0.0.1:5 " in encrypted


def test_a_childs_lines_are_shown_for_people() -> None:
    line = '{"event": "listening", "level": "info", "timestamp": "2024-01-02T03:04:05.1Z", "address": "a:1", "n": 2}'
    assert up_view.log_text(line) == "03:04:05 info    listening address=a:1 n=2"
    assert up_view.log_text("{not json") == "{not json"
    assert up_view.log_text("Warning: [/x]") == "Warning: [/x]"
    assert children.parse_line("[1]") == {}


def test_what_clients_chose_writes_no_line_and_no_escape_into_a_childs_log() -> None:
    event = {
        "event": "rpc failed",
        "level": "info",
        "timestamp": "2024-01-02T03:04:05.1Z",
        "id": "x\nstats",
        "s": "\x9b2J",
    }
    assert up_view.log_text(json.dumps(event)) == r"03:04:05 info    rpc failed id='x\nstats' s='\x9b2J'"
    event = {"event": "a\rb", "level": "error", "exception": "Traceback:\nError: x\nstats \x1b[2J"}
    assert up_view.log_text(json.dumps(event)).splitlines()[1:] == [
        "    Traceback:",
        "    Error: x",
        r"    stats \x1b[2J",
    ]
    assert up_view.log_text("Warning: \x1b]0;owned\x07") == r"Warning: \x1b]0;owned\x07"


def test_what_is_printed_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    name = "x\n\x1b]0;owned\x07\u202e\x9b\x7f"
    output.print_table(("Module",), [(name,)])
    output.print_line(events.event_line(Event(call=Call(module=name, loader=name))))
    output.print_text(f"Failed modules:\n\t{name}\n")
    output.say(name)
    main([name])
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), len(err.splitlines())) == (6, 2)
    assert not re.search(r"[^\n\t\u202e -~]", out + err)
    output.print_json({"module": name})
    assert json.loads(capsys.readouterr().out) == {"module": name}


def test_how_a_child_ended() -> None:
    assert children.exit_text(3) == "exit code 3"
    assert children.exit_text(-9) == "signal SIGKILL"
    assert re.fullmatch("exit code -?[0-9]+", children.exit_text(-200))


def test_completion_is_offered() -> None:
    # What --show-completion gives, without its look at which shell it was started from.
    source = {"_MODPRESSURE_COMPLETE": "source_bash"}
    result = CliRunner().invoke(app, [], prog_name="modpressure", env=source)
    assert result.exit_code == 0
    assert "_MODPRESSURE_COMPLETE=complete_bash" in result.stdout
    words = {"_MODPRESSURE_COMPLETE": "complete_bash", "COMP_WORDS": "modpressure re", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], prog_name="modpressure", env=words)
    assert "report" in result.stdout.split()
