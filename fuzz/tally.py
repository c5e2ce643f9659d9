"""What came of the messages to one RPC."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

BAD_STATUSES: Final = ("INTERNAL", "UNKNOWN")
"""What a server says when it does not know what has happened to it."""

MAX_FINDINGS: Final = 20


@dataclass
class Tally:
    """Counts of one target, and what was found to be wrong."""

    name: str
    messages: int = 0
    """Messages that the service has read."""

    parsed: int = 0
    """Those of them that are messages of the type that the RPC takes."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Statuses of RPCs; those of single answers in a stream are prefixed with ``answer``."""

    hangs: int = 0
    crashes: int = 0
    wrong: int = 0
    """Answers of the services after the storm that were not what they must be."""

    findings: list[str] = field(default_factory=list)

    def found(self, text: str) -> None:
        """Keep a description of something wrong, unless there are many already."""
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(text)

    @property
    def internal(self) -> int:
        """RPCs and answers with a status of ``BAD_STATUSES``."""
        return sum(count for status, count in self.statuses.items() if status.split()[-1] in BAD_STATUSES)

    @property
    def bad(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.internal or self.hangs or self.crashes or self.wrong)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self), "statuses": dict(self.statuses)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tally:
        """Return what ``to_json`` made plain."""
        return cls(**{**data, "statuses": Counter(data["statuses"])})
