"""A call's file and memory: read, decompress, lay out, each in areas of the call's own.

The process's resident set shows what the simulated kernel holds. Nothing here talks to stats_svc; all but waiting for
room may be done in a thread, by one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from loader_svc.checks.caller import copy_failure, read_failure
from loader_svc.image import Algorithm, ImageError, ImageTooLarge, Layout, kernel_decompress, user_decompress
from loader_svc.memory import Area, Holdings, MemoryBudget, Meter, Taken, page_round
from loader_svc.plan import FileVersion, Plan, Plans, failure_of
from loader_svc.steps import CallSpec, Failure, Inspected
from modpressure.errors import NotNow
from modpressure.fair import FLOW
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Syscall

_CORE: Final = slice(0, 4)
_INIT: Final = slice(4, 7)
"""The first four memory types are the module's core; the rest goes after init."""


@dataclass(frozen=True, slots=True)
class File:
    """A module's file: where it is in its tree, how it is packed, and how to open it."""

    path: str
    algorithm: Algorithm | None
    open: Callable[[], int]
    """Returns a new read-only descriptor; ModpressureError if the file is away or leads out of the tree."""

    is_small: bool = False
    """Whether reading and laying it out takes less than handing it to a thread does."""


@dataclass(slots=True)
class LiveModule:
    """What a live module holds until it is unloaded."""

    core: Area | None
    """None if the core takes nothing, which no real module does."""

    taken: Taken


