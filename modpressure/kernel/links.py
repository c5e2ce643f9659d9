"""The links between modules: what each one exports, which ones it uses, and who waits until it can be used.

The rules are those of ``ref_module``, ``find_symbol``, ``resolve_symbol_wait``, ``module_unload_free`` and
``delete_module`` (kernel/module/main.c, Linux 6.12): a module that is formed keeps those it uses from being unloaded,
by force or not, until it is gone itself; its exports are found from then on too, but are of use only once its init
function has returned.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

from modpressure.kernel.identity import ExportedSymbol
from modpressure.kernel.modules_list import Answer, ModulesList, Verdict

Caller = TypeVar("Caller", bound=Hashable)
"""Whatever tells one call from another; it need only be hashable."""


@dataclass(frozen=True, slots=True)
class Formation:
    """What a module brings to, and takes from, the others when it is formed."""

    exports: Mapping[str, ExportedSymbol] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    """The modules that it uses, each once."""

    is_proprietary: bool = False
    """Whether it counts as proprietary, by its licence or by a module that it uses."""

    is_permanent: bool = False
    """Whether it has an init function and no exit function, so that only force unloads it."""

    percpu_bytes: int = 0
    """Its part of the room for the static per-CPU variables of modules."""


PLAIN: Final = Formation()
"""A module without links."""


class Found(NamedTuple):
    """A symbol, and the module that exports it."""

    owner: str
    symbol: ExportedSymbol
    is_proprietary: bool


class Links(Generic[Caller]):
    """The modules that are formed, as far as they are linked, and the calls that wait for one's init function."""

    def __init__(self) -> None:
        self._formations: dict[str, Formation] = {}
        self._exporters: dict[str, str] = {}
        self._users: dict[str, dict[str, None]] = {}
        self._waiters: dict[str, dict[Caller, None]] = {}
        self._waits: dict[Caller, str] = {}
        self.percpu_bytes = 0
        """What the modules take of the room for static per-CPU variables."""

    def __contains__(self, name: str) -> bool:
        return name in self._formations

    def __iter__(self) -> Iterator[str]:
        """Names of the modules that are formed, in the order in which they were."""
        return iter(self._formations)

    def __len__(self) -> int:
        return len(self._formations)

    def of(self, name: str) -> Formation:
        """Return what ``name`` was formed with; a plain formation if it was not."""
        return self._formations.get(name, PLAIN)

    def find(self, symbol: str) -> Found | None:
        """Return which module exports ``symbol``, or None."""
        owner = self._exporters.get(symbol)
        if owner is None:
            return None
        formation = self._formations[owner]
        return Found(owner, formation.exports[symbol], formation.is_proprietary)

    def taken(self, exports: Iterable[str]) -> str:
        """Return the first of some symbols that a module exports already, empty if there is none."""
        return next((symbol for symbol in exports if symbol in self._exporters), "")

    def users(self, name: str) -> tuple[str, ...]:
        """Return the modules that use ``name``, newest first, as /proc/modules has them."""
        return tuple(reversed(self._users.get(name, {})))

    def form(self, name: str, formation: Formation) -> None:
        """Link a module to the others. KeyError if it is linked already."""
        if name in self._formations:
            raise KeyError(name)
        self._formations[name] = formation
        for symbol in formation.exports:
            self._exporters[symbol] = name
        for owner in formation.uses:
            self._users.setdefault(owner, {})[name] = None
        self.percpu_bytes += formation.percpu_bytes

    def drop(self, name: str) -> None:
        """Forget what a module exports and uses; nothing happens if it was not formed."""
        formation = self._formations.pop(name, None)
        if formation is None:
            return
        for symbol in formation.exports:
            del self._exporters[symbol]
        for owner in formation.uses:
            users = self._users[owner]
            del users[name]
            if not users:
                del self._users[owner]
        self.percpu_bytes -= formation.percpu_bytes

    # --- waiting for an init function ---

    @property
    def waiting(self) -> int:
        """How many calls wait for the init function of a module that they need."""
        return len(self._waits)

    def wait(self, owner: str, caller: Caller) -> None:
        """Have a call wait until the init function of ``owner`` has ended, however it ends, and for no other one."""
        if self._waits.get(caller, owner) != owner:
            self.interrupt(caller)
        self._waiters.setdefault(owner, {})[caller] = None
        self._waits[caller] = owner

    def awaited_by(self, caller: Caller) -> str:
        """Return the module whose init function a call waits for, empty if it waits for none."""
        return self._waits.get(caller, "")

    def interrupt(self, caller: Caller) -> bool:
        """End the wait of a call, by a signal or out of patience; return whether it waited."""
        owner = self._waits.pop(caller, None)
        if owner is None:
            return False
        waiters = self._waiters[owner]
        del waiters[caller]
        if not waiters:
            del self._waiters[owner]
        return True

    def wake(self, owner: str) -> list[Caller]:
        """End the waits for ``owner``, whose init function has ended; return who waited, in the order they came."""
        woken = list(self._waiters.pop(owner, ()))
        for caller in woken:
            del self._waits[caller]
        return woken


def unloading(modules: ModulesList[Caller], links: Links[Caller], name: str, *, forced: bool) -> Answer:
    """Say whether delete_module(2) removes ``name`` now, changing nothing: proceed, or failed with an errno.

    In the kernel's order: ENOENT if there is no such module, EWOULDBLOCK while another one uses it, forced or not,
    EBUSY if it is not live, EBUSY if it can't be unloaded but by force.
    """
    answer = modules.unload(name)
    if answer.errno != "ENOENT" and links.users(name):
        return Answer(Verdict.FAILED, "EWOULDBLOCK")
    if answer.verdict is Verdict.PROCEED and links.of(name).is_permanent and not forced:
        return Answer(Verdict.FAILED, "EBUSY")
    return answer
