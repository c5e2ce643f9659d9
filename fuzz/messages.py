"""Random messages of a type: what a client might mean, or values at and beyond every edge."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeVar

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

T = TypeVar("T")

NOT_UTF8: Final = "\ue000"
"""Stands for three bytes that are no UTF-8, which a message in Python can't hold (see ``wire.damaged``)."""

SYSTEMS: Final = ("", "default", "fuzz", "fuzz-2", "fuzz-small")
MODULES: Final = ("minix", "bfs", "crc16", "crc_itu_t", "nls_ascii", "mbcache", "ext4", "fs-minix", "crc-itu-t", "none")
_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "system": SYSTEMS,
    "id": SYSTEMS[1:],
    "module": MODULES,
    "modules": MODULES[:6],
    "name": MODULES,
    "filter": ("*", "crc*", "[a-", "?inix", "*a*a*a*a*a*a*b", "[!" * 40, "{minix,bfs}"),
    "service": ("", "modpressure.v1.StatsService", "modpressure.v1.LoaderService", "grpc.health.v1.Health"),
    "file_by_filename": ("modpressure/v1/call.proto", "grpc/health/v1/health.proto", "none.proto"),
    "file_containing_symbol": ("modpressure.v1.Call", "modpressure.v1.StatsService", "no.such.Thing"),
    "containing_type": ("modpressure.v1.Call", "no.such.Thing"),
    "instance_id": tuple(f"fuzz-{number}" for number in range(40)),
    "inode": ("tree:minix.ko:0", "tree:bfs.ko:0", ""),
    "errno": ("", "EEXIST", "EBUSY", "ENOMEM", "nonsense"),
    "parameters": ("", "a=1", 'a="b c"', "=,=", "a"),
}
_STRINGS: Final = (
    "",
    "x",
    "\0",
    "\n\r\t\x1b[31m",
    "' OR 1=1; --",
    "%s%n{0}",
    "../../../../etc/passwd",
    "/proc/self/environ",
    "\u202e\u2066txt",
    "\U0001f9e8" * 9,
    "\ud7ff\uffff",
    NOT_UTF8,
    f"a{NOT_UTF8}b",
    "999999999999999999999999999999",
    "MTIz",
)
_INTEGERS: Final = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    63,
    64,
    100,
    1000,
    4096,
    10_001,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 44,
    1 << 53,
)
_NUMBERS: Final[dict[str, tuple[int, ...]]] = {
    # Storms have to be short, or a million of them would take for ever.
    "workers": (0, 1, 1, 2, 2, 3, 5, 20),
    "operations": (0, 1, 1, 2, 3),
    "seconds": (0, 0, 0, 1, -1),
    "nanos": (0, 1, 1_000_000, 5_000_000, -1),
    "page_size": (0, 1, 2, 10, 1000, 10_000, -1),
    "call_id": (0, 1, 2, 3, 4, 5, 6, 7, 8),
    "flags": (0, 0, 0, 1, 2, 3, 4),
    "copy": (0, 0, 0, 1, 2),
    "sizes": (0, 1, 4096, 1 << 20),
}
_LONG: Final = (200, 1000, 5000, 20_000, 100_000)
_VERY_LONG: Final = (1 << 20, 3 << 20, 10 << 20)
_MOST_CHARACTERS: Final = 120_000
_VERY_MANY_CHARACTERS: Final = 20 << 20
_DEEPEST: Final = 6
MOST_VALUES: Final = 3000
"""Values in one message; more would only take time to make."""

_BITS: Final = {
    FieldDescriptor.TYPE_INT32: (32, True),
    FieldDescriptor.TYPE_SINT32: (32, True),
    FieldDescriptor.TYPE_SFIXED32: (32, True),
    FieldDescriptor.TYPE_UINT32: (32, False),
    FieldDescriptor.TYPE_FIXED32: (32, False),
    FieldDescriptor.TYPE_INT64: (64, True),
    FieldDescriptor.TYPE_SINT64: (64, True),
    FieldDescriptor.TYPE_SFIXED64: (64, True),
    FieldDescriptor.TYPE_UINT64: (64, False),
    FieldDescriptor.TYPE_FIXED64: (64, False),
}


class Dice(random.Random):
    """A source of chance that is asked a hundred times for each message: its answers are rougher, and come sooner."""

    def choice(self, options: Sequence[T]) -> T:  # type: ignore[override]
        """Return one of some options."""
        return options[int(self.random() * len(options))]

    def below(self, edge: int) -> int:
        """Return a number from 0 on, below ``edge``."""
        return int(self.random() * edge)

    def text(self, length: int) -> str:
        """Return that many characters or fewer: ASCII, or of the Basic Multilingual Plane without surrogates."""
        if self.random() < 0.5:
            return self.randbytes(length).decode("ascii", "ignore")
        return self.randbytes(2 * length).decode("utf-16-le", "ignore")


