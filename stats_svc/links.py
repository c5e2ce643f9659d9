"""The links between the modules of one system: asked, answered and stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

from google.protobuf.message import DecodeError

from modpressure.errors import BadRequest, shown
from modpressure.kernel.identity import ExportedSymbol
from modpressure.kernel.links import Formation, Links, unloading
from modpressure.kernel.modules_list import PROCEED, Answer, ModulesList, State, Verdict
from modpressure.parsed_size import NotWire, shape_of
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.names import check_module_name
from stats_svc.session import Caller

MAX_EXPORTS_BYTES: Final = 1 << 20
"""Longest table of exports; the longest of a Debian kernel's modules has some 40 KiB."""

MAX_EXPORTS_PARSED_BYTES: Final = 16 * MAX_EXPORTS_BYTES
"""What it may take once it is parsed: a symbol counts for 256 bytes, and is seldom shorter than 16."""

MAX_SYMBOL_LENGTH: Final = 512
"""The kernel's own limit (include/linux/kallsyms.h, ``KSYM_NAME_LEN``); its namespaces are shorter still."""

_FOUND_BYTES: Final = 64
"""What a symbol that was found takes in an answer besides its names, about."""

MAX_PERCPU_BYTES: Final = 1 << 30
_REMEMBERED_TABLES: Final = 128
_EXPORTS: Final = shape_of(pb.Exports.DESCRIPTOR)

_STALE: Final = Answer(Verdict.FAILED, "EAGAIN")


class SystemLinks:
    """Who exports what and who uses whom on one machine."""

    def __init__(self, modules: ModulesList[Caller]) -> None:
        """``modules`` is the machine's list."""
        self.links: Links[Caller] = Links()
        self._modules = modules
        self._stored: dict[str, bytes] = {}
        self._positions: dict[str, int] = {}
        """Of each module that is formed: the place of its load among all insertions into the list."""

    def restore(self, name: str, position: int, stored: bytes) -> None:
        """Put the links of a module back as they were stored.

        BadRequest if they make no sense, or contradict what is there.
        """
        formation = _formation(name, pb.Formation.FromString(stored))
        if taken := self.links.taken(formation.exports):
            raise BadRequest(f"two modules export {shown(taken)}, one of them {shown(name)}", field="exports")
        self._form(name, position, formation, stored)

    def stored(self, name: str) -> bytes:
        """Return the links of a module as they are stored, nothing if it was not formed."""
        return self._stored.get(name, b"")

    def of(self, name: str) -> Formation:
        """Return what a module was formed with; a plain formation if it was not."""
        return self.links.of(name)

    @staticmethod
    def check(name: str, message: pb.Formation) -> None:
        """Return if links could be those of a module. BadRequest if the message makes no sense."""
        _check_names(_formation(name, message).exports)

    def has_room(self, name: str, asked: pb.ReserveName) -> bool:
        """Return whether the per-CPU variables of a module fit beside those of others, if that is asked.

        Those of one that is formed do: it is asked again.
        """
        size_bytes, room_bytes = asked.formation.percpu_bytes, asked.percpu_room_bytes
        if not size_bytes or not room_bytes or name in self._positions:
            return True
        return self.links.percpu_bytes + size_bytes <= room_bytes

    def form(self, name: str, position: int, message: pb.Formation) -> tuple[Answer, str]:
        """Form a module that is in the list as unformed; return the answer and what offended.

        BadRequest if the message makes no sense.
        """
        formation = _formation(name, message)
        _check_names(formation.exports)
        for use in message.uses:
            owner = self._modules.get(use.module)
            if owner is None or owner.state is not State.LIVE or self._positions.get(use.module) != use.position:
                return _STALE, use.module
        if taken := self.links.taken(formation.exports):
            return Answer(Verdict.FAILED, "ENOEXEC"), taken
        self._form(name, position, formation, message.SerializeToString())
        self._modules.come(name)
        return PROCEED, ""

    def _form(self, name: str, position: int, formation: Formation, stored: bytes) -> None:
        self.links.form(name, formation)
        self._positions[name] = position
        self._stored[name] = stored

    @property
    def waiting(self) -> int:
        """How many calls wait for the init function of a module that they need."""
        return self.links.waiting

    def wait(self, name: str, caller: Caller) -> Answer | None:
        """Have a call wait until the init function of a module has ended: proceed if it has, None for later."""
        owner = self._modules.get(name)
        if owner is None or owner.state is not State.COMING:
            return PROCEED
        self.links.wait(name, caller)
        return None

    def interrupt(self, caller: Caller) -> bool:
        """End the wait of a call; return whether it waited."""
        return self.links.interrupt(caller)

    def wake(self, name: str) -> list[tuple[Caller, Answer]]:
        """End the waits for a module; return who waited and what each is told."""
        return [(caller, Answer(Verdict.PROCEED, waited=True)) for caller in self.links.wake(name)]

    def unloading(self, name: str, *, forced: bool) -> Answer:
        """Say whether a module can be unloaded now, changing nothing."""
        return unloading(self._modules, self.links, name, forced=forced)

    def drop(self, name: str) -> None:
        """Forget the links of a module; nothing happens if it was not formed."""
        if self._positions.pop(name, None) is not None:
            self.links.drop(name)
            self._stored.pop(name, None)

    def tell(self, symbols: Iterable[str], result: pb.OperationResult) -> int:
        """Add to a result which of some symbols are exported by modules, and what room those take.

        Return how many bytes that told, about.
        """
        told_bytes = 0
        result.percpu_bytes = self.links.percpu_bytes
        for symbol in symbols:
            found = self.links.find(symbol)
            if found is None:
                continue
            told_bytes += _FOUND_BYTES + len(symbol) + len(found.symbol.namespace)
            owner = self._modules.get(found.owner)
            assert owner is not None, "what is formed is in the list"
            result.found.add(
                export=pb.Export(
                    symbol=symbol,
                    crc=found.symbol.crc,
                    gpl_only=found.symbol.gpl_only,
                    namespace=found.symbol.namespace,
                ),
                owner=pb.Use(module=found.owner, position=self._positions[found.owner]),
                initialising=owner.state is State.COMING,
                proprietary=found.is_proprietary,
            )
        return told_bytes


