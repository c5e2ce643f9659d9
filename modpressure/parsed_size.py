"""How much memory a message takes when it is parsed, told from its bytes before it is.

A message in a repeated field may take two bytes on the wire, and takes some hundred when it is parsed: one of 16 MiB
could come to gigabytes. Parsing is all or nothing, so the bytes are walked first, as deep as something may be repeated,
and no further than to where it is too much.
"""

from __future__ import annotations

import functools
from typing import Any, Final, TypeAlias

_VARINT, _FIXED64, _LENGTH_DELIMITED, _GROUP_START, _GROUP_END, _FIXED32 = range(6)
"""Wire types, the lower three bits of a tag (protobuf.dev/programming-guides/encoding)."""

_MAX_VARINT_BYTES: Final = 10
_DEEPEST: Final = 100
"""Messages in messages; protobuf follows no further."""

# What upb, protobuf's implementation in C, takes on 64-bit machines, rounded up; measured by the tests.
_HEADER_BYTES: Final = 40
"""Of a message: what is noted of it, and its place in an array, which doubles as it grows while its old places stay."""

_TEXT_BYTES: Final = 16
_NUMBER_BYTES: Final = 8
_ARRAY_BYTES: Final = 72
"""Of a field whatever its value, by its type; of an array with the first places in it."""

_PACKED_BYTES: Final = 3 * _NUMBER_BYTES
"""Of a number among packed ones, in an array that grows."""

_LEAST_BYTES: Final = 64
_LEAST_MESSAGE_BYTES: Final = 256
"""What any field is taken for at least: it takes time, too, to walk it here, and more to look at it afterwards."""

_SHORTEST: Final = 2
"""Bytes of a field on the wire, at least: tag, and length or value."""


class NotWire(Exception):
    """The bytes are not those of any message."""


class Shape:
    """What a type of messages, and the fields in it, take in memory."""

    __slots__ = ("fields", "is_flat", "message_bytes", "most_bytes")

    def __init__(self, descriptor: Any) -> None:
        """Learn it from the type's descriptor. Types that contain themselves are not supported."""
        self.fields: _Fields = {}
        """Of a tag the bytes, the shape to walk it by if it is to be walked, and whether it is packed numbers."""

        self.is_flat = True
        """Whether it takes the same whatever is in it: then nobody has to walk it."""

        self.message_bytes = _HEADER_BYTES + _NUMBER_BYTES * len(descriptor.oneofs)
        self.most_bytes = _LEAST_BYTES
        """The most that any one field takes, at any depth."""

        for field in descriptor.fields:
            self._add(field)

    def _add(self, field: Any) -> None:
        # Of these versions of protobuf not all have ``is_repeated``.
        repeated = field.default_value == []
        tag = field.number << 3
        inner = None if field.message_type is None else shape_of(field.message_type)
        if inner is not None:
            walked = None if inner.is_flat else inner
            # A message that is there already is merged into, but for one that another choice has taken the place of.
            once = not repeated and field.containing_oneof is None and inner.is_flat
            self.message_bytes += _ARRAY_BYTES if repeated else _NUMBER_BYTES + once * inner.message_bytes
            self.is_flat &= once
            if not once:
                field_bytes = max(inner.message_bytes, _LEAST_MESSAGE_BYTES)
                self.fields[tag | _LENGTH_DELIMITED] = (field_bytes, walked, False)
                self.most_bytes = max(self.most_bytes, field_bytes)
            self.most_bytes = max(self.most_bytes, inner.most_bytes)
        elif field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            self.message_bytes += _ARRAY_BYTES if repeated else _TEXT_BYTES
            self.is_flat &= not repeated
        else:
            self.message_bytes += _ARRAY_BYTES if repeated else _NUMBER_BYTES
            self.is_flat &= not repeated
            if repeated:
                self.fields[tag | _LENGTH_DELIMITED] = (_LEAST_BYTES, None, True)

    def shortest_with(self, size_bytes: int) -> int:
        """Return how long a message that takes more than ``size_bytes`` is at least; bytes."""
        return _SHORTEST * size_bytes // self.most_bytes

    def parsed_bytes(self, message: bytes, most_bytes: int) -> int:
        """Return what a message takes; if that is more than ``most_bytes``, anything that is more.

        NotWire if it can't be walked; then it can't be parsed either.
        """
        try:
            return self._walk(message, most_bytes)
        except IndexError:
            raise NotWire from None

    def _walk(self, message: bytes, most_bytes: int) -> int:
        fields, at, end = self.fields, 0, len(message)
        around: list[tuple[_Fields, int]] = []
        taken = self.message_bytes
        while taken <= most_bytes:
            if at >= end:
                if at > end or fields is _IN_GROUP:
                    raise NotWire
                if not around:
                    break
                fields, end = around.pop()
                continue
            tag = message[at]
            at += 1
            if tag >= 0x80:
                tag, at = _varint(message, at - 1)
            kind = tag & 7
            if kind == _LENGTH_DELIMITED:
                length = message[at]
                at += 1
                if length >= 0x80:
                    length, at = _varint(message, at - 1)
                field_bytes, inner, is_packed = fields.get(tag, _OTHER)
                taken += field_bytes
                if inner is not None and length:
                    if len(around) > _DEEPEST:
                        raise NotWire
                    around.append((fields, end))
                    fields, limit, end = inner.fields, end, at + length
                    if end > limit:
                        raise NotWire
                    continue
                if is_packed:
                    # Each number ends with a byte that has no highest bit, or has four or eight bytes.
                    taken += _PACKED_BYTES * len(message[at : at + length].translate(None, _CONTINUED))
                at += length
                continue
            taken += _LEAST_BYTES
            if kind == _VARINT:
                if message[at] < 0x80:
                    at += 1
                else:
                    _, at = _varint(message, at)
            elif kind == _FIXED64:
                at += 8
            elif kind == _FIXED32:
                at += 4
            elif kind == _GROUP_START and len(around) <= _DEEPEST:
                around.append((fields, end))
                fields = _IN_GROUP
            elif kind == _GROUP_END and fields is _IN_GROUP:
                fields, end = around.pop()
            else:
                raise NotWire
        return taken


_Fields: TypeAlias = dict[int, tuple[int, Shape | None, bool]]
_IN_GROUP: Final[_Fields] = {}
"""Nothing of ours is a group, so what is in one is not known."""

_OTHER: Final[tuple[int, Shape | None, bool]] = (_LEAST_BYTES, None, False)
_CONTINUED: Final = bytes(range(0x80, 0x100))

shape_of: Final = functools.cache(Shape)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and where it ends."""
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise NotWire
