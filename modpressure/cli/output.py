"""What commands print: JSON for programs, tables and sentences for people."""

from __future__ import annotations

import errno as errnos
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from modpressure.v1.call_pb2 import Origin, Outcome, Policy
from modpressure.v1.loader_service_pb2 import Kmod, Storm
from modpressure.v1.stats_service_pb2 import ReportFormat

PolicyWord = Literal["v6.3", "v6.4", "v6.5"]
KmodWord = Literal["30", "34"]

DEFAULT_MACHINE: Final = "nvme-255"
"""The bundled machine that is booted where none is said: one with enough CPUs to see what this is about."""

ModeWord = Literal["repeat", "once"]
OriginWord = Literal["userspace", "autoload"]
FormatWord = Literal["rfc", "rfc-as-posted", "mainline"]

POLICIES: Final[dict[PolicyWord, Policy.ValueType]] = {
    "v6.3": Policy.POLICY_V6_3,
    "v6.4": Policy.POLICY_V6_4,
    "v6.5": Policy.POLICY_V6_5,
}
KMODS: Final[dict[KmodWord, Kmod.ValueType]] = {"30": Kmod.KMOD_30, "34": Kmod.KMOD_34}
MODES: Final[dict[ModeWord, Storm.Mode.ValueType]] = {"repeat": Storm.MODE_REPEAT, "once": Storm.MODE_ONCE}
FORMATS: Final[dict[FormatWord, ReportFormat.ValueType]] = {
    "rfc": ReportFormat.REPORT_FORMAT_RFC,
    "rfc-as-posted": ReportFormat.REPORT_FORMAT_RFC_AS_POSTED,
    "mainline": ReportFormat.REPORT_FORMAT_MAINLINE,
}
ORIGINS: Final[dict[OriginWord, Origin.ValueType]] = {
    "userspace": Origin.ORIGIN_USERSPACE,
    "autoload": Origin.ORIGIN_AUTOLOAD,
}
OUTCOMES: Final[dict[str, Outcome.ValueType]] = {
    "live": Outcome.OUTCOME_LIVE,
    "kread": Outcome.OUTCOME_KREAD,
    "decompress": Outcome.OUTCOME_DECOMPRESS,
    "becoming": Outcome.OUTCOME_BECOMING,
    "load": Outcome.OUTCOME_LOAD,
    "init": Outcome.OUTCOME_INIT,
    "shared": Outcome.OUTCOME_SHARED,
    "refused": Outcome.OUTCOME_REFUSED,
    "abandoned": Outcome.OUTCOME_ABANDONED,
}

CALL_COLUMNS: Final = ("Module", "Outcome", "Errno", ">File", ">Image", ">Layout", ">Peak held", ">Took", ">Waited")
"""Of a table of calls; ``modpressure.cli.load.call_row`` fills it."""

_PLAIN_WIDTH: Final = 200
"""Columns where there is no terminal: enough that nothing is cut or wrapped."""

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal obeys, but for the tabulators and line ends that texts are made of."""

_64_BITS: Final = frozenset({FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64})


def word_of(words: Mapping[Any, int], number: int) -> str:
    """Return the word for an enum's number, "?" for one that this program does not know."""
    return next((str(word) for word, value in words.items() if value == number), "?" if number else "")


def plain(message: Message) -> dict[str, Any]:
    """Return a message as JSON's types: the names of its .proto file, all fields, and 64-bit numbers as numbers.

    The standard mapping makes texts of 64-bit numbers, for the sake of JavaScript.
    """
    document: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _make_numbers(message.DESCRIPTOR, document)
    return document


def _make_numbers(descriptor: Any, document: dict[str, Any]) -> None:
    for field in descriptor.fields:
        value = document.get(field.name)
        if value is None:
            continue
        values: list[Any] = value if isinstance(value, list) else [value]
        if field.cpp_type in _64_BITS:
            numbers = [int(each) for each in values]
            document[field.name] = numbers if isinstance(value, list) else numbers[0]
        elif field.message_type is not None:
            for each in values:
                if isinstance(each, dict):  # a time or duration is a text
                    _make_numbers(field.message_type, each)


def errno_text(name: str) -> str:
    """Return an errno with its words, such as "EEXIST: File exists"; the name alone if the system knows none."""
    number = getattr(errnos, name, None)
    return f"{name}: {os.strerror(number)}" if isinstance(number, int) else name


def time_text(timestamp: Timestamp) -> str:
    """Return a time for people: local, to the millisecond."""
    return timestamp.ToDatetime().astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] if timestamp.seconds else ""


def duration_text(duration_ns: int) -> str:
    """Return a duration for people, in ms."""
    return f"{duration_ns / 1e6:.1f} ms"


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints texts as they are."""
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made = Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=_PLAIN_WIDTH)
    return made


def printable(text: str) -> str:
    """Return a text without a character that a terminal would obey or hide: such are written as Python writes them.

    For what others chose, as names and labels: it stays on its line, and changes nothing on the screen.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def print_text(text: str) -> None:
    """Print a text of any number of lines; what a terminal would obey is escaped."""
    _write(_CONTROL.sub(lambda found: repr(found[0])[1:-1], text))


def print_line(text: str) -> None:
    """Print one line, whatever is in it."""
    _write(printable(text) + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(document: Any) -> None:
    """Print one JSON document on one line."""
    _write(json.dumps(document, ensure_ascii=False) + "\n")


def say(text: str) -> None:
    """Tell the user something that is no result, in one line on standard error."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; a column whose title begins with ">" is aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in columns:
        right = title.startswith(">")
        table.add_column(title.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console().print(table)
