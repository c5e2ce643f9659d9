"""All systems: what is stored of them taken over, and what an administrator does with them."""

from __future__ import annotations

from typing import Final

from modpressure.errors import AlreadyExists, BadRequest, ModpressureError, NotFound, NotNow, OverLimit, Overloaded
from modpressure.kernel.system_memory import Amounts
from modpressure.v1 import call_pb2
from stats_svc.group import Group
from stats_svc.names import check_system_id
from stats_svc.rows import Snapshot, SystemRow, SystemSnapshot
from stats_svc.system import MAX_COUNTED_BYTES, System

IMPORTS: Final = 2
"""Systems that are imported at once."""

IMPORT_RETRY_SECONDS: Final = 5.0

DEFAULT_SYSTEM: Final = "default"
"""The system that there is always, and that is meant where none is said."""

DEFAULT_POLICY: Final = call_pb2.POLICY_V6_4
"""Number of ``modpressure.kernel.policy.DEFAULT_POLICY``."""


class Systems(dict[str, System]):
    """All systems, by their ids."""

    def __init__(self, snapshot: Snapshot, limit: int = 0) -> None:
        """Take over what is stored, however much that is; none is created beyond ``limit``, 0 is no limit."""
        super().__init__({row.id: System(row) for row in snapshot.systems})
        for row in snapshot.modules:
            self[row.system].restore(row)
        for system, requesters in snapshot.requesters.items():
            self[system].restore_requesters(requesters)
        for held in snapshot.held:
            self[held.system].restore_held(held)
        for claim in snapshot.claims:
            self[claim.system].claims.restore(claim)
        self._limit = limit
        self.queued: dict[str, System] = {}
        """Those with requests of the kernel that wait for a place."""

        self._imported: set[str] = set()
        """Ids of systems that are being imported: none is created that is called so."""

    @property
    def next_expiry_ns(self) -> int | None:
        """When a request that waits for a place will have waited for too long; None if none waits."""
        times_ns = [at for system in self.queued.values() if (at := system.autoload.next_expiry_ns) is not None]
        return min(times_ns, default=None)

    def create(self, group: Group, system_id: str, policy: int, now_ns: int, limits: Amounts | None = None) -> System:
        """Create a system.

        BadRequest if that can't be an id, AlreadyExists if there is one of that id, OverLimit if there are as many as
        there may be.
        """
        check_system_id(system_id)
        if system_id in self:
            raise AlreadyExists(f"there is a system {system_id!r} already")
        self._check_not_imported(system_id)
        self._check_room(system_id)
        row = SystemRow(system_id, policy, create_time_ns=now_ns, limits=limits)
        group.create(row)
        system = self[system_id] = System(row)
        return system

    def reset(self, group: Group, system_id: str, now_ns: int) -> System:
        """Reset a system as a reboot would. NotFound if there is none, NotNow while calls are in flight."""
        system = self._idle(system_id, "reset")
        group.released += [entry.owner for entry in system.modules]
        group.reset(system_id, now_ns)
        system.clear()
        system.reset_time_ns = now_ns
        return system

    def delete(self, group: Group, system_id: str) -> None:
        """Delete a system. NotFound if there is none, NotNow while calls are in flight."""
        system = self._idle(system_id, "deleted")
        group.released += [entry.owner for entry in system.modules]
        group.delete(system_id)
        del self[system_id]
        self.queued.pop(system_id, None)

    def begin_import(self, system_id: str, *, replace: bool) -> None:
        """Keep an id for a system that is being imported, until ``end_import``.

        BadRequest if that can't be an id; AlreadyExists if there is one, unless it is to be replaced, and NotNow while
        calls are in flight in that; OverLimit if there are as many as there may be, Overloaded while as many are
        imported as may be at once.
        """
        self._check_not_imported(check_system_id(system_id))
        if system_id in self:
            if not replace:
                raise AlreadyExists(f"there is a system {system_id!r} already")
            self._idle(system_id, "replaced")
        else:
            self._check_room(system_id)
        if len(self._imported) >= IMPORTS:
            raise Overloaded(
                f"{len(self._imported)} systems are being imported, which is as many as there may be at once",
                retry_seconds=IMPORT_RETRY_SECONDS,
            )
        self._imported.add(system_id)

    def end_import(self, system_id: str) -> None:
        """Let go of an id."""
        self._imported.discard(system_id)

    def take_out(self, system_id: str) -> System | None:
        """Have no system of an id that is kept, so that nobody comes in between; return what there was of it.

        NotNow while calls are in flight in that.
        """
        replaced = self._idle(system_id, "replaced") if system_id in self else None
        self.pop(system_id, None)
        self.queued.pop(system_id, None)
        return replaced

    def put_in(self, group: Group, system_id: str, imported: SystemSnapshot, replaced: System | None) -> None:
        """Take over a system that was imported, in place of what was taken out."""
        self[system_id] = _restored(imported)
        # Loaders know what was there before.
        group.deleted_systems.append(system_id)
        group.touched.add(system_id)
        if replaced is not None:
            group.released += [entry.owner for entry in replaced.modules]

    def _check_not_imported(self, system_id: str) -> None:
        if system_id in self._imported:
            raise NotNow(f"system {system_id!r} is being imported")

    def _check_room(self, system_id: str) -> None:
        """Return if there may be one more. OverLimit if not."""
        count = len(self) + sum(imported not in self for imported in self._imported)
        # Without the default one, no stats_svc would start any more.
        if self._limit and count >= self._limit and system_id != DEFAULT_SYSTEM:
            raise OverLimit(
                f"system {system_id!r} can't be created: there are {count} systems, and stats_svc's system_limit is"
                f" {self._limit}",
                field="system",
            )

    def _idle(self, system_id: str, what: str) -> System:
        system = self.get(check_system_id(system_id))
        if system is None:
            raise NotFound(f"there is no system {system_id!r}")
        if system.has_calls_in_flight:
            raise NotNow(f"system {system_id!r} can't be {what} while calls are in flight")
        return system


def _restored(snapshot: SystemSnapshot) -> System:
    system = System(snapshot.row)
    for row in snapshot.modules:
        system.restore(row)
    system.restore_requesters(snapshot.requesters)
    for held in snapshot.held:
        system.restore_held(held)
    return system


def check_imported(snapshot: SystemSnapshot) -> None:
    """Return if a system can be what a file makes of it. BadRequest if not: no start could load it either."""
    try:
        system = _restored(snapshot)
    except Exception as error:
        reason = error.sentence if isinstance(error, ModpressureError) else "its rows contradict each other"
        raise BadRequest(f"the file can't be imported: {reason}", field="chunk") from error
    taken = () if system.memory is None else system.memory.account.taken
    if system.has_calls_in_flight or any(amount > MAX_COUNTED_BYTES for amount in taken):
        raise BadRequest("the file can't be imported: its memory is held by nobody, or too much", field="chunk")
