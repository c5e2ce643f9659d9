"""Damage to a message in its wire format (https://protobuf.dev/programming-guides/encoding/)."""

from __future__ import annotations

import random
from typing import Final

LENGTH_DELIMITED: Final = 2
"""The wire type of strings, bytes, messages and packed fields."""

_DEEP: Final = 300
"""Nested groups: more than a parser follows."""

_BYTES: Final = tuple(bytes([value]) for value in range(0x80))


def damaged(message: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return ``message`` with one to four injuries; some of them graft parts of ``other``."""
    body = bytearray(message)
    for _ in range(dice.randrange(1, 5)):
        _injure(body, other, dice)
    return bytes(body)


def _injure(body: bytearray, other: bytes, dice: random.Random) -> None:
    at = dice.randrange(len(body) + 1)
    match dice.randrange(9):
        case 0:
            if body:
                body[at % len(body)] ^= 1 << dice.randrange(8)
        case 1:
            del body[at:]
        case 2:
            body[at : at + dice.randrange(16)] = b""
        case 3:
            body[at:at] = body[: dice.randrange(40)]
        case 4:
            body[at:at] = other[dice.randrange(len(other) + 1) :][:200]
        case 5:
            body[at:at] = dice.randbytes(dice.randrange(20))
        case 6:
            body[at:at] = _field(dice)
        case 7:
            # A field of groups, and a group that never ends.
            body += b"\x0b" * dice.choice((1, 99, 101, _DEEP))
        case _:
            body += _field(dice)


def _field(dice: random.Random) -> bytes:
    """Return a field of a number known or not, with a value that may not be its kind's, or not there."""
    kind = dice.randrange(8)
    tag = varint(dice.choice((0, 1, 2, 3, 5, 19_000, (1 << 29) - 1, 1 << 29)) << 3 | kind)
    match kind:
        case 0:
            return tag + dice.choice((varint(dice.getrandbits(64)), b"\xff" * 10, b"\x80" * 9 + b"\x01", b"\xff" * 11))
        case 1:
            return tag + dice.randbytes(8)
        case 2:
            length = dice.choice((0, 1, 5, 127, 1 << 20, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1))
            return tag + varint(length) + dice.randbytes(min(length, dice.randrange(8)))
        case 5:
            return tag + dice.randbytes(4)
    return tag


def varint(value: int) -> bytes:
    """Return a number from 0 on as the wire has it: seven bits a byte, the lowest first."""
    if value < 0x80:
        return _BYTES[value]
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
