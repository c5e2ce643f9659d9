"""Recorded calls with their times, to be made again: CSV, this program's own events, or the text of ftrace.

- CSV with a heading: a time in seconds (``time_seconds``, ``start`` or ``time``) and ``module`` (or ``mod``); and, if
  they are there, ``worker`` (or ``pid``), ``syscall`` (or ``sys``: finit, init), ``flags``, ``parameters``, and
  ``action`` (load, unload).
- what ``modpressure events --json`` prints, a document on each line.
- what trace-cmd report or /sys/kernel/tracing/trace print: the events module_load and module_free; others are passed
  over. module_load comes when a module is laid out and linked, so the calls of a replay begin that much late, and
  duplicates, which the kernel has no event for, are not in it.

A last line without its end may have been cut anywhere, so it is refused, but for an event that is whole.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final, Literal

from modpressure.errors import BadRequest, NotFound, OverLimit
from modpressure.kernel.outcome import Syscall

MAX_TRACE_BYTES: Final = 1 << 30
MAX_TIME_SECONDS: Final = 10**10
"""Latest time that is taken on: some three hundred years."""

_TIMES: Final = ("time_seconds", "start", "time")
_MODULES: Final = ("module", "mod")
_WORKERS: Final = ("worker", "pid")
_SYSCALLS: Final = ("syscall", "sys")
_SYSCALL_WORDS: Final = {
    "": None,
    "finit": Syscall.FINIT_MODULE,
    "finit_module": Syscall.FINIT_MODULE,
    "SYSCALL_FINIT_MODULE": Syscall.FINIT_MODULE,
    "init": Syscall.INIT_MODULE,
    "init_module": Syscall.INIT_MODULE,
    "SYSCALL_INIT_MODULE": Syscall.INIT_MODULE,
}
_ACTIONS: Final = ("load", "unload")
_FTRACE: Final = re.compile(
    r"\s*(?P<comm>.+)-(?P<pid>\d+)\s+(?:\([ \d-]+\)\s+)?\[\d+\]\s+(?:\S{4,6}\s+)?(?P<time>\d+\.\d+): (?P<event>\w+):"
    r"\s*(?P<rest>.*)"
)
_FTRACE_HEADINGS: Final = ("#", "cpus=", "version =", "CPU ")
_INSTANT: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z")


class TraceError(BadRequest):
    """A trace that can't be understood; one sentence that names the line."""


@dataclass(frozen=True, slots=True)
class TraceCall:
    """One recorded call."""

    at_ns: int
    """When it began, since the first one."""

    worker: str
    module: str
    action: Literal["load", "unload"] = "load"
    syscall: Syscall | None = None
    """None as libkmod would hand the file over."""

    flags: int | None = None
    parameters: str = ""


def read_trace(path: Path) -> tuple[TraceCall, ...]:
    """Read a trace from a file. NotFound, OverLimit, TraceError."""
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise OverLimit(f"{path} has {path.stat().st_size} bytes, a trace has {MAX_TRACE_BYTES} at most")
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise NotFound(f"{path} can't be read: {error.strerror}", field="trace") from None
    try:
        return parse_trace(text)
    except TraceError as error:
        raise TraceError(f"{path}: {error.sentence}", field="trace") from None


def parse_trace(text: str) -> tuple[TraceCall, ...]:
    """Return the calls of a trace in their order, times counted from the first one. TraceError names the line."""
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        calls = sorted(_events(lines), key=lambda call: call.at_ns)
    elif _is_heading(first):
        _check_end(text, lines)
        calls = _in_order(_rows(lines))
    else:
        _check_end(text, lines)
        calls = _in_order(_ftrace(lines))
    if not calls:
        raise TraceError("there is no load in the trace")
    began_ns = calls[0].at_ns
    return tuple(replace(call, at_ns=call.at_ns - began_ns) for call in calls)


def _check_end(text: str, lines: list[str]) -> None:
    if lines and not text.endswith(("\n", "\r")):
        raise TraceError(f"line {len(lines)} is cut short: it does not end with a newline")


def _in_order(numbered: Iterable[tuple[int, TraceCall]]) -> list[TraceCall]:
    calls: list[TraceCall] = []
    for number, call in numbered:
        if calls and call.at_ns < calls[-1].at_ns:
            raise TraceError(
                f"line {number} is out of order: its time {_seconds(call.at_ns)} s is before that of the line above,"
                f" {_seconds(calls[-1].at_ns)} s"
            )
        calls.append(call)
    return calls


