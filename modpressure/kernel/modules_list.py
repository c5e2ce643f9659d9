"""The modules list: who owns a name, and who waits for it.

The rules are those of ``module_patient_check_exists`` and ``add_unformed_module`` (kernel/module/main.c, Linux 6.12): a
name that is unformed or coming is waited for; once it is live, going or gone the waiter looks once more, and fails with
EEXIST if the module is live, with EBUSY if not. A waiter never takes the name over: it found it taken once, and that
decides.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from typing import Generic, NamedTuple, TypeVar

Caller = TypeVar("Caller", bound=Hashable)
"""Whatever tells one call from another; it need only be hashable."""


class State(IntEnum):
    """How far a module is. The numbers are those of ``modpressure.v1.LoadedModule.State``."""

    UNFORMED = 1
    COMING = 2
    LIVE = 3
    GOING = 4


class Verdict(Enum):
    """How a call goes on."""

    PROCEED = auto()
    DUPLICATE = auto()
    SHARED = auto()
    INTERRUPTED = auto()
    FAILED = auto()

    # Each member is one object; Enum's own hash is that of its name, and takes ten times as long.
    __hash__ = object.__hash__


class Answer(NamedTuple):
    """What a call is told."""

    verdict: Verdict
    errno: str = ""
    """Name of the errno that goes with it, empty for none."""

    waited: bool = False
    """True if the call had to wait for another one."""

    exit_status: int = 0
    """Of the modprobe whose result is shared; 0 elsewhere."""


PROCEED = Answer(Verdict.PROCEED)
EXISTS = Answer(Verdict.DUPLICATE, "EEXIST")
BUSY = Answer(Verdict.DUPLICATE, "EBUSY")
EXISTS_AFTER_WAIT = Answer(Verdict.DUPLICATE, "EEXIST", waited=True)
BUSY_AFTER_WAIT = Answer(Verdict.DUPLICATE, "EBUSY", waited=True)


@dataclass(slots=True)
class Entry(Generic[Caller]):
    """A name in the list."""

    name: str
    state: State
    owner: Caller
    core_bytes: int = 0
    waiters: dict[Caller, None] = field(default_factory=dict)
    """In the order in which they came; a dict so that an interrupted one leaves at once."""


class ModulesList(Generic[Caller]):
    """The names that are loaded or being loaded, newest first, and the calls that wait for them.

    A method that may have to wait returns None for "later"; the answer then comes out of the method that ends the
    wait, as pairs of caller and answer.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry[Caller]] = {}
        self._waits: dict[Caller, str] = {}

    def __iter__(self) -> Iterator[Entry[Caller]]:
        """Entries, newest first, as /proc/modules has them."""
        return reversed(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> Entry[Caller] | None:
        """Return the entry of ``name``, or None."""
        return self._entries.get(name)

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return len(self._waits)

    def restore(self, name: str, state: State, owner: Caller, core_bytes: int) -> None:
        """Put an entry back as it was stored, as the newest."""
        self._entries[name] = Entry(name, state, owner, core_bytes)

    def look(self, name: str) -> Answer | None:
        """Say what a call that looks for ``name`` is told: go on, a duplicate, or None if it is to wait."""
        entry = self._entries.get(name)
        if entry is None:
            return PROCEED
        if entry.state is State.LIVE:
            return EXISTS
        return BUSY if entry.state is State.GOING else None

    def look_again(self, name: str) -> Answer | None:
        """Say what a call that waited for ``name`` is told when it looks once more; None if it is to wait on.

        It found the name taken, and that decides: it is a duplicate even if the name is free by now.
        """
        entry = self._entries.get(name)
        if entry is None or entry.state is State.GOING:
            return BUSY_AFTER_WAIT
        return EXISTS_AFTER_WAIT if entry.state is State.LIVE else None

    def check(self, name: str, caller: Caller) -> Answer | None:
        """Look for ``name`` before the layout is allocated (step "becoming"): go on, a duplicate, or None for later."""
        answer = self.look(name)
        if answer is None:
            self._wait(name, caller)
        return answer

    def reserve(self, name: str, caller: Caller) -> Answer | None:
        """Insert ``name`` as unformed and owned by ``caller`` (step "load"): go on, a duplicate, or None for later.

        Asking again with the same caller gives the same answer, so that a lost answer can be asked for again, as long
        as the module is not live.
        """
        entry = self._entries.get(name)
        if entry is None:
            self._entries[name] = Entry(name, State.UNFORMED, caller)
            return PROCEED
        if entry.owner == caller and entry.state in (State.UNFORMED, State.COMING):
            return PROCEED
        answer = self.look(name)
        if answer is None:
            self._wait(name, caller)
        return answer

    def _wait(self, name: str, caller: Caller) -> None:
        if self._waits.get(caller, name) != name:
            # A caller waits for one thing at a time; one that asks for another has given the first up.
            self.interrupt(caller)
        self._entries[name].waiters[caller] = None
        self._waits[caller] = name

    def come(self, name: str) -> None:
        """Note that ``name`` is formed and its init runs. KeyError if it is not in the list."""
        self._entries[name].state = State.COMING

    def go(self, name: str) -> None:
        """Note that ``name`` is being unloaded: its exit function runs. KeyError if it is not in the list."""
        self._entries[name].state = State.GOING

    def live(self, name: str, core_bytes: int) -> list[tuple[Caller, Answer]]:
        """Make ``name`` live; return who waited for it and what each is told. KeyError if it is not in the list."""
        entry = self._entries[name]
        entry.state = State.LIVE
        entry.core_bytes = core_bytes
        return self._wake(entry, EXISTS_AFTER_WAIT)

    def remove(self, name: str) -> list[tuple[Caller, Answer]]:
        """Take ``name`` out, loaded or given up; return who waited and what each is told. KeyError if not there."""
        return self._wake(self._entries.pop(name), BUSY_AFTER_WAIT)

    def _wake(self, entry: Entry[Caller], answer: Answer) -> list[tuple[Caller, Answer]]:
        woken = list(entry.waiters)
        entry.waiters.clear()
        for caller in woken:
            del self._waits[caller]
        return [(caller, answer) for caller in woken]

    def interrupt(self, caller: Caller) -> bool:
        """End the wait of ``caller``; return whether it waited. It is for the caller to tell it EINTR."""
        name = self._waits.pop(caller, None)
        if name is None:
            return False
        del self._entries[name].waiters[caller]
        return True

    def unload(self, name: str) -> Answer:
        """Say whether ``name`` can be unloaded now, changing nothing: proceed, or failed with ENOENT or EBUSY.

        delete_module(2): ENOENT if there is no such module or it is not formed yet (``find_module`` passes over it),
        EBUSY if it is not live (kernel/module/main.c). ``links.unloading`` also looks at who uses it.
        """
        entry = self._entries.get(name)
        if entry is None or entry.state is State.UNFORMED:
            return Answer(Verdict.FAILED, "ENOENT")
        return PROCEED if entry.state is State.LIVE else Answer(Verdict.FAILED, "EBUSY")