def _check_names(exports: Mapping[str, ExportedSymbol]) -> None:
    """Return if symbols and namespaces are no longer than may be: whoever asks for one is told it. BadRequest."""
    for symbol, export in exports.items():
        for text in (symbol, export.namespace):
            if len(text) > MAX_SYMBOL_LENGTH:
                raise BadRequest(f"{shown(text)} is longer than {MAX_SYMBOL_LENGTH} characters", field="exports")


def _formation(name: str, message: pb.Formation) -> Formation:
    """Return what a module brings and takes. BadRequest if the message makes no sense, whoever it comes from."""
    exports = _exports(message)
    uses = _uses(name, message)
    for owner in uses:
        check_module_name(owner)
    if not 0 <= message.percpu_bytes <= MAX_PERCPU_BYTES:
        raise BadRequest(f"percpu_bytes {message.percpu_bytes} is no size", field="percpu_bytes")
    return Formation(exports, uses, message.proprietary, message.permanent, message.percpu_bytes)


def _uses(name: str, message: pb.Formation) -> tuple[str, ...]:
    """Return the modules that a module uses. BadRequest if one of them is named twice, or is the module itself."""
    uses = tuple(use.module for use in message.uses)
    if len(set(uses)) < len(uses) or name in uses:
        raise BadRequest(f"what {shown(name)} uses is not named once each", field="uses")
    return uses


def _exports(message: pb.Formation) -> Mapping[str, ExportedSymbol]:
    if len(message.exports) > MAX_EXPORTS_BYTES:
        raise BadRequest(
            f"exports of {len(message.exports)} bytes are longer than {MAX_EXPORTS_BYTES}", field="exports"
        )
    try:
        if _EXPORTS.parsed_bytes(message.exports, MAX_EXPORTS_PARSED_BYTES) > MAX_EXPORTS_PARSED_BYTES:
            raise BadRequest(
                f"exports of {len(message.exports)} bytes have so many parts that they would take more than"
                f" {MAX_EXPORTS_PARSED_BYTES} bytes of memory",
                field="exports",
            )
        return _parsed(message.exports)
    except (DecodeError, NotWire):
        raise BadRequest("the exports are no Exports message", field="exports") from None


@lru_cache(_REMEMBERED_TABLES)
def _parsed(exports: bytes) -> Mapping[str, ExportedSymbol]:
    """Return the exports of a table. Storms form one module again and again; only the first time is worth parsing."""
    return {
        export.symbol: ExportedSymbol(export.crc if export.HasField("crc") else None, export.gpl_only, export.namespace)
        for export in pb.Exports.FromString(exports).exports
    }
