"""A guest: a machine whose CPUs share fewer cores of a host, and what that does to those who load modules.

What interrupts all CPUs and waits for each of them, as a flush of all TLBs does, has to wait until the host has given
a core to each that is busy. Loading a module flushes several times: its memory is protected, kernel text is patched.
Part of that is done under the mutex of the modules list, which every look for a name needs. On cores of its own such a
wait is over in microseconds; here it is what loading mostly consists of, and it decides who gets ahead of whom.

Who waits for a mutex whose owner is on a CPU spins for it, and keeps a core of the host from those that are waited for;
so the more CPUs there are, the longer all of it takes.

Seen in traces of guests with 2, 4 and 8 CPUs on 2 cores (Linux 6.12 on QEMU): reading a file and init functions take as
long with 8 CPUs as with 2, but linking takes ten times as long, and so does all between init and the wake-up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from loader_svc.virtual.call import VirtualCall
from loader_svc.virtual.cpus import Cpus
from loader_svc.virtual.host import Host, Thread
from loader_svc.virtual.machine import _ASLEEP, _INTERRUPTED
from loader_svc.virtual.spinning import SPIN_NS, SpinningMachine
from modpressure.kernel.modules_list import PROCEED
from modpressure.kernel.outcome import Outcome

UNMAPPINGS: Final = 1
"""Flushes while any module is linked: what was unmapped lazily is unmapped before protections change
(``vm_unmap_aliases``, mm/vmalloc.c, Linux 6.12)."""

PATCHES: Final = 12
"""Flushes besides for a module that has code to be patched: a few patches, with as many rounds each as ``ROUNDS``."""

ROUNDS: Final = 3
"""Flushes for each patch of code: for the breakpoint, the rest, the first byte (``text_poke_bp_batch``,
arch/x86/kernel/alternative.c, Linux 6.12).

