"""What a step of a call allocates of a system's memory: the same for both drivers.

The order within a step is the kernel's (kernel-internal checks first, then the allocation, then the work): a file that
can't be read at all allocates nothing, one that is cut short while it is being read does.
"""

from __future__ import annotations

from loader_svc.checks.caller import MIN_IMAGE_BYTES, read_failure
from loader_svc.plan import Plan
from loader_svc.steps import Allocate, CallSpec, Decompress, Failure, Read, Step
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.system_memory import Allocation, Part, Shortage


def allocation_of(step: Step, spec: CallSpec, plan: Plan | None) -> Allocation | None:
    """Return what is allocated before a step does its work, None for nothing."""
    if plan is None:
        return None
    if isinstance(step, Read):
        return _copy_of(spec, plan)
    if isinstance(step, Decompress):
        # As far as it comes: what fails on the way has taken its pages until then.
        return Allocation(Part.IMAGE, (plan.unpacked_bytes,)) if plan.is_packed else None
    if isinstance(step, Allocate) and plan.layout is not None:
        return Allocation(Part.LAYOUT, plan.layout.rounded)
    return None


def _copy_of(spec: CallSpec, plan: Plan) -> Allocation | None:
    if spec.syscall is Syscall.INIT_MODULE:
        told = spec.caller.length_bytes
        length_bytes = plan.unpacked_bytes if told is None else told
        return Allocation(Part.FILE, (length_bytes,)) if length_bytes >= MIN_IMAGE_BYTES else None
    failure = read_failure(spec, plan.failure_at("read"))
    if failure is not None and failure.errno != "EIO":
        return None
    return Allocation(Part.FILE, (plan.version.size_bytes,))


def failure_of_shortage(shortage: Shortage) -> Failure:
    """Return the failure of the step whose allocation found no room."""
    return Failure("ENOMEM", shortage.check, shortage.value)
