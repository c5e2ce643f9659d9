"""Traces: what is read of each kind, what is refused, and what making the calls again comes to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from loader_svc.boot import BootCall, BootSpec, Machine, TreeSource, replay_trace
from loader_svc.boot.replay import Replay
from loader_svc.boot.trace import TraceCall, TraceError, parse_trace, read_trace
from loader_svc.virtual.conservation import imbalances
from loader_svc.virtual.costs import NO_COSTS
from modpressure.errors import BadRequest, NotFound
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import V6_4, V6_5
from tests.unit.boot_trees import SmallTree

MS = 1_000_000

MACHINE = Machine("replay", 4, 1 << 30)


def test_a_csv_under_other_names_and_our_own() -> None:
    mine = parse_trace("time_seconds,module,worker,syscall,flags\n5,a-b,w1,finit,2\n5.000000001,c,w2,init,\n")
    assert mine == (
        TraceCall(0, "w1", "a_b", "load", Syscall.FINIT_MODULE, 2),
        TraceCall(1, "w2", "c", "load", Syscall.INIT_MODULE, None),
    )
    other = parse_trace("start,end,pid,sys,mod,action\n5.0,6,1,,m,\n7.5,8,1,finit,m,unload\n")
    assert other == (
        TraceCall(0, "1", "m", "load"),
        TraceCall(2500 * MS, "1", "m", "unload", Syscall.FINIT_MODULE),
    )


def test_events_of_our_own_come_in_order_of_their_ends_and_are_made_in_order_of_their_begin() -> None:
    def call(start: str, module: str) -> str:
        made = {"loader": "l", "worker": "w", "module": module, "start_time": start, "syscall": "SYSCALL_INIT_MODULE"}
        return json.dumps({"event_id": 1, "call": made})

    unload = json.dumps({"unload": {"loader": "l", "worker": "v", "module": "a", "start_time": "2026-01-01T00:00:02Z"}})
    text = "\n".join([call("2026-01-01T00:00:01.000000005Z", "b"), call("2026-01-01T00:00:01Z", "a"), unload, ""])
    assert parse_trace(text) == (
        TraceCall(0, "l/w", "a", "load", Syscall.INIT_MODULE, 0),
        TraceCall(5, "l/w", "b", "load", Syscall.INIT_MODULE, 0),
        TraceCall(1000 * MS, "l/v", "a", "unload"),
    )


def test_of_ftrace_loads_and_unloads_count() -> None:
    text = """\
# tracer: nop
cpus=2
   (udev-worker)-123   [001] d..1.    12.345678: module_load: xfs OE
    kworker/u8:1-32    [000] .....    12.445678: module_request: ledtrig:mmc0 wait=0 call_site=led
  some task-a-7 (   7) [001]    12.500000: module_get: xfs call_site=x refcnt=2
           rmmod-223   [001] .....    13.345678: module_free: xfs
