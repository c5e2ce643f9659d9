"""Random messages of a type: what a client might mean, or values at and beyond every edge.

They are made in their wire format (https://protobuf.dev/programming-guides/encoding/), out of values that are encoded
once: to fill message objects and to serialize them takes several times as long.
"""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from fuzz.wire import LENGTH_DELIMITED, varint

T = TypeVar("T")

NOT_UTF8: Final = b"\xff\xfe\xc0"

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
_STRINGS: Final[tuple[str | bytes, ...]] = (
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
    b"a" + NOT_UTF8 + b"b",
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

_MOST_DIFFERENT: Final = 20
"""Different ones of many values of a field."""

_MOST_REPEATED_BYTES: Final = 200_000

_OFTEN: Final = 0.65
"""The chance of a field to be there."""

_VARINT: Final = 0
_FIXED64: Final = 1
_FIXED32: Final = 5


class _Integers(NamedTuple):
    """A type of integers: its range, and how it is written."""

    bits: int
    is_signed: bool
    wire_type: int
    encode: Callable[[int], bytes]


def _twos_complement(value: int) -> bytes:
    return varint(value & (1 << 64) - 1)


def _zigzag(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else ~(value << 1))


_INTEGER_TYPES: Final[dict[int, _Integers]] = {
    FieldDescriptor.TYPE_INT32: _Integers(32, True, _VARINT, _twos_complement),
    FieldDescriptor.TYPE_INT64: _Integers(64, True, _VARINT, _twos_complement),
    FieldDescriptor.TYPE_UINT32: _Integers(32, False, _VARINT, varint),
    FieldDescriptor.TYPE_UINT64: _Integers(64, False, _VARINT, varint),
    FieldDescriptor.TYPE_SINT32: _Integers(32, True, _VARINT, _zigzag),
    FieldDescriptor.TYPE_SINT64: _Integers(64, True, _VARINT, _zigzag),
    FieldDescriptor.TYPE_FIXED32: _Integers(32, False, _FIXED32, struct.Struct("<I").pack),
    FieldDescriptor.TYPE_FIXED64: _Integers(64, False, _FIXED64, struct.Struct("<Q").pack),
    FieldDescriptor.TYPE_SFIXED32: _Integers(32, True, _FIXED32, struct.Struct("<i").pack),
    FieldDescriptor.TYPE_SFIXED64: _Integers(64, True, _FIXED64, struct.Struct("<q").pack),
}
_FLOATS: Final = (0.0, -1.0, 1e308, float("inf"), float("nan"))
_ODD_ENUM_NUMBERS: Final = tuple(map(_twos_complement, (-1, 99, (1 << 31) - 1, -(1 << 31))))


def delimited(content: bytes) -> bytes:
    """Return bytes with their length before them."""
    return varint(len(content)) + content


def _string(text: str | bytes) -> bytes:
    return delimited(text if isinstance(text, bytes) else text.encode())


_ODD_STRINGS: Final = tuple(map(_string, _STRINGS))
_INNER: Final = tuple(
    text if isinstance(text, bytes) else text.encode() for text in (*_STRINGS, *SYSTEMS, *MODULES, *_WORDS["filter"])
)


class Dice(random.Random):
    """A source of chance that is asked a hundred times for each message: its answers are rougher, and come sooner."""

    def choice(self, options: Sequence[T]) -> T:  # type: ignore[override]
        """Return one of some options."""
        return options[int(self.random() * len(options))]

    def below(self, edge: int) -> int:
        """Return a number from 0 on, below ``edge``."""
        return int(self.random() * edge)

    def text(self, length: int) -> bytes:
        """Return that many characters or fewer: ASCII, or of the Basic Multilingual Plane without surrogates."""
        if self.random() < 0.5:
            return self.randbytes(length).decode("ascii", "ignore").encode()
        return self.randbytes(2 * length).decode("utf-16-le", "ignore").encode()


class _Field(NamedTuple):
    """What of a field decides what goes into it: asking the descriptor each time takes longer than all else."""

    name: str
    type: int
    tag: bytes
    """What is before each value; before all of them where they are packed."""

    is_repeated: bool
    is_packed: bool
    message: Descriptor | None
    usual: tuple[bytes, ...]
    """Values that a client may well mean, encoded."""


def _known(field: FieldDescriptor) -> _Field:
    wire_type, usual = _usual(field)
    is_packed = field.is_repeated and wire_type != LENGTH_DELIMITED
    tag = varint(field.number << 3 | (LENGTH_DELIMITED if is_packed else wire_type))
    return _Field(field.name, field.type, tag, field.is_repeated, is_packed, field.message_type, usual)


def _usual(field: FieldDescriptor) -> tuple[int, tuple[bytes, ...]]:
    """Return how a field's values are written, and some of them."""
    if field.type in (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_BYTES):
        return LENGTH_DELIMITED, ()
    if field.type == FieldDescriptor.TYPE_STRING:
        words = _WORDS.get(field.name, tuple(f"word-{number}" for number in range(50)))
        return LENGTH_DELIMITED, tuple(map(_string, words))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return _VARINT, (b"\0", b"\1")
    if field.type == FieldDescriptor.TYPE_ENUM:
        return _VARINT, tuple(_twos_complement(value.number) for value in field.enum_type.values)
    if field.type in _INTEGER_TYPES:
        integers = _INTEGER_TYPES[field.type]
        numbers = _NUMBERS.get(field.name, (0, 1, 2, 4096, 100_000))
        lowest = -(1 << integers.bits - 1) if integers.is_signed else 0
        return integers.wire_type, tuple(integers.encode(number) for number in numbers if number >= lowest)
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return _FIXED64, tuple(struct.pack("<d", number) for number in _FLOATS)
    raise NotImplementedError(f"field {field.full_name} is of a type that no message had so far")


@functools.cache
def _fields(descriptor: Descriptor) -> tuple[tuple[_Field, ...], tuple[tuple[_Field, ...], ...]]:
    """Return the fields that stand for themselves, and the choices of which one is taken."""
    free = tuple(_known(field) for field in descriptor.fields if field.containing_oneof is None)
    return free, tuple(tuple(map(_known, group.fields)) for group in descriptor.oneofs if group.fields)


class Maker:
    """Makes messages out of one source of chance."""

    def __init__(self, dice: Dice, page_tokens: Sequence[str] = ()) -> None:
        """``page_tokens`` are those that were seen in answers."""
        self._dice = dice
        self._page_tokens = page_tokens
        self._wild = 0.0
        self._left = 0
        self._left_characters = 0

    def message(self, descriptor: Descriptor, wild: float) -> bytes:
        """Return a message; each of its values is one that nobody would send with the chance ``wild``."""
        self._wild, self._left = wild, MOST_VALUES
        # Text of megabytes is slow to make and to send, so it is rare.
        self._left_characters = _MOST_CHARACTERS if self._dice.random() < 0.998 else _VERY_MANY_CHARACTERS
        return b"".join(self._filled(descriptor, _DEEPEST))

    def _filled(self, descriptor: Descriptor, deep: int) -> list[bytes]:
        roll = self._dice.random
        free, choices = _fields(descriptor)
        self._left -= len(free)
        parts: list[bytes] = []
        for field in free:
            if roll() < _OFTEN:
                self._add(parts, field, deep)
        # A message with a choice makes sense if something is chosen.
        for choice in choices:
            if roll() < 0.97:
                self._add(parts, choice[int(roll() * len(choice))], deep)
        return parts

    def _add(self, parts: list[bytes], field: _Field, deep: int) -> None:
        if field.message is not None and not deep:
            return
        if not field.is_repeated:
            parts += (field.tag, self._value(field, deep))
            return
        count = max(0, min(self._count(), self._left))
        made = [self._value(field, deep) for _ in range(min(count, _MOST_DIFFERENT))]
        if count > len(made):
            # What so many can do, a few do that come again and again.
            self._left -= count
            rounds = min(count // len(made) + 1, 1 + _MOST_REPEATED_BYTES // (1 + sum(map(len, made))))
            made = (made * rounds)[:count]
        if field.is_packed:
            parts += (field.tag, delimited(b"".join(made)))
        else:
            parts += [part for value in made for part in (field.tag, value)]

    def _count(self) -> int:
        dice = self._dice
        if dice.random() < self._wild * 0.02:
            return dice.choice((100, 1001, MOST_VALUES))
        return dice.choice((0, 1, 1, 2, 3))

    def _value(self, field: _Field, deep: int) -> bytes:
        dice = self._dice
        if field.message is not None:
            return delimited(b"".join(self._filled(field.message, deep - 1)))
        if not self._wild or dice.random() >= self._wild:
            if field.name == "page_token" and self._page_tokens:
                return _string(dice.choice(("", "", *self._page_tokens)))
            if field.usual:
                return dice.choice(field.usual)
        if field.type == FieldDescriptor.TYPE_STRING:
            return self._odd_string()
        if field.type in _INTEGER_TYPES:
            return self._odd_integer(_INTEGER_TYPES[field.type])
        if field.type == FieldDescriptor.TYPE_ENUM:
            return dice.choice(_ODD_ENUM_NUMBERS)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return delimited(dice.randbytes(dice.choice((0, 1, 10, 300))))
        return dice.choice(field.usual)

    def _odd_string(self) -> bytes:
        dice, kind = self._dice, self._dice.random()
        if kind < 0.2:
            many = self._left_characters > _MOST_CHARACTERS
            length = min(dice.choice(_VERY_LONG if many else _LONG), self._left_characters)
            self._left_characters -= length
            return _string((dice.choice(("a", "*", "\x00", "é", "a*", "[", "-_")) * length)[:length])
        if kind < 0.44:
            return delimited(dice.text(dice.below(90)))
        if kind < 0.72:
            # What a service may look for, between what it has never seen.
            return delimited(dice.text(dice.below(9)) + dice.choice(_INNER) + dice.text(dice.below(9)))
        return dice.choice(_ODD_STRINGS)

    def _odd_integer(self, integers: _Integers) -> bytes:
        dice = self._dice
        value = dice.choice(_INTEGERS) if dice.random() < 0.5 else dice.getrandbits(integers.bits)
        edge = 1 << (integers.bits - 1) if integers.is_signed else 1 << integers.bits
        value = dice.choice((value % edge, edge - 1))
        if integers.is_signed and dice.random() < 0.3:
            value = -value - (dice.random() < 0.2)
        return integers.encode(value)