class CallMemory:
    """What one call has of real memory and of its file."""

    def __init__(self, file: File, spec: CallSpec, plans: Plans, budget: MemoryBudget, meter: Meter) -> None:
        self.plan: Plan | None = None
        """Known once the file has been opened."""

        self.need_bytes = 0
        """The most that the call will take of the budget, likewise."""

        self._file = file
        self._spec = spec
        self._plans = plans
        self._budget = budget
        self._holdings = Holdings(meter)
        self._client = FLOW.get().client
        self._taken: Taken | None = None
        self._fd = -1
        self._caller_image: Area | None = None
        self._copy: Area | None = None
        self._image: Area | None = None
        self._core: Area | None = None
        self._init: Area | None = None

    @property
    def peak_bytes(self) -> int:
        """The most that the simulated kernel held for the call at once."""
        return self._holdings.peak_bytes

    @property
    def planned(self) -> Plan:
        """The plan of a call that has been admitted."""
        assert self.plan is not None, "a call is admitted before anything else is done with its file"
        return self.plan

    # --- the budget ---

    def try_admit(self) -> bool:
        """Open the file, plan the call and take what it needs; return False if there is no room for it now."""
        file, spec = self._file, self._spec
        self._fd = file.open()
        by_kernel = spec.syscall is Syscall.FINIT_MODULE
        algorithm = file.algorithm if not by_kernel or spec.flags & MODULE_INIT_COMPRESSED_FILE else None
        plan = self.plan = self._plans.of(self._fd, file.path, algorithm, by_kernel=by_kernel, flags=spec.flags)
        self.need_bytes = plan.peak_bytes if by_kernel else plan.peak_bytes + page_round(plan.unpacked_bytes)
        self._taken = self._budget.try_take(self.need_bytes, file.path, self._client)
        if self._taken is None:
            # Thousands may wait for memory, and descriptors are few.
            self._close_file()
            return False
        return True

    async def wait_for_room(self, *, wait: bool) -> None:
        """Take what the call needs, in turn. OverLimit as ``MemoryBudget.take`` has it."""
        self._taken = await self._budget.take(self.need_bytes, self._file.path, self._client, wait=wait)

    # --- the steps ---

    def unpack(self) -> Failure | None:
        """Read and decompress the file as the caller does who hands the kernel an image; return why that fails."""
        plan = self.planned
        failure = plan.failure_at("read") or plan.failure_at("decompress")
        if failure:
            return failure
        # The caller's own memory is real, and within the budget, but nothing that the kernel allocates.
        aside = Holdings(Meter())
        file = self._read_file(aside)
        if self._file.algorithm is None:
            self._caller_image = file
            return None
        try:
            unpacked = self._unpacked(file, user_decompress, aside)
        finally:
            file.free()
        if isinstance(unpacked, Failure):
            return unpacked
        self._caller_image = unpacked
        return None

    def read(self) -> Failure | None:
        """Copy the file, or the caller's image, as the kernel does; return why that fails."""
        plan = self.planned
        if self._caller_image is not None:
            failure = copy_failure(self._spec, plan.unpacked_bytes, self._budget.limit_bytes)
            if failure:
                return failure
            self._copy = Area(plan.unpacked_bytes, self._holdings)
            with memoryview(self._caller_image.pages) as view, view[: plan.unpacked_bytes] as source:
                self._copy.pages[: plan.unpacked_bytes] = source
            return None
        failure = read_failure(self._spec, plan.failure_at("read"))
        if failure is None:
            self._copy = self._read_file(self._holdings)
        return failure

    def decompress(self) -> Failure | None:
        """Decompress the copy into an area of its own and free it; return why that fails."""
        assert self._copy is not None
        unpacked = self._unpacked(self._copy, kernel_decompress, self._holdings)
        if isinstance(unpacked, Failure):
            return unpacked
        self._image = unpacked
        self._copy.free()
        self._copy = None
        return None

    def inspect(self) -> Inspected | Failure:
        """Return what there is in the image, or why the kernel would not look further."""
        plan = self.planned
        return plan.failure_at("check") or Inspected(plan.module)

    def allocate(self) -> Failure | None:
        """Lay the image out; return why the layout fails."""
        plan = self.planned
        layout = plan.layout
        if layout is None:
            return plan.failure_at("layout")
        image = self._image or self._copy
        assert image is not None
        # The kernel allocates each type for itself, one right after the other. Two areas hold as many pages for as
        # long, and each one more would cost an unmapping across all threads.
        self._core = self._area_of(layout, _CORE)
        self._init = self._area_of(layout, _INIT)
        self._copy_sections(layout, image)
        return None

    # --- the end ---

    def keep(self) -> LiveModule:
        """Give what a live module goes on holding to the caller: it is no longer the call's."""
        assert self._taken is not None, "a call is admitted before it becomes live"
        core_bytes = self._core.size_bytes if self._core is not None else 0
        module = LiveModule(self._core, self._taken.part(core_bytes))
        self._core = None
        return module

    def free_images(self) -> None:
        """Free the copy and the decompressed image."""
        for area in (self._copy, self._image):
            if area is not None:
                area.free()
        self._copy = self._image = None

    def free_init(self) -> None:
        """Free what the layout has for init alone."""
        if self._init is not None:
            self._init.free()
            self._init = None

    def free_all(self) -> None:
        """Free all that the simulated kernel holds for the call."""
        if self._core is not None:
            self._core.free()
            self._core = None
        self.free_init()
        self.free_images()

    def close(self) -> None:
        """Let go of what is not the simulated kernel's, and of what is left of the budget."""
        if self._caller_image is not None:
            self._caller_image.free()
            self._caller_image = None
        self._close_file()
        if self._taken is not None:
            self._budget.give(self._taken)
            self._taken = None

    # --- files and areas ---

    def _read_file(self, holdings: Holdings) -> Area:
        """Read the whole file into an area of its own, and close it."""
        plan = self.planned
        if self._fd < 0:
            self._fd = self._file.open()
        size_bytes = plan.version.size_bytes
        area = Area(size_bytes, holdings)
        offset = 0
        try:
            with memoryview(area.pages) as view:
                while offset < size_bytes:
                    with view[offset:size_bytes] as rest:
                        length = os.preadv(self._fd, [rest], offset)
                    if length == 0:
                        break
                    offset += length
            if offset < size_bytes or FileVersion.of(self._fd) != plan.version:
                raise self._changed()
        except BaseException:
            area.free()
            raise
        self._close_file()
        return area

    def _unpacked(self, file: Area, decompress: Callable[..., Iterator[bytes]], holdings: Holdings) -> Area | Failure:
        """Decompress the file of an area into another one, or return why that fails; nothing is kept then.

        NotNow if it comes to anything else than was planned: what is changed twice within a tick of the kernel's clock
        is dated the same.
        """
        plan = self.planned
        image = Area(plan.unpacked_bytes, holdings)
        offset, failure = 0, None
        try:
            with memoryview(file.pages) as view, view[: plan.version.size_bytes] as source:
                for chunk in decompress(source, self._file.algorithm, limit_bytes=self._plans.image_limit_bytes):
                    start, offset = offset, offset + len(chunk)
                    if offset > plan.unpacked_bytes:
                        break
                    image.pages[start:offset] = chunk
        except ImageError as error:
            failure = failure_of(error)
        except ImageTooLarge:
            # Nothing is raised from it: it knows frames that have views of the file's area, which is to be freed.
            offset = -1
        except BaseException:
            image.free()
            raise
        if offset != plan.unpacked_bytes or failure != plan.failure_at("decompress"):
            image.free()
            raise self._changed()
        if failure is not None:
            image.free()
            return failure
        return image

    def _changed(self) -> NotNow:
        """Return the error that says that the file is another than was planned, and have it planned anew."""
        self._plans.forget(self.planned.version)
        return NotNow(f"{self._file.path} changed while it was being read")

    def _area_of(self, layout: Layout, types: slice) -> Area | None:
        """Allocate an area for some memory types, one after another; None if they take nothing."""
        size_bytes = sum(layout.rounded[types])
        return Area(size_bytes, self._holdings, populate=True) if size_bytes else None

    def _copy_sections(self, layout: Layout, image: Area) -> None:
        """Copy the sections of an image to where they belong."""
        bases = [base for types in (_CORE, _INIT) for base in accumulate(layout.rounded[types][:-1], initial=0)]
        core = None if self._core is None else self._core.pages
        init = None if self._init is None else self._init.pages
        with memoryview(image.pages) as source:
            for _, memory_type, to, at, size_bytes, is_nobits in layout.placements:
                pages = core if memory_type < _INIT.start else init
                if pages is not None and size_bytes and not is_nobits:
                    to += bases[memory_type]
                    pages[to : to + size_bytes] = source[at : at + size_bytes]

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
