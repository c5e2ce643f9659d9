"""String tables: names that share tails as linkers let them, and made-up names that fill a table to a given length."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class StringTable:
    """A string table in the making. Offset 0 is the empty string (System V ABI, string table)."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """Begin with ``names``, each stored once; one that is the tail of another takes no room (as ld and as do)."""
        self._contents = bytearray(1)
        self._offsets = {"": 0}
        hosted: str | None = None
        end = 0
        for backwards in sorted({name[::-1] for name in names if name}, reverse=True):
            name = backwards[::-1]
            if hosted is None or not hosted.endswith(name):
                end = self.append(name) + len(name)
                hosted = name
            self._offsets[name] = end - len(name)

    def __len__(self) -> int:
        return len(self._contents)

    def append(self, name: str) -> int:
        """Put ``name`` at the end, shared with nothing; its offset."""
        offset = len(self._contents)
        self._contents += name.encode("ascii") + b"\0"
        return offset

    def offset(self, name: str) -> int:
        """Return where one of the names given at the beginning is."""
        return self._offsets[name]

    def contents(self, length_bytes: int) -> bytes:
        """Return the table, padded to its length. ValueError if it is longer than that."""
        missing = length_bytes - len(self._contents)
        if missing < 0:
            raise ValueError(f"the names take {len(self._contents)} bytes, the string table has {length_bytes}")
        return bytes(self._contents) + (b"x" * (missing - 1) + b"\0" if missing else b"")


def lengths(count: int, name_bytes: int) -> list[int]:
    """Lengths of ``count`` names that take ``name_bytes`` with a NUL each, as equal as can be."""
    each, longer = divmod(name_bytes, count)
    return [each] * longer + [each - 1] * (count - longer)


def add_made_up(table: StringTable, wanted: Sequence[int], room_bytes: int, word: str) -> list[int]:
    """Add a made-up name of each of the lengths ``wanted``; their offsets, in the same order.

    ``room_bytes`` is the length that the table must not pass: in a real one many names are tails of others, so as many
    of the made-up ones are as it takes, spread evenly over the lengths. ValueError if even that is not enough.
    """
    room = room_bytes - len(table)
    total = sum(wanted) + len(wanted)
    share = max(0.0, 1.0 - room / total) if total else 0.0
    order = sorted(range(len(wanted)), key=lambda place: -wanted[place])
    while True:
        hosts = _hosts([wanted[place] for place in order], share)
        placed = sum(length + 1 for (host, length) in zip(hosts, (wanted[p] for p in order), strict=True) if host < 0)
        if placed <= room:
            break
        if share >= 1.0:
            raise ValueError(f"{len(wanted)} names of {total} bytes have no room in {room} bytes of a string table")
        share = min(1.0, share + 0.02)
    ends: list[int] = []
    offsets = [0] * len(wanted)
    for number, (place, host) in enumerate(zip(order, hosts, strict=True)):
        length = wanted[place]
        if host < 0:
            offsets[place] = table.append(_made_up(length, number, word))
            ends.append(offsets[place] + length)
        else:
            offsets[place] = ends[host] - length
            ends.append(ends[host])
    return offsets


def _hosts(descending: list[int], share: float) -> list[int]:
    """For each length the place of an earlier name whose tail it is, or -1 for a name of its own."""
    hosts: list[int] = []
    free: deque[int] = deque()
    seen = shared = 0
    for place, length in enumerate(descending):
        seen += length + 1
        if free and shared + length + 1 <= share * seen:
            host = free.popleft()
            free.append(host)
            shared += length + 1
            hosts.append(host)
        else:
            free.appendleft(place)
            hosts.append(-1)
    return hosts


def _made_up(length: int, number: int, word: str) -> str:
    """Make up a name of that length, unlike the others as far as it has room to be."""
    digits = ""
    while number or len(digits) < 4:
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    if length <= len(digits):
        return digits[len(digits) - length :]
    return (word + "_" + word * (length // len(word) + 1))[: length - len(digits)] + digits