def _is_heading(line: str) -> bool:
    names = [name.strip() for name in line.split(",")]
    return any(name in names for name in _TIMES) and any(name in names for name in _MODULES)


def _rows(lines: list[str]) -> Iterator[tuple[int, TraceCall]]:
    reader = csv.reader(lines, strict=True)
    heading: list[str] = []
    while True:
        begun = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise TraceError(f"line {begun} is cut short or no CSV: {error}") from None
        number = reader.line_num
        if not row:
            continue
        if not heading:
            heading = [name.strip() for name in row]
            continue
        if len(row) != len(heading):
            raise TraceError(f"line {number} is cut short or too long: it has {len(row)} fields of {len(heading)}")
        values = dict(zip(heading, row, strict=True))
        syscall = _of(values, _SYSCALLS)
        if syscall not in _SYSCALL_WORDS:
            raise TraceError(f"line {number}: there is no system call {syscall!r}; there are finit and init")
        action = values.get("action") or "load"
        if action not in _ACTIONS:
            raise TraceError(f"line {number}: there is no action {action!r}; there are load and unload")
        flags = values.get("flags", "")
        if flags and not (flags.isdecimal() and int(flags) < 8):
            raise TraceError(f"line {number}: flags {flags!r} are not a number from 0 to 7")
        yield (
            number,
            TraceCall(
                _time_ns(number, _of(values, _TIMES)),
                _of(values, _WORKERS) or "1",
                _module(number, _of(values, _MODULES)),
                "unload" if action == "unload" else "load",
                _SYSCALL_WORDS[syscall],
                int(flags) if flags else None,
                values.get("parameters", ""),
            ),
        )


def _of(values: dict[str, str], names: Iterable[str]) -> str:
    return next((values[name].strip() for name in names if name in values), "")


def _time_ns(number: int, text: str) -> int:
    try:
        seconds = Decimal(text)
    except InvalidOperation:
        raise TraceError(f"line {number}: the time {text!r} is not a number of seconds") from None
    if not seconds.is_finite() or not 0 <= seconds <= MAX_TIME_SECONDS:
        raise TraceError(f"line {number}: the time {text!r} is not between 0 and {MAX_TIME_SECONDS} seconds")
    return int(seconds * 10**9)


def _module(number: int, text: str) -> str:
    if not text or "/" in text or not text.isprintable():
        raise TraceError(f"line {number}: {text!r} is no name of a module")
    return text.replace("-", "_")


def _events(lines: list[str]) -> Iterator[TraceCall]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            call, unload = event.get("call"), event.get("unload")
            made = call if call is not None else unload
            worker = f"{made.get('loader', '')}/{made.get('worker', '')}"
            at_ns = _instant_ns(made["start_time"])
            module = _module(number, made["module"])
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"line {number} is cut short, or no event of `modpressure events --json`") from None
        if call is None:
            yield TraceCall(at_ns, worker, module, "unload")
        else:
            yield TraceCall(at_ns, worker, module, "load", *_how(call))


def _how(call: dict[str, Any]) -> tuple[Syscall | None, int | None]:
    """Return how an event says that a file was handed over."""
    return _SYSCALL_WORDS.get(str(call.get("syscall", ""))), int(call.get("flags") or 0)


def _instant_ns(text: str) -> int:
    match = _INSTANT.fullmatch(text)
    if match is None:
        raise ValueError(text)
    seconds = int(datetime.fromisoformat(match[1]).replace(tzinfo=UTC).timestamp())
    return seconds * 10**9 + int((match[2] or "0").ljust(9, "0"))


def _ftrace(lines: list[str]) -> Iterator[tuple[int, TraceCall]]:
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(_FTRACE_HEADINGS):
            continue
        match = _FTRACE.fullmatch(line)
        if match is None:
            raise TraceError(f"line {number} is neither a CSV's heading nor an event: {line.strip()[:60]!r}")
        event = match["event"]
        if event not in ("module_load", "module_free"):
            continue
        # Behind the name there may be the letters of a taint.
        words = match["rest"].split()
        module = _module(number, words[0] if words else "")
        action: Literal["load", "unload"] = "load" if event == "module_load" else "unload"
        yield number, TraceCall(_time_ns(number, match["time"]), match["pid"], module, action)


def _seconds(time_ns: int) -> str:
    return f"{time_ns / 10**9:.6f}"
