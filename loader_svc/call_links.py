"""A live call's links: what it asks stats_svc of the other modules, and says to it of its own.

Most modules export nothing and import from the kernel alone: of those nothing is asked and nothing said. One that only
exports is formed together with the insertion of its name. Whatever imports from others asks with the insertion who
exports that, resolves it here, and is formed by an operation of its own, which fails if an owner has gone meanwhile.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Iterable, Mapping
from typing import Final

from loader_svc.checks.exports import Exporter, Exporters, Nobody
from loader_svc.checks.linkage import OWNER_PATIENCE_SECONDS, Linkage
from loader_svc.checks.symbols import Resolution
from loader_svc.steps import CallSpec, Failure
from modpressure.errors import OverLimit
from modpressure.kernel.identity import ExportedSymbol
from modpressure.v1 import ledger_service_pb2 as pb

MAX_SYMBOLS_BYTES: Final = 1 << 20
"""Longest lists of symbols, imported or exported, that are taken on; stats_svc takes no longer ones."""

_REMEMBERED_TABLES: Final = 8192

_NOBODY: Final = Nobody()

Ask = Callable[[pb.Operation], Awaitable[pb.OperationResult]]


class ExportTables:
    """Exports as stats_svc takes them, made once for each version of a file."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[Mapping[str, ExportedSymbol], bytes]] = {}

    def of(self, exported: Mapping[str, ExportedSymbol], module: str) -> bytes:
        """Return the table of what ``module`` exports. OverLimit if it is too long."""
        if not exported:
            return b""
        known = self._tables.get(id(exported))
        if known is not None:
            return known[1]
        exports = [
            pb.Export(symbol=name, crc=symbol.crc, gpl_only=symbol.gpl_only, namespace=symbol.namespace)
            for name, symbol in exported.items()
        ]
        table = pb.Exports(exports=exports).SerializeToString()
        if len(table) > MAX_SYMBOLS_BYTES:
            raise OverLimit(f"{module} exports more than {MAX_SYMBOLS_BYTES} bytes of symbols")
        if len(self._tables) >= _REMEMBERED_TABLES:
            self._tables.clear()
        # The mapping is kept too, so that its id stays its own.
        self._tables[id(exported)] = (exported, table)
        return table


class _Found:
    """What stats_svc found: Exporters of that moment."""

    def __init__(self, found: Iterable[pb.FoundSymbol]) -> None:
        self._exporters: dict[str, Exporter] = {}
        self.positions: dict[str, int] = {}
        for one in found:
            export, owner = one.export, one.owner
            crc = export.crc if export.HasField("crc") else None
            symbol = ExportedSymbol(crc, export.gpl_only, export.namespace)
            self._exporters[export.symbol] = Exporter(symbol, owner.module, one.initialising, one.proprietary)
            self.positions[owner.module] = owner.position

    def find(self, name: str) -> Exporter | None:
        """Return who exports a symbol, or None."""
        return self._exporters.get(name)