"""
    assert parse_trace(text) == (
        TraceCall(0, "123", "xfs", "load"),
        TraceCall(1000 * MS, "223", "xfs", "unload"),
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there is no load in the trace"),
        ("time,module\n", "there is no load in the trace"),
        ("time,module\n2,a\n1,b\n", "line 3 is out of order: its time 1.000000 s is before"),
        ("time,module,worker\n1,a,w\n2,b\n", "line 3 is cut short or too long: it has 2 fields of 3"),
        ("time,module,worker\n1,a,w\n2,b,worker-1", "line 3 is cut short: it does not end with a newline"),
        ("time,module", "line 1 is cut short: it does not end with a newline"),
        ('time,module,parameters\n1,a,"x=1', "line 2 is cut short: it does not end with a newline"),
        ('time,module,parameters\n1,a,"x=1\n', "line 2 is cut short or no CSV: unexpected end of data"),
        ("  kmod-1 [000] ..... 1.5: module_load: nvm", "line 1 is cut short: it does not end with a newline"),
        ("time,module\nsoon,a\n", "line 2: the time 'soon' is not a number"),
        ("time,module\nnan,a\n", "line 2: the time 'nan' is not between"),
        ("time,module\n-1,a\n", "line 2: the time '-1' is not between"),
        ("time,module\n1e30,a\n", "line 2: the time '1e30' is not between"),
        ("time,module\n1,\n", "line 2: '' is no name of a module"),
        ("time,module\n1,../x\n", "line 2: '../x' is no name of a module"),
        ("time,module,sys\n1,a,open\n", "there is no system call 'open'"),
        ("time,module,action\n1,a,eat\n", "there is no action 'eat'"),
        ("time,module,flags\n1,a,9\n", "flags '9' are not a number from 0 to 7"),
        ('{"call": {"module": "a", "start_time"', "line 1 is cut short, or no event"),
        ('{"call": {"module": "a", "start_time": "noon"}}', "line 1 is cut short, or no event"),
        ("{}", "line 1 is cut short, or no event"),
        ("hello\n", "line 1 is neither a CSV's heading nor an event: 'hello'"),
        ("x-1 [0] 2.0: module_load: a\nx-1 [0] 1.0: module_load: b\n", "line 2 is out of order"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_line(text: str, sentence: str) -> None:
    with pytest.raises(TraceError) as error:
        parse_trace(text)
    assert sentence in error.value.sentence
    assert "\n" not in error.value.sentence


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="can't be read: No such file"):
        read_trace(tmp_path / "none.csv")


@pytest.fixture
def small(tmp_path: Path, make_module: Callable[..., Any]) -> SmallTree:
    def with_exit(name: str) -> Any:
        builder = make_module(name)
        builder.symbols.append(("cleanup_module", 1, 1))
        return builder

    tree = SmallTree(tmp_path / "6.1-test", with_exit)
    for name in ("a", "b", "packed"):
        tree.add(name)
    tree.write({"packed": (".zst", zstandard.compress)})
    return tree


def test_calls_are_made_at_their_times_one_at_a_time_by_each_worker(small: SmallTree) -> None:
    calls: list[BootCall] = []
    spec = BootSpec(MACHINE, TreeSource(small.root), V6_4, costs=replace(NO_COSTS, init={"a": 100 * MS}))
    trace = parse_trace("time,module,worker\n1,a,x\n1.02,b,x\n1.03,a,y\n2,packed,y\n")
    replaying = Replay(spec, trace, 1, lambda call: calls.append(BootCall.of(call)))
    result = replaying.run()
    assert imbalances(replaying.kernel) == []
    begun = {(call.module, call.worker): call.begun_ns for call in calls}
    assert begun == {("a", "x"): 0, ("b", "x"): 100 * MS, ("a", "y"): 30 * MS, ("packed", "y"): 1000 * MS}
    assert result.duplicates == 1
    assert [call.errno for call in calls if call.is_duplicate] == ["EEXIST"]
    assert result.init_calls == 1
    assert result.duration_ns == 1000 * MS


def test_an_unload_makes_room_for_another_load(small: SmallTree) -> None:
    trace = parse_trace("time,module,action\n1,a,load\n2,a,unload\n3,a,load\n4,b,unload\n")
    result = replay_trace(BootSpec(MACHINE, TreeSource(small.root)), trace, 1)
    assert (result.counters.modcount, result.counters.unloads) == (2, 1)


def test_how_a_recorded_call_was_made_counts(small: SmallTree) -> None:
    calls: list[BootCall] = []
    trace = parse_trace("time,module,sys,flags\n1,a,init,\n2,b,finit,1\n3,packed,finit,4\n")
    replay_trace(BootSpec(MACHINE, TreeSource(small.root)), trace, 1, record=calls.append)
    assert [(call.syscall, call.flags) for call in calls] == [
        (Syscall.INIT_MODULE, 0),
        (Syscall.FINIT_MODULE, 1),
        (Syscall.FINIT_MODULE, 4),
    ]
    assert {call.outcome for call in calls} == {Outcome.LIVE}


def test_modules_that_the_tree_lacks_are_named(small: SmallTree) -> None:
    trace = parse_trace("time,module\n1,a\n" + "".join(f"2,x{number}\n" for number in range(7)))
    with pytest.raises(BadRequest, match="lacks modules of the trace: x0, x1, x2, x3, x4 and 2 more"):
        replay_trace(BootSpec(MACHINE, TreeSource(small.root)), trace, 1)


def test_a_recorded_boot_can_be_replayed_under_another_policy(shared_dir: Path, boot_tree: Path) -> None:
    path = shared_dir / "data/golden/boots/calls/calls-B-N8-r1.csv.gz"
    if not path.is_file():
        pytest.skip(f"no recorded calls at {path}")
    trace = parse_trace(gzip.decompress(path.read_bytes()).decode())
    before = replay_trace(BootSpec(MACHINE, TreeSource(boot_tree), V6_4), trace, 1)
    after = replay_trace(BootSpec(MACHINE, TreeSource(boot_tree), V6_5), trace, 1)
    assert before.counters.calls == after.counters.calls == len(trace)
    assert before.duplicates > 100
    assert after.gate_joins > 0
    assert set(before.loaded) == set(after.loaded)
