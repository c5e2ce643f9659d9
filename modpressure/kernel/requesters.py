"""Who asked for modules, and what that came to: calls, failures and wasted bytes by origin and by requester.

A requester's label is free text, so a system tells only so many of them apart; the rest goes by one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

MAX_REQUESTERS: Final = 64
"""Requesters that a system tells apart, of both origins together."""

MAX_LABEL_BYTES: Final = 128

OTHER: Final = "other"
"""The label of all requesters beyond those, and of labels that can't be kept as they are."""


class Origin(IntEnum):
    """Where a call came from. The numbers are those of ``modpressure.v1.Origin``."""

    USERSPACE = 1
    AUTOLOAD = 2


class Requester(NamedTuple):
    """Who asked."""

    origin: int
    label: str


@dataclass(slots=True)
class Tally:
    """What the calls of one requester came to."""

    calls: int = 0
    failures: int = 0
    """Calls that returned an errno, whether the kernel has a counter for that or not."""

    wasted_bytes: int = 0
    """Bytes allocated for calls that failed, by the rules of the mainline report."""

    def add(self, other: Tally) -> None:
        """Add what other calls came to."""
        self.calls += other.calls
        self.failures += other.failures
        self.wasted_bytes += other.wasted_bytes


class Requesters:
    """The requesters that one system tells apart: those that came first."""

    def __init__(self, known: Iterable[Requester] = ()) -> None:
        self._known = {requester for requester in known if requester.label != OTHER}

    def fold(self, tallies: Mapping[tuple[int, str], Tally]) -> dict[Requester, Tally]:
        """Return what some calls came to, by the requesters that are told apart; new ones are from now on."""
        folded: dict[Requester, Tally] = {}
        for (number, label), tally in tallies.items():
            origin = Origin.AUTOLOAD if number == Origin.AUTOLOAD else Origin.USERSPACE
            requester = self._told_apart(Requester(int(origin), label))
            known = folded.get(requester)
            if known is None:
                folded[requester] = Tally(tally.calls, tally.failures, tally.wasted_bytes)
            else:
                known.add(tally)
        return folded

    def _told_apart(self, requester: Requester) -> Requester:
        if requester not in self._known:
            if len(self._known) >= MAX_REQUESTERS or not _can_be_kept(requester.label):
                return Requester(requester.origin, OTHER)
            if requester.label != OTHER:
                self._known.add(requester)
        return requester


def _can_be_kept(label: str) -> bool:
    # A database takes no NUL in a text, and what is not printable would garble a table.
    return (not label or label.isprintable()) and len(label.encode()) <= MAX_LABEL_BYTES