class CallLinks:
    """The links of one call's module, from the insertion of its name to the start of its init function."""

    def __init__(
        self,
        linkage: Linkage,
        spec: CallSpec,
        module: str,
        tables: ExportTables,
        tree_exports: Container[str] | None,
        *,
        has_init: bool,
    ) -> None:
        """``tree_exports`` is what modules may export, None where anything has to be asked for.

        ``has_init`` says that its init function may take time or look at others, so that it has to be seen as coming.
        OverLimit if it wants or exports too much.
        """
        self._linkage = linkage
        self._spec = spec
        self._module = module
        self._tables = tables
        self._has_init = has_init
        self._wanted = linkage.foreign
        if tree_exports is not None:
            self._wanted = tuple(symbol for symbol in linkage.foreign if symbol in tree_exports)
        if sum(map(len, self._wanted)) > MAX_SYMBOLS_BYTES:
            raise OverLimit(f"{module} imports more than {MAX_SYMBOLS_BYTES} bytes of symbols")
        self._others: Exporters = _NOBODY
        self._positions: dict[str, int] = {}
        self._percpu_bytes = 0
        self._taken = ""
        self._is_good = False
        """Whether nothing fails before its forming, as far as that was clear with the insertion of its name."""

        self.formed = False
        """Whether it is formed, so that others may have linked to it."""

    def reservation(self) -> pb.ReserveName:
        """Return what is asked with the insertion of the name."""
        reserve = pb.ReserveName(module=self._module, symbols=self._wanted)
        linkage = self._linkage
        if self._wanted:
            return reserve
        if linkage.percpu_bytes:
            reserve.percpu_room_bytes = linkage.identity.percpu_reserve_bytes
        resolution = linkage.resolve(_NOBODY)
        failure = (
            linkage.failure_before_symbols()
            or resolution.failure
            or linkage.failure_before_forming(self._spec, _NOBODY)
        )
        self._is_good = failure is None
        if self._is_good and self._is_linked(resolution):
            reserve.formation.CopyFrom(self._formation(resolution))
        return reserve

    def reserved(self, asked: pb.ReserveName, result: pb.OperationResult) -> None:
        """Take the answer to that, where it is to proceed."""
        self._learn(result)
        if asked.HasField("formation"):
            self._taken = result.value
            self.formed = not result.errno
            # If it is per-CPU room that is missing, that is found again, and told, before its forming.
            self._is_good = self.formed or bool(self._taken)

    def _learn(self, result: pb.OperationResult) -> None:
        self._percpu_bytes = result.percpu_bytes
        if result.found:
            found = _Found(result.found)
            self._others, self._positions = found, found.positions
        else:
            self._others, self._positions = _NOBODY, {}

    async def link(self, ask: Ask, await_init: Callable[[str, float], Awaitable[bool]]) -> Failure | None:
        """Link the module to the others and form it; return what fails.

        ``await_init`` waits for the init function of a module for so many seconds, and returns whether that has ended.
        """
        linkage, spec = self._linkage, self._spec
        if self._is_good:
            return self._failure_after_forming()
        failure = linkage.failure_before_symbols(self._percpu_bytes)
        if failure:
            return failure
        given_up: frozenset[str] = frozenset()
        while True:
            resolution = linkage.resolve(self._others, given_up)
            if resolution.awaits:
                if not await await_init(resolution.awaits, OWNER_PATIENCE_SECONDS):
                    given_up |= {resolution.awaits}
                await self._find(ask)
                continue
            failure = resolution.failure or linkage.failure_before_forming(spec, _NOBODY)
            if failure:
                return failure
            if self._is_linked(resolution) and not self.formed and not self._taken:
                message = pb.FormModule(module=self._module, formation=self._formation(resolution))
                result = await ask(pb.Operation(form_module=message))
                if result.errno == "EAGAIN":
                    await self._find(ask)
                    continue
                self._taken = result.value
                self.formed = not result.value
            return self._failure_after_forming()

    def _failure_after_forming(self) -> Failure | None:
        if self._taken:
            return Failure("ENOEXEC", "exports: taken", self._taken)
        return self._linkage.failure_after_forming(self._spec)

    async def _find(self, ask: Ask) -> None:
        self._learn(await ask(pb.Operation(find_symbols=pb.FindSymbols(symbols=self._wanted))))

    def _is_linked(self, resolution: Resolution) -> bool:
        """Whether anybody else can tell that the module was formed."""
        linkage = self._linkage
        return bool(
            linkage.exported or resolution.uses or linkage.percpu_bytes or not linkage.can_be_unloaded or self._has_init
        )

    def _formation(self, resolution: Resolution) -> pb.Formation:
        formation = self._linkage.formation(resolution)
        return pb.Formation(
            exports=self._tables.of(formation.exports, self._module),
            uses=[pb.Use(module=owner, position=self._positions[owner]) for owner in formation.uses],
            proprietary=formation.is_proprietary,
            permanent=formation.is_permanent,
            percpu_bytes=formation.percpu_bytes,
        )
