"""Which of several stats_svc over one PostgreSQL database writes to it, and that no other does.

The one row of ``modpressure`` says who leads (``leader``, ``leader_address``), under which ``epoch``, and what number
its last commit had (``commits``). Each commit of the leader first moves that number on, where the epoch is still its
own. So the row is three things in one:

- a fence: whoever was deposed, while paused or cut off, finds another epoch and commits nothing;
- a heartbeat: who stands by takes over when the row has not changed for ``lead_seconds``, by its own steady clock, so
  nobody's clock has to be right; the leader commits nothing, if need be, to be heard;
- a receipt: if the connection broke during a commit, the number tells whether it was made.

A leader that has not been heard for that long can't know whether it still leads (``is_certain``): it answers nothing
from memory before it has asked. A graceful end gives the lead up at once.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from stats_svc import schema
from stats_svc.location import check_version
from stats_svc.rows import StandingBy

DEFAULT_LEAD_SECONDS: Final = 3.0

_about = schema.about.c
_of_this_version = _about.schema_version == schema.SCHEMA_VERSION
_look = sa.select(_about.epoch, _about.commits, _about.leader, _about.leader_address, _about.schema_version)
_take = (
    sa.update(schema.about)
    .where(_of_this_version, _about.epoch == sa.bindparam("the_epoch"), _about.commits == sa.bindparam("the_commits"))
    .values(
        epoch=sa.bindparam("new_epoch"),
        commits=0,
        leader=sa.bindparam("me"),
        leader_address=sa.bindparam("my_address"),
    )
)
_move_on = (
    sa.update(schema.about)
    .where(
        _of_this_version,
        _about.epoch == sa.bindparam("the_epoch"),
        _about.commits == sa.bindparam("the_commits") - 1,
    )
    .values(commits=sa.bindparam("the_commits"), leader_address=sa.bindparam("my_address"))
)
_give_up = sa.update(schema.about).where(_about.epoch == sa.bindparam("the_epoch")).values(leader="", leader_address="")


class Leadership:
    """One stats_svc's part in it. For one thread at a time, but for ``is_certain``, ``address`` and ``leader_id``."""

    def __init__(
        self, database: str, lead_seconds: float = DEFAULT_LEAD_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare; ``database`` is what sentences call it."""
        self.lead_seconds = lead_seconds
        self.address = ""
        """Where others reach this one; may be set at any time, and is told with the next commit."""

        self.leader_id = ""
        """Who leads, as far as that is known: what only those know who can read the database."""

        self._database = database
        self._clock = clock
        self._me = uuid.uuid4().hex
        self._epoch = 0
        self._commits = 0
        self._heard = float("-inf")
        """When what was last committed had been begun: until then, at least, nobody else led."""

        self._seen: tuple[int, int] | None = None
        """Epoch and commits of another leader, when they were last seen to change."""

        self._seen_at = 0.0

    @property
    def is_certain(self) -> bool:
        """Whether nobody else can have taken over."""
        return self._clock() - self._heard < self.lead_seconds

    def take(self, connection: Connection) -> None:
        """Lead from the commit of this transaction on. StandingBy if another does, or did until a moment ago."""
        now = self._clock()
        row = connection.execute(_look).one()
        check_version(self._database, row.schema_version)
        seen = (row.epoch, row.commits)
        self.leader_id = row.leader
        if row.leader not in ("", self._me):
            if seen != self._seen:
                is_alive = self._seen is not None
                self._seen, self._seen_at = seen, now
                raise self._standing_by(row.leader_address, is_alive=is_alive)
            if now - self._seen_at < self.lead_seconds:
                raise self._standing_by(row.leader_address)
        values = {"me": self._me, "my_address": self.address, "new_epoch": row.epoch + 1}
        taken = connection.execute(_take, {"the_epoch": row.epoch, "the_commits": row.commits, **values})
        if taken.rowcount != 1:
            raise self._standing_by("")
        self._seen = None
        self._epoch, self._commits, self._heard, self.leader_id = row.epoch + 1, 0, now, self._me

    def move_on(self, connection: Connection) -> float:
        """Begin a commit; hand what is returned to ``moved_on`` once it is made. Deposed if another leads."""
        now = self._clock()
        values = {"the_epoch": self._epoch, "the_commits": self._commits + 1, "my_address": self.address}
        if connection.execute(_move_on, values).rowcount != 1:
            row = connection.execute(_look).one()
            check_version(self._database, row.schema_version)
            self._seen, self.leader_id = None, row.leader
            raise self._standing_by(row.leader_address)
        return now

    def moved_on(self, begun: float) -> None:
        """Note that the commit is made that was begun then."""
        self._commits += 1
        self._heard = begun

    def was_made(self, connection: Connection) -> bool:
        """Return whether the commit that was begun last was made, when its answer got lost."""
        row = connection.execute(_look).one()
        return (row.epoch, row.commits) == (self._epoch, self._commits + 1)

    def give_up(self, connection: Connection) -> None:
        """Let whoever stands by take over at once, if this one leads."""
        connection.execute(_give_up, {"the_epoch": self._epoch})

    def _standing_by(self, address: str, *, is_alive: bool = False) -> StandingBy:
        where = f" at {address}" if address else ""
        return StandingBy(f"{self._database} is written to by another stats_svc{where}", address, is_alive=is_alive)
