"""One system as one file: how it is written, and how it is read with care.

The file is compressed with zstd. In it are lines of JSON: a header, a line for each row of each table, tables in an
order in which none mentions a later one, and an end that counts the rows. Bytes are in base64. The columns are those of
the version of the tables that the header names; a later program adds what came since, an earlier one refuses the file.

What calls in flight hold is left out: those calls are another machine's. So are the loader processes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeAlias

import sqlalchemy as sa
import zstandard
from google.protobuf.message import DecodeError
from sqlalchemy.engine import Connection

from modpressure.errors import BadRequest, OverLimit, shown
from modpressure.kernel.modules_list import State
from modpressure.v1 import call_pb2, ledger_service_pb2, stats_service_pb2
from stats_svc import schema
from stats_svc.names import MAX_EVENT_BYTES, MAX_TOLD_RECORD_BYTES, check_system_id
from stats_svc.rows import SegmentKind

FORMAT: Final = "modpressure system"
FORMAT_VERSION: Final = 1

MAX_LINE_BYTES: Final = 64 << 20
_LONG_BYTES: Final = 1 << 16
"""A line that is longer holds bytes in base64, and no text that would have to be escaped."""

_MAX_PARTS: Final = 10_000
"""Commas and brackets of a line. Ours have some dozens; of millions JSON would make a hundred times as many bytes."""

MAX_SEGMENT_EVENTS: Final = 100_000
"""Events of a segment: ours have some thousands, and whoever reads one of them reads all."""

_CHUNK_BYTES: Final = 1 << 18
_BATCH_ROWS: Final = 200
_BATCH_SEGMENTS: Final = 16
_BATCH_BYTES: Final = 1 << 20
"""What is stored in one transaction, which others wait for."""

_SLICE_BYTES: Final = 512
"""What is unpacked in one go: at most 16 MiB come of it, as no block of zstd has more than 128 KiB, or takes less than
four bytes (RFC 8878, 3.1.1.2)."""

_LENGTH_DELIMITED: Final = 2
_MAX_SHIFT: Final = 28

_MAX_NUMBER: Final = (1 << 63) - 1
_MAX_COUNT: Final = 1 << 62
"""Highest counter, id or position: what is added to it later must not be too much for its column."""

_MAX_TEXT_BYTES: Final = 128
"""Longest text in a column: none of ours is longer, and one of some KiB does not fit into PostgreSQL's indexes."""

_NOT_IN_FILES: Final = schema.systems.c.name
"""What a system is called: that is for whoever imports it to say."""

FileRows: TypeAlias = tuple[sa.Table, list[dict[str, Any]]]
"""Rows of a table, whose systems are those of the file."""

TABLES: Final = [table for table in schema.metadata.sorted_tables if table is schema.systems or "system" in table.c]
_BY_NAME: Final = {table.name: table for table in TABLES}


# --- writing ---


def write(connection: Connection, system: str, now_ns: int) -> Iterator[bytes]:
    """Yield the file of a system, which is there, as one transaction sees it."""
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    for line in _lines(connection, system, now_ns):
        if chunk := compressor.compress(json.dumps(line, separators=(",", ":")).encode() + b"\n"):
            yield chunk
    yield compressor.flush()


def _lines(connection: Connection, system: str, now_ns: int) -> Iterator[dict[str, Any]]:
    yield {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "schema_version": schema.SCHEMA_VERSION,
        "system": system,
        "export_time_ns": now_ns,
    }
    count = 0
    key = connection.scalar(sa.select(schema.key_of(system)))
    for table in TABLES:
        own = "id" if table is schema.systems else "system"
        for row in _rows(connection, table, key):
            count += 1
            values = {name: _plain(value) for name, value in row._mapping.items()}
            values[own] = system
            yield {"table": table.name, "row": values}
    yield {"rows": count}


