"""Recorded calls, made again at their times on a simulated machine: other CPUs, another policy, other costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from loader_svc.boot.files import files_of
from loader_svc.boot.simulate import new_kernel
from loader_svc.boot.spec import BootCall, BootResult, BootSpec
from loader_svc.boot.tally import Tally
from loader_svc.boot.trace import TraceCall
from loader_svc.virtual.call import Record, VirtualCall
from loader_svc.virtual.process import Body, Process
from modpressure.errors import BadRequest
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Syscall

MODULES_NAMED: Final = 5


def replay_trace(
    spec: BootSpec, trace: Sequence[TraceCall], seed: int, *, record: Callable[[BootCall], None] | None = None
) -> BootResult:
    """Make the calls of a trace; return what came of them, as of a boot.

    Of the machine, its CPUs, memory, inits and files count; its devices do not. A worker makes one call at a time: one
    that it is still busy for begins when the one before has ended. TreeError; BadRequest names modules that the tree
    does not have.
    """
    return Replay(spec, trace, seed, None if record is None else lambda call: record(BootCall.of(call))).run()


class Replay:
    """One replay."""

    def __init__(self, spec: BootSpec, trace: Sequence[TraceCall], seed: int, record: Record | None = None) -> None:
        """Raise as ``replay_trace`` does."""
        self._spec = spec = replace(spec, machine=replace(spec.machine, devices=(), subsystems=()))
        self._files = files_of(spec)
        self._trace = trace
        missing = [name for name in dict.fromkeys(call.module for call in trace) if self._files.file(name) is None]
        if missing:
            more = f" and {len(missing) - MODULES_NAMED} more" if len(missing) > MODULES_NAMED else ""
            names = ", ".join(missing[:MODULES_NAMED]) + more
            raise BadRequest(
                f"the module tree {self._files.tree.release} lacks modules of the trace: {names}", field="tree"
            )
        self.kernel = new_kernel(spec, self._files, seed)
        self._tally = Tally(self.kernel, record)
        self._ended_ns = 0

    def run(self) -> BootResult:
        """Make all calls."""
        by_worker: dict[str, list[TraceCall]] = {}
        for call in self._trace:
            by_worker.setdefault(call.worker, []).append(call)
        for calls in by_worker.values():
            self._start(calls)
        self.kernel.run()
        return self._tally.result(duration_ns=self._ended_ns, workers=len(by_worker), events=len(self._trace))

    def _start(self, calls: list[TraceCall]) -> None:
        processes: list[Process] = []
        processes.append(Process(self.kernel, self._work(calls, processes), calls[0].at_ns))

    def _work(self, calls: list[TraceCall], me: list[Process]) -> Body:
        kernel = self.kernel
        clock = kernel.clock
        for call in calls:
            while clock.now_ns < call.at_ns:
                clock.at(call.at_ns, me[0].wake)
                yield None
            if call.action == "unload":
                if not kernel.begin_removal(call.module):
                    yield kernel.vary(kernel.costs.remove_ns)
                    kernel.end_removal(call.module)
            else:
                made = self._call(call)
                yield made
                self._tally.add(made)
            self._ended_ns = max(self._ended_ns, clock.now_ns)

    def _call(self, call: TraceCall) -> VirtualCall:
        file = self._files.file(call.module)
        assert file is not None
        spec = self._files.call_spec(file, call.module, call.parameters, self._spec)
        if call.syscall is Syscall.INIT_MODULE:
            spec = replace(spec, syscall=call.syscall, flags=0)
        elif call.syscall is Syscall.FINIT_MODULE:
            # Whether the kernel has to decompress follows from the tree's file, not from the recorded one.
            packed = MODULE_INIT_COMPRESSED_FILE if file.packing else 0
            own = (call.flags or 0) & ~MODULE_INIT_COMPRESSED_FILE
            spec = replace(spec, syscall=call.syscall, flags=own | packed)
        return VirtualCall(spec, file, worker=call.worker)
