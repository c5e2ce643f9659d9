"""Files as a simulated machine has them: what becomes of each, and what each step with it takes, found out once."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from loader_svc.checks import caller
from loader_svc.image import Algorithm, algorithm_of
from loader_svc.memory import page_round
from loader_svc.plan import Plan, Plans
from loader_svc.steps import Allocate, CallSpec, Decompress, Finish, Inspect, Inspected, Read, Step, Unpack
from loader_svc.virtual.areas import Freed, Held
from loader_svc.virtual.costs import Costs
from loader_svc.virtual.route import Node
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Outcome, Syscall

PAGE_BYTES: Final = 4096

MEMORY_BYTES: Final = 64 << 30
"""Memory of the simulated machine, as far as a single absurd allocation goes."""

LINK_FLUSHES: Final = 2
"""How many times the TLBs of all CPUs are flushed when a module's memory is protected (``module_enable_text_rox`` and
``module_enable_rodata_ro``, kernel/module/strict_rwx.c, Linux 6.12)."""


class VirtualFile:
    """A file that modules are loaded from. It must not change while a machine has it."""

    __slots__ = ("_packing", "_plans", "open", "path")

    def __init__(self, path: str, open: Callable[[], int], packing: Algorithm | None = None) -> None:
        """``path`` is for messages; ``open`` returns a new descriptor, which is closed here.

        ``packing`` is how callers of init_module unpack it before; None if they hand it over as it is.
        """
        self._packing = packing
        self.path = path
        self.open = open
        self._plans: dict[tuple[Plans, bool, int], tuple[Plan, Algorithm | None]] = {}

    def plan(self, plans: Plans, spec: CallSpec) -> tuple[Plan, Algorithm | None]:
        """Return what becomes of the file in a call, and how it is decompressed; the file is opened once.

        OverLimit; OSError or ModpressureError if it can't be opened.
        """
        by_kernel = spec.syscall is Syscall.FINIT_MODULE
        key = (plans, by_kernel, spec.flags)
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = self._plan(plans, by_kernel=by_kernel, flags=spec.flags)
        return found

    def _plan(self, plans: Plans, *, by_kernel: bool, flags: int) -> tuple[Plan, Algorithm | None]:
        descriptor = self.open()
        try:
            algorithm = None if by_kernel else self._packing
            if flags & MODULE_INIT_COMPRESSED_FILE:
                packed = algorithm_of(self.path, _head(descriptor))
                algorithm = plans.identity.decompressor_for(packed)  # type: ignore[assignment]
            return plans.of(descriptor, self.path, algorithm, by_kernel=by_kernel, flags=flags), algorithm
        finally:
            os.close(descriptor)


class Loadable:
    """A file as calls of one kind load it: its sizes in whole pages, what each step takes in ns, and the ways through.

    Times are without what depends on the moment: waits, and chance.
    """

    def __init__(
        self, file: VirtualFile, plans: Plans, spec: CallSpec, costs: Costs, cpus: int, *, knows: tuple[type, ...] = ()
    ) -> None:
        """``cpus`` is how many CPUs a flush of all TLBs reaches; ``knows`` are the steps that need no carrying out.

        OverLimit, OSError.
        """
        self.file = file
        self.spec = spec
        self.plan, self.algorithm = plan, algorithm = file.plan(plans, spec)
        self.module = plan.module
        self.is_gated = spec.gated
        self.is_finit = by_kernel = spec.syscall is Syscall.FINIT_MODULE
        layout = plan.layout
        file_bytes = plan.version.size_bytes
        # What the call itself reads or copies: the file, or the image that it is handed.
        told_bytes = spec.caller.length_bytes
        self.length_bytes = plan.unpacked_bytes if told_bytes is None else told_bytes
        """The length that init_module is told."""
        copied_bytes = file_bytes if by_kernel else self.length_bytes
        self.read_bytes = page_round(copied_bytes)
        self.unpacked_bytes = page_round(plan.unpacked_bytes)
        self.core_bytes = layout.core_bytes if layout else 0
        self.init_bytes = layout.init_bytes if layout else 0
        self.layout_bytes = self.core_bytes + self.init_bytes
        self.image_bytes = plan.image_bytes
        self.compressed_bytes = file_bytes if spec.flags & MODULE_INIT_COMPRESSED_FILE else 0
        self.text_bytes = layout.text_bytes if layout else 0
        if by_kernel:
            self.read_failure = caller.read_failure(spec, plan.failure_at("read"))
        else:
            self.read_failure = caller.copy_failure(spec, self.length_bytes, MEMORY_BYTES)
        # --- what it takes ---
        unpack_ns = 0.0
        if algorithm is not None:
            unpack_ns = costs.decompress_ns_per_byte(algorithm) * plan.unpacked_bytes
        read_ns = costs.read_cached_ns_per_byte * file_bytes
        self._unpack_ns = int(read_ns + unpack_ns) + costs.open_ns
        self.inspect_ns = costs.inspect_ns
        self.inspected = plan.failure_at("check") or Inspected(plan.module)
        self._knows = knows
        self.read_failure_ns = costs.syscall_ns
        copy_ns = read_ns if by_kernel else costs.copy_user_ns_per_byte * min(copied_bytes, plan.unpacked_bytes)
        self.read_area = Area(costs, 1, self.read_bytes)
        self.read_ns = costs.syscall_ns + (costs.open_ns if by_kernel else 0) + int(copy_ns) + self.read_area.ns
        self.unpacked_area = Area(costs, 1, self.unpacked_bytes)
        self.decompress_ns = int(unpack_ns) + self.unpacked_area.ns
        areas = sum(bool(size) for size in layout.rounded) if layout else 0
        self.layout_area = Area(costs, areas, self.layout_bytes)
        self.allocate_ns = int(costs.copy_ns_per_byte * self.layout_bytes) + self.layout_area.ns
        flush_ns = costs.flush_ns + cpus * costs.flush_ns_per_cpu
        self.static_calls = plan.linkage.static_calls if plan.linkage is not None else 0
        self.link_ns = costs.link.get(plan.module, costs.link_ns) + LINK_FLUSHES * flush_ns
        if plan.linkage is not None and plan.module not in costs.link:
            self.link_ns += plan.linkage.imports * costs.import_ns
            self.link_ns += plan.linkage.symbols * costs.symbol_ns
            self.link_ns += plan.linkage.relocations * costs.relocation_ns
        self.tail_ns = costs.live_tail_ns + flush_ns
        pages = (self.unpacked_bytes if self.compressed_bytes else self.read_bytes) // PAGE_BYTES
        self.free_image_ns = pages * costs.free_page_ns
        self.free_core_ns = self.core_bytes // PAGE_BYTES * costs.free_page_ns
        self.free_init_ns = self.init_bytes // PAGE_BYTES * costs.free_page_ns
        self.first = Node.first(self)
        """The beginning of the ways that its calls take."""

    def known(self, step: Step) -> tuple[bool, Any, int]:
        """Say whose answer is known: the file decides it alone; or nothing does, as with freeing."""
        if not isinstance(step, self._knows):
            return False, None, 0
        if isinstance(step, Unpack):
            return True, self.plan.failure_at("decompress"), self._unpack_ns
        if isinstance(step, Inspect):
            return True, self.inspected, self.inspect_ns
        return True, None, 0

    def held_after(self, held: Held, step: Step | None, answer: Any) -> Held:
        """Return what a call holds that held something before a step that came to an answer; frees aside."""
        if isinstance(step, Finish) and step.ending.outcome is Outcome.LIVE:
            # From here on it is the module's memory and no longer the call's.
            return held._replace(core_bytes=0)
        if answer is not None:
            return held
        if isinstance(step, Read):
            held = held._replace(copy_bytes=self.read_bytes)
        elif isinstance(step, Decompress):
            # While it goes on there are both.
            both_bytes = self.read_bytes + self.unpacked_bytes
            return held._replace(copy_bytes=self.unpacked_bytes, peak_bytes=max(held.peak_bytes, both_bytes))
        elif isinstance(step, Allocate):
            held = held._replace(core_bytes=self.core_bytes, init_bytes=self.init_bytes)
        return held._replace(peak_bytes=max(held.peak_bytes, held.size_bytes))

    def freed(self, held: Held, what: str) -> tuple[Freed, Held]:
        """Return what a call frees by ``Free(what)``, and what it holds then."""
        left = held
        ns = 0
        if what != "init" and held.copy_bytes:
            left, ns = left._replace(copy_bytes=0), ns + self.free_image_ns
        if what != "image" and held.init_bytes:
            left, ns = left._replace(init_bytes=0), ns + self.free_init_ns
        if what == "all" and held.core_bytes:
            left, ns = left._replace(core_bytes=0), ns + self.free_core_ns
        copy_bytes = held.copy_bytes - left.copy_bytes
        return Freed(copy_bytes, held.size_bytes - left.size_bytes, ns, left.core_bytes < held.core_bytes), left


class Area:
    """What it takes to allocate areas of some size together."""

    __slots__ = ("area_lock_ns", "ns", "page_lock_ns")

    def __init__(self, costs: Costs, areas: int, size_bytes: int) -> None:
        pages = size_bytes // PAGE_BYTES
        self.area_lock_ns = areas * costs.allocate_lock_ns
        """For how long the lock of the areas is held."""
        self.page_lock_ns = pages * costs.page_lock_ns
        """For how long the lock of the zone is held."""
        self.ns = areas * costs.allocate_ns + pages * costs.page_ns + self.area_lock_ns + self.page_lock_ns
        """All that it takes, but for the waits for the locks."""


def _head(descriptor: int) -> bytes:
    """Return what a file begins with, nothing of what is none."""
    with suppress(OSError):
        return os.pread(descriptor, 6, 0)
    return b""