def _rows(connection: Connection, table: sa.Table, system: str | None) -> Iterator[sa.Row[Any]]:
    key = table.c.id if table is schema.systems else table.c.system
    columns = [column for column in table.columns if column is not _NOT_IN_FILES]
    query = sa.select(*columns).where(key == system).order_by(*table.primary_key.columns)
    modules = schema.modules.c
    live = sa.select(modules.name).where(modules.system == system, modules.state == int(State.LIVE))
    if table is schema.modules:
        query = query.where(table.c.state == int(State.LIVE))
    elif table is schema.module_uses:
        query = query.where(table.c.name.in_(live))
    elif table is schema.held_memory:
        owners = sa.select(modules.instance_id, modules.call_id).where(
            modules.system == system, modules.state == int(State.LIVE)
        )
        query = query.where(sa.tuple_(table.c.instance_id, table.c.call_id).in_(owners))
    elif table is schema.claims:
        query = query.where(table.c.settled == 1)
    # Some at a time: all of them need not fit into memory. PostgreSQL would send a whole table otherwise.
    most = _BATCH_SEGMENTS if table is schema.event_segments else _BATCH_ROWS
    with connection.execute(query.execution_options(yield_per=most)) as rows:
        yield from rows


def _plain(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes | memoryview) else value


# --- reading ---


class Reader:
    """Takes a file piece by piece, and gives what it holds, each row checked by itself.

    BadRequest, with what is wrong where, if it is not such a file or holds what makes no sense; OverLimit if it is
    longer than it may be.
    """

    def __init__(self, limit_bytes: int) -> None:
        """Take a file that has at most ``limit_bytes``, packed and unpacked."""
        self._limit_bytes = limit_bytes
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        self._packed_bytes = self._unpacked_bytes = 0
        self._begun: list[bytes] = []
        """Of a line that has not ended yet, what has come."""

        self._begun_bytes = 0
        self._lines = self._rows = 0
        self._header: dict[str, Any] | None = None
        self._table: sa.Table | None = None
        self._seen: list[sa.Table] = []
        self._batch: list[dict[str, Any]] = []
        self._batch_bytes = 0
        self._full: list[FileRows] = []
        self._last_event_id = self._next_event_id = 0
        self._ended = False

    def feed(self, chunk: bytes) -> list[FileRows]:
        """Take the next piece; return rows that may be stored by now, each list of them in one go."""
        self._packed_bytes += len(chunk)
        self._check_length(self._packed_bytes, "")
        for start in range(0, len(chunk), _SLICE_BYTES):
            if self._decompressor.eof:
                raise _bad("something follows its end")
            try:
                unpacked = self._decompressor.decompress(chunk[start : start + _SLICE_BYTES])
            except zstandard.ZstdError:
                raise _bad("it is not compressed with zstd, or damaged") from None
            self._unpacked_bytes += len(unpacked)
            self._check_length(self._unpacked_bytes, " unpacked")
            self._take(unpacked)
        full, self._full = self._full, []
        return full

    def end(self) -> list[FileRows]:
        """Take the end of the file; return the rows that are left."""
        if not self._packed_bytes:
            raise _bad("it does not begin as an exported system does")
        if self._begun_bytes or not self._ended or not self._decompressor.eof or schema.systems not in self._seen:
            raise _bad("it is cut short")
        self._close_batch()
        return self._full

    def _check_length(self, size_bytes: int, how: str) -> None:
        if size_bytes > self._limit_bytes:
            raise OverLimit(
                f"the file can't be imported: it has more than {self._limit_bytes} bytes{how}, which is stats_svc's"
                " import_limit",
                field="chunk",
            )

    def _take(self, unpacked: bytes) -> None:
        *ends, rest = unpacked.split(b"\n")
        for end in ends:
            self._begun.append(end)
            text = b"".join(self._begun)
            self._begun.clear()
            self._begun_bytes = 0
            self._take_text(text)
        if rest:
            self._begun.append(rest)
            self._begun_bytes += len(rest)
            if self._begun_bytes > MAX_LINE_BYTES:
                raise _bad(f"it has a line of more than {MAX_LINE_BYTES} bytes")

    def _take_text(self, text: bytes) -> None:
        self._lines += 1
        try:
            line = json.loads(text) if _is_like_ours(text) else None
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise _bad(f"line {self._lines} is not JSON of an object")
        if self._header is None:
            self._header = _header(line)
        elif self._ended:
            raise _bad("something follows its end")
        elif "rows" not in line:
            self._take_row(line, str(self._header["system"]))
        elif line["rows"] != self._rows:
            raise _bad(f"it says that it has {line['rows']} rows, and has {self._rows}")
        else:
            self._ended = True

    def _take_row(self, line: dict[str, Any], system: str) -> None:
        self._rows += 1
        count = self._rows
        of = _BY_NAME.get(str(line.get("table")))
        if of is None:
            raise _bad(f"row {count} is of no table that is known: {shown(str(line.get('table')))}")
        if of is not self._table:
            if of in self._seen:
                raise _bad(f"row {count} of {of.name} comes after those of another table")
            self._close_batch()
            self._table = of
            self._seen.append(of)
        values = _values(of, line.get("row"), count)
        if of is schema.systems:
            if values["id"] != system or count != 1:
                raise _bad(f"row {count} is of another system: {shown(str(values['id']))}")
            _check_policy(values["policy"])
            self._next_event_id = values["next_event_id"]
        elif values["system"] != system:
            raise _bad(f"row {count} is of another system: {shown(str(values['system']))}")
        if of is schema.event_segments:
            _check_segment(values, count)
            if not self._last_event_id < values["first_event_id"] <= values["last_event_id"] < self._next_event_id:
                raise _bad(f"the events of row {count} have ids that others have, or will have")
            self._last_event_id = values["last_event_id"]
        elif of is schema.modules and values["state"] != State.LIVE:
            raise _bad(f"row {count} is a module that is not live")
        elif of is schema.claims:
            if values["settled"] != 1 or values["instance_id"]:
                raise _bad(f"row {count} is a claim that is not settled")
            _check_record(values["record"], count)
        # Rows may lack what came later; all of one file lack the same.
        if self._batch and self._batch[0].keys() != values.keys():
            raise _bad(f"rows of {of.name} have different columns")
        self._batch.append(values)
        self._batch_bytes += sum(len(value) for value in values.values() if isinstance(value, bytes | str))
        if len(self._batch) >= _BATCH_ROWS or self._batch_bytes >= _BATCH_BYTES:
            self._close_batch()

    def _close_batch(self) -> None:
        if self._table is not None and self._batch:
            self._full.append((self._table, self._batch))
        self._batch, self._batch_bytes = [], 0


