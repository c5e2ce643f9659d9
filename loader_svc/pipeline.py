"""The one order of reads, checks, allocations, waits and frees of a module load.

Follows kernel/module/main.c of Linux 6.12: ``idempotent_init_module``, ``init_module_from_file``, ``load_module``,
``early_mod_check``, ``add_unformed_module``, ``do_init_module``; and what older versions leave out, by the policy's
switches. Two things differ from the kernel on purpose: a call that failed frees its memory before it is counted, not
after, since being counted means a commit, which takes a thousand times longer here; and the init part is freed as soon
as the call is counted, not some milliseconds later.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from loader_svc.checks.caller import refusal
from loader_svc.steps import (
    ADMIT,
    ALLOCATE,
    DECOMPRESS,
    FREE_ALL,
    FREE_IMAGE,
    FREE_INIT,
    INIT,
    INSPECT,
    READ,
    UNPACK,
    CallSpec,
    CheckName,
    Ending,
    EnterGate,
    Failure,
    Finish,
    Link,
    ReserveName,
    Step,
    told,
)
from modpressure.kernel.modules_list import Answer, Verdict
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Outcome, Syscall

Pipeline = Generator[Step, Any, Ending]


def load_module(spec: CallSpec) -> Pipeline:
    """Yield the steps of one call; take what each came to; return the ending, which has been counted by then."""
    ending = yield from _steps(spec)
    if ending.outcome is not Outcome.LIVE:
        yield FREE_ALL
    yield Finish(ending)
    if ending.outcome is Outcome.LIVE:
        yield FREE_INIT
    return ending


def _steps(spec: CallSpec) -> Pipeline:
    failure = refusal(spec)
    if failure:
        return _failed(Outcome.REFUSED, failure, spec.module)
    if spec.gated:
        answer = yield EnterGate(spec.inode)
        if answer.verdict is Verdict.SHARED:
            return Ending(Outcome.SHARED, answer.errno, "in flight", module=spec.module)
        if answer.verdict is not Verdict.PROCEED:
            return Ending(Outcome.REFUSED, answer.errno, "in flight", module=spec.module)

    failure = yield ADMIT
    if failure:
        # A signal came before anything was allocated.
        return _failed(Outcome.REFUSED, failure, spec.module)
    if spec.syscall is Syscall.INIT_MODULE:
        failure = yield UNPACK
        if failure:
            # libkmod gives up before it calls the kernel.
            return _failed(Outcome.REFUSED, failure, spec.module)
    failure = yield READ
    if failure:
        return _failed(Outcome.KREAD, failure, spec.module)
    if spec.flags & MODULE_INIT_COMPRESSED_FILE:
        failure = yield DECOMPRESS
        if failure:
            return _failed(Outcome.DECOMPRESS, failure, spec.module)

    inspected = yield INSPECT
    if isinstance(inspected, Failure):
        return _failed(Outcome.BECOMING, inspected, spec.module)
    module = inspected.name
    if spec.policy.early_check:
        answer = yield CheckName(module)
        if answer.verdict is not Verdict.PROCEED:
            return _duplicate(Outcome.BECOMING, answer, module)

    failure = yield ALLOCATE
    if failure:
        return _failed(Outcome.BECOMING, failure, module)
    answer = yield ReserveName(module)
    if answer.verdict is not Verdict.PROCEED:
        return _duplicate(Outcome.LOAD, answer, module)
    failure = yield Link(module)
    if failure:
        return _failed(Outcome.LOAD, failure, module, reserved=True)

    # The copy of the file goes before init runs, not after: do_init_module may take its time.
    yield FREE_IMAGE
    failure = yield INIT
    if failure:
        return _failed(Outcome.INIT, failure, module, reserved=True)
    return Ending(Outcome.LIVE, reserved=True, module=module)


def _failed(outcome: Outcome, failure: Failure, module: str, *, reserved: bool = False) -> Ending:
    return Ending(outcome, failure.errno, failure.check, told(failure.value), reserved=reserved, module=module)


def _duplicate(outcome: Outcome, answer: Answer, module: str) -> Ending:
    # A wait that a signal ended is counted, but is no duplicate: the name never enters the failed list.
    duplicate = answer.verdict is Verdict.DUPLICATE
    return Ending(outcome, answer.errno, "duplicate" if duplicate else "signal", duplicate=duplicate, module=module)
