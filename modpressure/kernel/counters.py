"""The kernel's module counters, and how a call moves them (kernel/module/stats.c, Linux 6.4 and later)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Final, Protocol

from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.requesters import Tally

SIZE_BITS: Final = 44
"""Sizes are less than 16 TiB: more makes no sense, and a few of them would overflow a stored counter."""


class EndedCall(Protocol):
    """What is counted of a call, under the names that ``modpressure.v1.Call`` has."""

    @property
    def module(self) -> str: ...  # noqa: D102
    @property
    def outcome(self) -> int: ...  # noqa: D102
    @property
    def syscall(self) -> int: ...  # noqa: D102
    @property
    def duplicate(self) -> bool: ...  # noqa: D102
    @property
    def image_bytes(self) -> int: ...  # noqa: D102
    @property
    def compressed_bytes(self) -> int: ...  # noqa: D102
    @property
    def mod_bytes(self) -> int: ...  # noqa: D102
    @property
    def text_bytes(self) -> int: ...  # noqa: D102
    @property
    def origin(self) -> int: ...  # noqa: D102
    @property
    def requester(self) -> str: ...  # noqa: D102
    @property
    def errno(self) -> str: ...  # noqa: D102


@dataclass(slots=True)
class Counters:
    """What one system's kernel has counted. The first eleven carry the kernel's own names; sizes are bytes."""

    modcount: int = 0
    failed_kreads: int = 0
    failed_decompress: int = 0
    failed_becoming: int = 0
    failed_load_modules: int = 0
    total_mod_size: int = 0
    total_text_size: int = 0
    invalid_kread_bytes: int = 0
    invalid_decompress_bytes: int = 0
    invalid_becoming_bytes: int = 0
    invalid_mod_bytes: int = 0
    invalid_mod_image_bytes: int = 0
    """``invalid_mod_bytes`` with the image counted once and no compressed length: what the rfc report shows."""

    calls: int = 0
    shared_calls: int = 0
    refused_calls: int = 0
    failed_inits: int = 0
    duplicates: int = 0
    unloads: int = 0
    abandoned_calls: int = 0
    """Calls that never ended; they are not among ``calls``."""

    @property
    def virtual_mem_wasted_bytes(self) -> int:
        """Sum of the four ``invalid_`` byte counters of the mainline report."""
        return (
            self.invalid_kread_bytes
            + self.invalid_decompress_bytes
            + self.invalid_becoming_bytes
            + self.invalid_mod_bytes
        )

    def add_call(
        self,
        outcome: int,
        *,
        syscall: int,
        duplicate: bool,
        image_bytes: int,
        compressed_bytes: int,
        mod_bytes: int,
        text_bytes: int,
    ) -> int:
        """Count one call that has ended; return the bytes that it wasted by the mainline rules.

        ``outcome`` and ``syscall`` are the numbers of ``Outcome`` and ``Syscall``. ``compressed_bytes`` is 0 unless the
        kernel had to decompress. For a failed read by init_module ``image_bytes`` is the length that the caller gave.
        ValueError on an outcome that there is not.
        """
        self.calls += 1
        if duplicate:
            self.duplicates += 1
        # Plain comparisons with the enum's numbers: this runs for every event of a simulation.
        if outcome == Outcome.LIVE:
            self.modcount += 1
            self.total_mod_size += mod_bytes
            self.total_text_size += text_bytes
            return 0
        if outcome == Outcome.BECOMING:
            wasted = image_bytes + compressed_bytes
            self.failed_becoming += 1
            self.invalid_becoming_bytes += wasted
            return wasted
        if outcome == Outcome.LOAD:
            wasted = 2 * image_bytes + compressed_bytes
            self.failed_load_modules += 1
            self.invalid_mod_bytes += wasted
            self.invalid_mod_image_bytes += image_bytes
            return wasted
        if outcome == Outcome.SHARED:
            self.shared_calls += 1
            return 0
        if outcome == Outcome.KREAD:
            # finit_module moves no bytes on this path; init_module adds what its caller asked for.
            wasted = image_bytes if syscall == Syscall.INIT_MODULE else 0
            self.failed_kreads += 1
            self.invalid_kread_bytes += wasted
            return wasted
        if outcome == Outcome.DECOMPRESS:
            self.failed_decompress += 1
            self.invalid_decompress_bytes += compressed_bytes
            return compressed_bytes
        if outcome == Outcome.INIT:
            self.failed_inits += 1
            return 0
        if outcome == Outcome.REFUSED:
            self.refused_calls += 1
            return 0
        raise ValueError(f"there is no outcome number {outcome}")

    def add_calls(
        self,
        calls: Iterable[EndedCall],
        failed: dict[str, FailedModule],
        tallies: dict[tuple[int, str], Tally] | None = None,
    ) -> None:
        """Count many calls, each as ``add_call`` would, and add those that were duplicates to ``failed``.

        ``tallies`` is added to by origin and requester, as the calls name them.

        ValueError names an outcome that there is not, or a size that is negative or beyond ``SIZE_BITS``; the counters
        are then in between. The same rules as in ``add_call``, written out a second time because this runs for each
        event of a simulation: reading a field of a message costs as much as adding it, and calling a function more.
        """
        live, becoming, load, shared = (
            Outcome.LIVE.value,
            Outcome.BECOMING.value,
            Outcome.LOAD.value,
            Outcome.SHARED.value,
        )
        count = lives = total_mod_bytes = total_text_bytes = shares = duplicates = 0
        becomings = becoming_bytes = loads = load_bytes = load_image_bytes = 0
        good_shares = others = other_bytes = 0
        # None, as a message may name any number.
        origin: int | None = None
        requester, tally = "", Tally()
        if tallies is None:
            tallies = {}
        for call in calls:
            count += 1
            outcome = call.outcome
            if call.requester != requester or call.origin != origin:
                # Who asks once asks often. What a run of calls came to is the sums at its end less those at its start.
                before = count - 1
                wasted_bytes = becoming_bytes + load_bytes + other_bytes
                if before:
                    tally.add(Tally(before, before - lives - good_shares, wasted_bytes))
                origin, requester = call.origin, call.requester
                tally = tallies.setdefault((origin, requester), Tally())
                if before:
                    tally.add(Tally(-before, lives + good_shares - before, -wasted_bytes))
            if outcome == live:
                mod_bytes = call.mod_bytes
                text_bytes = call.text_bytes
                if (mod_bytes | text_bytes) >> SIZE_BITS:
                    raise _bad_size(call)
                lives += 1
                total_mod_bytes += mod_bytes
                total_text_bytes += text_bytes
                duplicates += call.duplicate
            elif outcome in (becoming, load):
                image_bytes = call.image_bytes
                compressed_bytes = call.compressed_bytes
                if (image_bytes | compressed_bytes) >> SIZE_BITS:
                    raise _bad_size(call)
                wasted_bytes = image_bytes + compressed_bytes
                if outcome == becoming:
                    becomings += 1
                    becoming_bytes += wasted_bytes
                else:
                    wasted_bytes += image_bytes
                    loads += 1
                    load_bytes += wasted_bytes
                    load_image_bytes += image_bytes
                if call.duplicate:
                    duplicates += 1
                    name = call.module
                    module = failed.get(name)
                    if module is None:
                        module = failed[name] = FailedModule(name)
                    if outcome == becoming:
                        module.becoming_count += 1
                    else:
                        module.load_count += 1
                    module.wasted_bytes += wasted_bytes
            elif outcome == shared:
                shares += 1
                duplicates += call.duplicate
                good_shares += not call.errno
            else:
                image_bytes = call.image_bytes
                compressed_bytes = call.compressed_bytes
                if (image_bytes | compressed_bytes) >> SIZE_BITS:
                    raise _bad_size(call)
                others += 1
                other_bytes += self.add_call(
                    outcome,
                    syscall=call.syscall,
                    duplicate=call.duplicate,
                    image_bytes=image_bytes,
                    compressed_bytes=compressed_bytes,
                    mod_bytes=0,
                    text_bytes=0,
                )
        tally.add(Tally(count, count - lives - good_shares, becoming_bytes + load_bytes + other_bytes))
        self.calls += count - others  # which have been counted
        self.modcount += lives
        self.total_mod_size += total_mod_bytes
        self.total_text_size += total_text_bytes
        self.failed_becoming += becomings
        self.invalid_becoming_bytes += becoming_bytes
        self.failed_load_modules += loads
        self.invalid_mod_bytes += load_bytes
        self.invalid_mod_image_bytes += load_image_bytes
        self.shared_calls += shares
        self.duplicates += duplicates

    def add(self, other: Counters) -> None:
        """Add every counter of ``other`` to this one."""
        for name in COUNTER_NAMES:
            # Of most calls all but a few are 0.
            if number := getattr(other, name):
                setattr(self, name, getattr(self, name) + number)


COUNTER_NAMES: tuple[str, ...] = tuple(field.name for field in fields(Counters))

KERNEL_COUNTER_NAMES: tuple[str, ...] = COUNTER_NAMES[:11]
"""The single-value files of /sys/kernel/debug/modules/."""


@dataclass(slots=True)
class FailedModule:
    """A name that was a duplicate at least once: an entry of the kernel's ``dup_failed_modules``."""

    module: str
    becoming_count: int = 0
    load_count: int = 0
    wasted_bytes: int = 0

    @property
    def count(self) -> int:
        """How many calls failed."""
        return self.becoming_count + self.load_count

    @property
    def reason(self) -> str:
        """The kernel's word for where they were found."""
        if self.becoming_count and self.load_count:
            return "Becoming & Load"
        return "Becoming" if self.becoming_count else "Load"

    def add(self, other: FailedModule) -> None:
        """Add the failures of ``other`` to these."""
        self.becoming_count += other.becoming_count
        self.load_count += other.load_count
        self.wasted_bytes += other.wasted_bytes


def _bad_size(call: EndedCall) -> ValueError:
    sizes = ("image_bytes", "compressed_bytes", "mod_bytes", "text_bytes")
    name = next(name for name in sizes if getattr(call, name) >> SIZE_BITS)
    return ValueError(f"{name} {getattr(call, name)} is no size")