Each call that is made a direct one is a patch of its own (``__static_call_init``, kernel/static_call_inline.c): 675 in
kvm, 110 in xhci_hcd, fewer than ten in most modules. They follow each other so closely that whichever CPU was behind
has a core by the second; so each takes what a flush takes alone.
"""

LATE_UNMAPPINGS: Final = 2
LATE_PROTECTIONS: Final = 2
"""The same between the end of init and the wake-up (``do_init_module``, kernel/module/main.c: its notifiers, what is
only read after init, and the init part)."""

_PROTECTED: Final = (0, 2, 4, 6)
"""Areas of a layout whose protection is changed when a module is formed, under the mutex of the list, a flush for each
that there is: text and data that is only read, and the same of the init part (``module_enable_rodata_ro``,
``module_enable_text_rox``, kernel/module/strict_rwx.c)."""

_RO_AFTER_INIT: Final = 3
"""The area that jump tables are in: modules without it have nothing to be patched."""


class GuestMachine(SpinningMachine):
    """A machine whose CPUs are virtual ones, on a host with fewer cores.

    All flushes go through ``purge_mutex`` one by one: each change of protection first unmaps what is left to be
    unmapped (``vm_unmap_aliases``, mm/vmalloc.c, Linux 6.12).
    """

    def __init__(self, *, cpus: int, host_cpus: int, **options: Any) -> None:
        """``options`` are those of SpinningMachine."""
        self._host_cpus = host_cpus
        super().__init__(cpus=cpus, **options)
        self._alone_ns = self.costs.flush_ns + cpus * self.costs.flush_ns_per_cpu
        """What a flush takes whose interrupts are all answered at once."""
        self.list_mutex = self._mutex()
        """The mutex of the modules list; the other ``list_lock`` is not used."""
        self.purge_mutex = self._mutex()
        """The mutex of those who flush; the other ``purge_lock`` is not used."""

    def _make_cpus(self, cpus: int | None) -> Cpus:
        costs = self.costs
        self._host = Host(
            self.clock,
            self._host_cpus,
            latency_ns=costs.host_latency_ns,
            slice_ns=costs.host_slice_ns,
            wake_ns=costs.host_wake_ns,
            tick_ns=costs.host_tick_ns,
        )
        return Cpus(self.clock, cpus, costs.slice_ns, host=self._host)

    def _pause(self) -> None:
        self._host.pause()

    # --- flushes ---

    def _flush(self, call: VirtualCall, flushes: int, then: Callable[[VirtualCall], Any]) -> Any:
        """Have a call flush some times, each time in its turn, and go on."""
        return self._take(self.purge_mutex, call, partial(self._flush_now, flushes, then))

    def _flush_now(self, flushes: int, then: Callable[[VirtualCall], Any], call: VirtualCall) -> Any:
        """Interrupt all CPUs, and spin until each has answered: those that have no core do so when they get one."""
        self.purge_mutex.hold(call)
        behind = [(thread, thread.begun) for thread in self._host.queued]
        call._owed_ns += self._alone_ns
        return self._once_paid(call, partial(self._spin, behind, flushes, then))

    def _spin(
        self, behind: list[tuple[Thread, int]], flushes: int, then: Callable[[VirtualCall], Any], call: VirtualCall
    ) -> Any:
        behind = [(thread, begun) for thread, begun in behind if thread.begun == begun]
        if behind:
            self._pause()
            call._owed_ns += SPIN_NS
            return self._once_paid(call, partial(self._spin, behind, flushes, then))
        self.purge_mutex.free()
        return self._flush(call, flushes - 1, then) if flushes > 1 else then(call)

    def _purge_ns(self) -> int:
        return 0  # what flushes when a layout is freed is in _finish

    # --- the mutex of the list ---

    def _with_list(self, call: VirtualCall, then: Callable[[VirtualCall], Any]) -> Any:
        """Do something under the mutex, at once or as soon as it can be had."""
        return self._take(self.list_mutex, call, partial(self._under_list, then))

    def _under_list(self, then: Callable[[VirtualCall], Any], call: VirtualCall) -> Any:
        call._owed_ns += self._list_ns
        return then(call)

    def _protect(self, call: VirtualCall, flushes: int, then: Callable[[VirtualCall], Any]) -> Any:
        """Flush some times while holding the mutex, and go on without it."""
        return self._with_list(call, partial(self._protected, flushes, then))

    def _protected(self, flushes: int, then: Callable[[VirtualCall], Any], call: VirtualCall) -> Any:
        self.list_mutex.hold(call)
        return self._flush(call, flushes, partial(self._unprotected, then))

    def _unprotected(self, then: Callable[[VirtualCall], Any], call: VirtualCall) -> Any:
        self.list_mutex.free()
        return then(call)

    # --- looking for a name, and waiting for it: wait_event_interruptible(finished_loading()) between two looks ---

    def _check_name(self, call: VirtualCall) -> Any:
        return self._with_list(call, self._look)

    def _reserve_name(self, call: VirtualCall) -> Any:
        return self._with_list(call, self._look_and_reserve)

    def _look(self, call: VirtualCall) -> Any:
        answer = self.modules.look(call.loadable.module)
        if answer is not None:
            return answer
        call._wait = "list"
        call._slept_ns = self.clock.now_ns
        return self._once_paid(call, self._wait_on)

    def _look_and_reserve(self, call: VirtualCall) -> Any:
        answer = self._look(call)
        if answer is PROCEED:
            self.modules.reserve(call.loadable.module, call)
            self._time_looks()
        return answer

    def _wait_on(self, call: VirtualCall) -> Any:
        return self._with_list(call, self._finished_loading)

    def _finished_loading(self, call: VirtualCall) -> Any:
        if self.modules.look_again(call.loadable.module) is not None:
            return self._once_paid(call, self._look_last)
        if call._is_signalled:
            return self._leave(call, _INTERRUPTED)
        self._queue.add(call)
        call._then = self._wait_on
        return _ASLEEP

    def _look_last(self, call: VirtualCall) -> Any:
        return self._with_list(call, self._look_again)

    def _look_again(self, call: VirtualCall) -> Any:
        answer = self.modules.look_again(call.loadable.module)
        # It may be loaded once more by now.
        return self._once_paid(call, self._wait_on) if answer is None else self._leave(call, answer)

    def _leave(self, call: VirtualCall, answer: Any) -> Any:
        call._wait = ""
        call._waits += 1
        call.wait_ns += self.clock.now_ns - call._slept_ns
        return answer

    # --- a load, from its link to its end ---

    def _link(self, call: VirtualCall) -> Any:
        loadable = call.loadable
        call._owed_ns += loadable.link_ns + loadable.static_calls * ROUNDS * self._alone_ns
        return self._once_paid(call, self._patch)

    def _patch(self, call: VirtualCall) -> Any:
        flushes = UNMAPPINGS + (PATCHES if _sizes(call)[_RO_AFTER_INIT] else 0)
        return self._flush(call, flushes, self._form)

    def _form(self, call: VirtualCall) -> Any:
        return self._protect(call, sum(bool(_sizes(call)[area]) for area in _PROTECTED), self._link_now)

    def _finish(self, call: VirtualCall) -> Any:
        freed = call._node.freed
        if freed is None or not freed.has_core:
            return super()._finish(call)
        self.areas.free(call, freed)
        return self._once_paid(call, self._reset_protection)

    def _reset_protection(self, call: VirtualCall) -> Any:
        """Free a layout: a flush for each of its areas (``vm_reset_perms``, mm/vmalloc.c)."""
        return self._flush(call, sum(bool(size) for size in _sizes(call)), self._finish_freed)

    def _begin_end(self, call: VirtualCall) -> Any:
        """End a load: a module is live without the mutex; only what follows needs that."""
        if call._node.tag.ending.outcome is not Outcome.LIVE:
            return self._with_list(call, self._give_name_back)
        loadable = call.loadable
        self.modules.live(loadable.module, loadable.core_bytes)
        if self.on_live is not None:
            self.on_live(loadable.module)
        call._owed_ns += loadable.tail_ns
        self._begin_probes(loadable.module)
        return self._once_paid(call, partial(self._synchronize, self._patch_late))

    def _patch_late(self, call: VirtualCall) -> Any:
        return self._flush(call, LATE_UNMAPPINGS, self._form_late)

    def _form_late(self, call: VirtualCall) -> Any:
        return self._protect(call, LATE_PROTECTIONS, self._wake_others)

    def _give_name_back(self, call: VirtualCall) -> Any:
        self.links.drop(call.loadable.module)
        self.modules.remove(call.loadable.module)
        self._time_looks()
        return self._once_paid(call, self._wake_others)


def _sizes(call: VirtualCall) -> tuple[int, ...]:
    """Return the sizes of the seven areas of a call's layout."""
    layout = call.loadable.plan.layout
    assert layout is not None
    return layout.rounded
