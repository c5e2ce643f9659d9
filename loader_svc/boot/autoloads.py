"""The kernel's own requests for modules, each a modprobe beside all else."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from loader_svc.virtual.machine import VirtualMachine
from loader_svc.virtual.process import Body, Process
from modpressure.kernel.autoload import Autoload, Told
from modpressure.kernel.modules_list import Verdict


class Autoloads:
    """request_module() of one machine, which nobody waits for (``__request_module``, kernel/module/kmod.c)."""

    def __init__(
        self, kernel: VirtualMachine, load: Callable[[str], Generator[Any, Any, None]], *, merges: bool
    ) -> None:
        """``load`` is what modprobe does for a name; ``merges`` says whether requests of equal names share one."""
        self._kernel = kernel
        self._load = load
        self._merges = merges
        self._requests: Autoload[int] = Autoload()
        self._names: list[str] = []
        self.failed = 0
        """Requests that found no place in time."""

    @property
    def count(self) -> int:
        """How many requests there were."""
        return len(self._names)

    def request(self, name: str) -> None:
        """Ask for a module by name or alias."""
        number = len(self._names)
        self._names.append(name)
        answer = self._requests.request(name, number, self._kernel.clock.now_ns, merge=self._merges)
        if answer is not None:
            self._tell([(number, answer)])
        else:
            self._wait()

    def _wait(self) -> None:
        """Be called when the first request that waits for a place has waited for too long."""
        expiry_ns = self._requests.next_expiry_ns
        if expiry_ns is not None:
            self._kernel.clock.at(expiry_ns, self._expire)

    def _expire(self) -> None:
        self._tell(self._requests.expire(self._kernel.clock.now_ns))
        self._wait()

    def _tell(self, told: Told[int]) -> None:
        for number, answer in told:
            if answer.verdict is Verdict.PROCEED:
                Process(self._kernel, self._modprobe(number))
            elif answer.verdict is Verdict.FAILED:
                self.failed += 1

    def _modprobe(self, number: int) -> Body:
        """Run the modprobe that the kernel starts."""
        kernel = self._kernel
        yield kernel.vary(kernel.costs.exec_ns)
        yield from self._load(self._names[number])
        self._tell(self._requests.finish(number, "", 0, kernel.clock.now_ns))
