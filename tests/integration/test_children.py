"""Child processes of ``modpressure up``: real ones, which behave as badly as processes can."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from modpressure.cli.children import Child, ChildDied, Children

GOOD = """
import json, signal, sys, time
print("warming up")
print(json.dumps({"event": "it is listening", "address": sys.argv[1]}), flush=True)
signal.pause()
"""

STUBBORN = """
import json, signal, sys
signal.signal(signal.SIGTERM, lambda *_: print(json.dumps({"event": "no"}), flush=True))
print(json.dumps({"event": "listening", "address": "x"}), flush=True)
while True:
    signal.pause()
"""

CHATTY = """
import json, sys
print("x" * (3 << 20))
print(json.dumps({"event": "listening", "address": "x"}), flush=True)
sys.exit(3)
"""

PARENT = """
import asyncio, os, signal
from modpressure.cli.children import Children

async def main():
    children = Children(lambda child, line: None)
    child = await children.start("good", ["good", "x"])
    await child.address
    print(child.process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""

Lines = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("good", GOOD), ("stubborn", STUBBORN), ("chatty", CHATTY), ("parent", PARENT)):
        (tmp_path / f"{name}.py").write_text(text)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture
def lines() -> Lines:
    return []


@pytest_asyncio.fixture
async def children(lines: Lines) -> AsyncIterator[Children]:
    made = Children(lambda child, line: lines.append((child.name, line)))
    yield made
    made.hurry()
    await made.stop()


def is_gone(child: Child) -> bool:
    return child.process.returncode is not None and not Path(f"/proc/{child.process.pid}").exists()


async def test_children_tell_their_addresses_and_their_lines_and_are_stopped(children: Children, lines: Lines) -> None:
    first = await children.start("first", ["good", "a:1"])
    second = await children.start("second", ["good", "b:2"])
    assert [await first.address, await second.address] == ["a:1", "b:2"]
    assert ("first", "warming up") in lines

    await children.stop()

    assert is_gone(first)
    assert is_gone(second)
    assert not children.died.done()


async def test_the_first_child_outlives_the_others(children: Children) -> None:
    """The others need it to end well: stats_svc commits what the loaders still have in flight."""
    ended: list[str] = []
    for name in ("stats", "loader-1", "loader-2"):
        child = await children.start(name, ["good", name])
        await child.address
        asyncio.ensure_future(child.process.wait()).add_done_callback(lambda _, name=name: ended.append(name))

    await children.stop()
    await asyncio.sleep(0)

    assert ended[-1] == "stats"
    assert sorted(ended) == ["loader-1", "loader-2", "stats"]


async def test_a_child_that_ends_by_itself_is_named(children: Children) -> None:
    good = await children.start("good", ["good", "a:1"])
    await good.address
    good.process.send_signal(signal.SIGKILL)

    died = await children.died

    assert isinstance(died, ChildDied)
    assert died.sentence == "good ended with signal SIGKILL; its last words: it is listening"


async def test_a_line_beyond_all_measure_does_not_hide_what_follows(children: Children) -> None:
    child = await children.start("chatty", ["chatty"])
    assert await child.address == "x"
    assert (await children.died).sentence == "chatty ended with exit code 3; its last words: listening"


async def test_a_child_that_does_not_want_to_end_is_killed(children: Children, lines: Lines) -> None:
    child = await children.start("stubborn", ["stubborn"])
    await child.address
    refused = asyncio.Event()
    record: Callable[[Child, str], None] = child.on_line

    def watch(child: Child, line: str) -> None:
        record(child, line)
        if '"no"' in line:
            refused.set()

    child.on_line = watch
    stopping = asyncio.ensure_future(children.stop())
    async with asyncio.timeout(30):
        await refused.wait()
        children.hurry()  # the second Ctrl-C
        await stopping
    assert is_gone(child)
    assert child.process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl(2)")
async def test_children_end_when_their_parent_is_killed() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "parent", stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == -signal.SIGKILL
    pid = int(out)
    async with asyncio.timeout(30):
        while state_of(pid) not in ("gone", "Z"):
            await asyncio.sleep(0.01)  # it is no child of ours: there is nothing to wait on


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


async def test_a_child_has_the_time_that_it_is_given(lines: Lines) -> None:
    """As long as the services' own grace, whatever that is set to."""
    children = Children(lambda child, line: lines.append((child.name, line)), stop_seconds=0.1)
    child = await children.start("stubborn", ["stubborn"])
    await child.address
    async with asyncio.timeout(10):  # less than what is usual
        await children.stop()
    assert child.process.returncode == -signal.SIGKILL