class _Field(NamedTuple):
    """What of a field decides what goes into it: asking the descriptor each time takes longer than all else."""

    name: str
    type: int
    is_repeated: bool
    is_message: bool
    enum_numbers: tuple[int, ...]


@functools.cache
def _fields(descriptor: Descriptor) -> tuple[tuple[_Field, ...], tuple[tuple[_Field, ...], ...]]:
    """Return the fields that stand for themselves, and the choices of which one is taken."""

    def known(field: FieldDescriptor) -> _Field:
        numbers = tuple(value.number for value in field.enum_type.values) if field.enum_type else ()
        return _Field(field.name, field.type, field.is_repeated, field.message_type is not None, numbers)

    free = tuple(known(field) for field in descriptor.fields if field.containing_oneof is None)
    return free, tuple(tuple(map(known, group.fields)) for group in descriptor.oneofs if group.fields)


class Maker:
    """Makes messages out of one source of chance."""

    def __init__(self, dice: Dice, page_tokens: Sequence[str] = ()) -> None:
        """``page_tokens`` are those that were seen in answers."""
        self._dice = dice
        self._page_tokens = page_tokens
        self._wild = 0.0
        self._left = 0
        self._left_characters = 0

    def message(self, descriptor: Descriptor, wild: float) -> Message:
        """Return a message; each of its values is one that nobody would send with the chance ``wild``."""
        self._wild, self._left = wild, MOST_VALUES
        # Text of megabytes is slow to make and to send, so it is rare.
        self._left_characters = _MOST_CHARACTERS if self._dice.random() < 0.998 else _VERY_MANY_CHARACTERS
        made: Message = message_factory.GetMessageClass(descriptor)()
        self._fill(made, _DEEPEST)
        return made

    def _fill(self, message: Message, deep: int) -> None:
        dice = self._dice
        free, choices = _fields(message.DESCRIPTOR)
        self._left -= len(free)
        for field in free:
            if dice.random() < 0.65:
                self._set(message, field, deep)
        # A message with a choice makes sense if something is chosen.
        for choice in choices:
            if dice.random() < 0.97:
                self._set(message, dice.choice(choice), deep)

    def _set(self, message: Message, field: _Field, deep: int) -> None:
        if field.is_repeated:
            values = getattr(message, field.name)
            for _ in range(min(self._count(), self._left)):
                if not field.is_message:
                    values.append(self._value(field))
                elif deep:
                    self._fill(values.add(), deep - 1)
        elif not field.is_message:
            setattr(message, field.name, self._value(field))
        elif deep:
            part = getattr(message, field.name)
            part.SetInParent()
            self._fill(part, deep - 1)

    def _count(self) -> int:
        dice = self._dice
        if dice.random() < self._wild * 0.02:
            return dice.choice((100, 1001, MOST_VALUES))
        return dice.choice((0, 1, 1, 2, 3))

    def _value(self, field: _Field) -> Any:
        dice = self._dice
        wild = dice.random() < self._wild
        if field.type == FieldDescriptor.TYPE_STRING:
            return self._string(field.name, wild)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return dice.randbytes(dice.choice((0, 1, 10, 300)))
        if field.type == FieldDescriptor.TYPE_BOOL:
            return dice.random() < 0.5
        if field.type == FieldDescriptor.TYPE_ENUM:
            return dice.choice((-1, 99, (1 << 31) - 1, -(1 << 31)) if wild else field.enum_numbers)
        if field.type in _BITS:
            return self._integer(field, wild)
        return dice.choice((0.0, -1.0, 1e308, float("inf"), float("nan")))

    def _string(self, name: str, wild: bool) -> str:
        dice = self._dice
        if not wild:
            words = ("", "", *self._page_tokens) if name == "page_token" else _WORDS.get(name)
            return dice.choice(words) if words else f"word-{dice.below(50)}"
        if dice.random() < 0.2:
            many = self._left_characters > _MOST_CHARACTERS
            length = min(dice.choice(_VERY_LONG if many else _LONG), self._left_characters)
            self._left_characters -= length
            return (dice.choice(("a", "*", "\x00", "é", "a*", "[", "-_")) * length)[:length]
        if dice.random() < 0.3:
            return dice.text(dice.below(90))
        return dice.choice(_STRINGS)

    def _integer(self, field: _Field, wild: bool) -> int:
        dice = self._dice
        bits, signed = _BITS[field.type]
        if not wild:
            return dice.choice(_NUMBERS.get(field.name, (0, 1, 2, 4096, 100_000)))
        value = dice.choice(_INTEGERS) if dice.random() < 0.5 else dice.getrandbits(bits)
        edge = 1 << (bits - 1) if signed else 1 << bits
        value = dice.choice((value % edge, edge - 1))
        return -value - (dice.random() < 0.2) if signed and dice.random() < 0.3 else value