def insert(connection: Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """Store rows of a file. BadRequest if they can't be together."""
    try:
        connection.execute(sa.insert(table), rows)
    except sa.exc.IntegrityError:
        raise _bad(f"rows of {table.name} contradict each other") from None


def _is_like_ours(text: bytes) -> bool:
    """Return whether what JSON makes of a line takes no more memory than a row may, by what it looks like."""
    if not text.isascii() or (len(text) > _LONG_BYTES and b"\\" in text):
        return False
    return text.count(b",") + text.count(b"[") + text.count(b"{") <= _MAX_PARTS


def _header(line: dict[str, Any]) -> dict[str, Any]:
    if line.get("format") != FORMAT:
        raise _bad("it does not begin as an exported system does")
    for name, newest in (("version", FORMAT_VERSION), ("schema_version", schema.SCHEMA_VERSION)):
        value = line.get(name)
        if type(value) is not int or value < 1:
            raise _bad(f"its {name} is {shown(repr(value))}")
        if value > newest:
            raise _bad(f"its {name} is {value}; this program knows up to {newest}")
    check_system_id(str(line.get("system")))
    return line


def _values(table: sa.Table, row: Any, count: int) -> dict[str, Any]:
    """Return a row's values as its columns take them."""
    if not isinstance(row, dict):
        raise _bad(f"row {count} has no columns")
    values: dict[str, Any] = {}
    for name, value in row.items():
        column = table.columns.get(name)
        if column is None or column is _NOT_IN_FILES:
            raise _bad(f"row {count} of {table.name} has a column {shown(str(name))} that is not known")
        values[name] = _value(column, value, count)
    for column in table.columns:
        if column.name not in values and not column.nullable and column.server_default is None:
            raise _bad(f"row {count} of {table.name} lacks {column.name}")
    return values


def _value(column: sa.Column[Any], value: Any, count: int) -> Any:
    if value is None and column.nullable:
        return None
    if isinstance(column.type, sa.BigInteger):
        # What a loader or an administrator has named is only kept.
        is_kept = column.table is schema.memory_limits or column.name == "call_id"
        if type(value) is int and 0 <= value <= (_MAX_NUMBER if is_kept else _MAX_COUNT):
            return value
    elif isinstance(value, str):
        if not isinstance(column.type, sa.LargeBinary):
            # PostgreSQL stores no NUL, and nothing of ours has one.
            if value.isprintable() and len(value.encode()) <= _MAX_TEXT_BYTES:
                return value
        else:
            try:
                return base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                pass
    raise _bad(f"{column.name} of row {count} of {column.table.name} can't be {shown(repr(value))}")


def _check_policy(policy: int) -> None:
    if policy not in call_pb2.Policy.values() or policy == call_pb2.POLICY_UNSPECIFIED:
        raise _bad(f"its policy is {policy}, which is not known")


def _check_segment(values: dict[str, Any], count: int) -> None:
    """Return if the events of a segment can be read back."""
    size = values["last_event_id"] - values["first_event_id"] + 1
    try:
        kind = SegmentKind(values["kind"])
        # It says how long it is, and how many events it has, before anything is made of it.
        if size > MAX_SEGMENT_EVENTS or not 0 <= zstandard.frame_content_size(values["events"]) <= MAX_LINE_BYTES:
            raise ValueError
        encoded = zstandard.decompress(values["events"])
        if not _has_parts(encoded, size):
            raise ValueError
        events: Iterable[Any]
        if kind is SegmentKind.EVENTS:
            events = stats_service_pb2.ListEventsResponse.FromString(encoded).events
        else:
            events = ledger_service_pb2.RecordCalls.FromString(encoded).calls
        found = sum(1 for _ in events)
    except (ValueError, DecodeError, zstandard.ZstdError):
        found = 0
    if not found or found != size:
        raise _bad(f"the events of row {count} can't be read")


def _has_parts(encoded: bytes, number: int) -> bool:
    """Return whether a message has so many events, none of them too long, and nothing else, without parsing these.

    A part takes two bytes of a message, and a hundred when it is parsed.
    """
    at = found = 0
    while at < len(encoded) and found < number:
        # Ours have numbers below 16, which take one byte; 2 is the wire type of what tells its length.
        if encoded[at] & 0x87 != _LENGTH_DELIMITED:
            return False
        length = shift = 0
        while True:
            at += 1
            if at >= len(encoded) or shift > _MAX_SHIFT:
                return False
            length |= (encoded[at] & 0x7F) << shift
            shift += 7
            if encoded[at] < 0x80:
                break
        if length > MAX_EVENT_BYTES:
            return False
        at += 1 + length
        found += 1
    return (at, found) == (len(encoded), number)


def _check_record(record: bytes, count: int) -> None:
    """Return if what was done for a client's request can be read back, and told in one answer."""
    try:
        if len(record) > MAX_TOLD_RECORD_BYTES:
            raise DecodeError
        ledger_service_pb2.ClaimRecord.FromString(record)
    except DecodeError:
        raise _bad(f"record of row {count} of claims can't be read") from None


def _bad(what: str) -> BadRequest:
    return BadRequest(f"the file can't be imported: {what}", field="chunk")
