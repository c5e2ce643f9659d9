"""What clients asked and what they were answered, whatever becomes of the services."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from modpressure.v1 import call_pb2
from modpressure.v1 import loader_service_pb2 as pb

PASSING: Final = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED"})
"""Names of the statuses after which a client asks again; all else is an answer."""

Request: TypeAlias = pb.LoadModuleRequest | pb.UnloadModuleRequest | pb.RequestModuleRequest
Response: TypeAlias = pb.LoadModuleResponse | pb.UnloadModuleResponse | pb.RequestModuleResponse


@dataclass(frozen=True, slots=True)
class Attempt:
    """One time that a request was sent."""

    loader: int
    status: str
    """Name of the gRPC status."""

    details: str = ""

    def __str__(self) -> str:
        return f"loader {self.loader}: {self.status} {self.details}".rstrip()


@dataclass(eq=False)
class Entry:
    """One request to load or unload, or of the kernel, asked until it was answered or its client gave up."""

    request: Request
    attempts: list[Attempt] = field(default_factory=list)

    answer: Response | None = None
    other_answer: Response | None = None
    """What the same request was answered when it was sent once more, though there was an answer."""

    @property
    def is_in_doubt(self) -> bool:
        """Whether its client might have asked again, and was never told what came of it."""
        return (
            self.request.request_id != ""
            and self.answer is None
            and all(attempt.status in PASSING for attempt in self.attempts[-1:])
        )

    @property
    def calls(self) -> Iterator[call_pb2.Call]:
        """The loads that its client was told of."""
        if isinstance(self.answer, pb.LoadModuleResponse):
            yield from self.answer.dependency_calls
            if self.answer.HasField("call"):
                yield self.answer.call
        elif isinstance(self.answer, pb.RequestModuleResponse):
            yield from self.answer.calls

    @property
    def unload(self) -> call_pb2.Unload | None:
        """The unload that its client was told of, if it changed anything."""
        if isinstance(self.answer, pb.UnloadModuleResponse) and not self.answer.unload.errno:
            return self.answer.unload
        return None

    def lines(self) -> Iterator[str]:
        """Yield it as text, for evidence."""
        yield f"asked {type(self.request).__name__} {_on_one_line(self.request)}"
        yield from (f"    {attempt}" for attempt in self.attempts)
        if self.answer is not None:
            yield f"    answered {_on_one_line(self.answer)}"
        if self.other_answer is not None:
            yield f"    and then {_on_one_line(self.other_answer)}"


@dataclass(eq=False)
class StormEntry:
    """One storm, which is never asked for twice."""

    storm: pb.Storm
    attempts: list[Attempt] = field(default_factory=list)
    """The one."""

    summary: pb.StormSummary | None = None

    @property
    def workers(self) -> frozenset[str]:
        """The names of its workers, which no other storm of the round has."""
        first = self.storm.first_worker
        return frozenset(f"worker-{number}" for number in range(first, first + self.storm.workers))

    def lines(self) -> Iterator[str]:
        """Yield it as text, for evidence."""
        yield f"asked Storm {_on_one_line(self.storm)}"
        yield from (f"    {attempt}" for attempt in self.attempts)
        if self.summary is not None:
            yield f"    answered {_on_one_line(self.summary)}"


@dataclass
class Diary:
    """All that the clients of one round wrote down."""

    entries: list[Entry] = field(default_factory=list)
    storms: list[StormEntry] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """How many requests were answered."""
        return sum(e.answer is not None for e in self.entries) + sum(s.summary is not None for s in self.storms)

    @property
    def unanswered(self) -> int:
        """How many were not."""
        return len(self.entries) + len(self.storms) - self.answered

    def attempts(self) -> Iterator[Attempt]:
        """Yield each attempt that was not answered."""
        for attempts in (*(e.attempts for e in self.entries), *(s.attempts for s in self.storms)):
            yield from (attempt for attempt in attempts if attempt.status != "OK")

    def lines(self) -> Iterator[str]:
        """Yield it as text, for evidence."""
        for entry in self.entries:
            yield from entry.lines()
        for storm in self.storms:
            yield from storm.lines()


def _on_one_line(message: object) -> str:
    return " ".join(str(message).split())
