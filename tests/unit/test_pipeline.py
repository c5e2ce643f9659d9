"""The order of a call's steps, and the ending that follows from what each step came to."""

from __future__ import annotations

from typing import Any

import pytest

from loader_svc.pipeline import load_module
from loader_svc.steps import (
    MAX_VALUE_BYTES,
    Admit,
    Allocate,
    CallSpec,
    CheckName,
    Decompress,
    Ending,
    EnterGate,
    Failure,
    Finish,
    Free,
    Init,
    Inspect,
    Inspected,
    Read,
    ReserveName,
    Step,
    Unpack,
)
from modpressure.kernel.modules_list import PROCEED, Answer, Verdict
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import V6_3, V6_4, V6_5, Policy

EEXIST = Answer(Verdict.DUPLICATE, "EEXIST")
INTERRUPTED = Answer(Verdict.INTERRUPTED, "EINTR", waited=True)
BAD = Failure("ENOEXEC", "elf: magic", "junk")


def spec(policy: Policy = V6_4, *, syscall: Syscall = Syscall.FINIT_MODULE, flags: int = 0) -> CallSpec:
    return CallSpec("asked_name", "tree:xfs.ko:0", policy, syscall, flags)


def drive(call: CallSpec, answers: dict[type[Step], Any] | None = None) -> tuple[list[Step], Ending]:
    """Run a call whose steps all succeed but for those in ``answers``; return the steps and the ending."""
    usual: dict[type[Step], Any] = {
        EnterGate: PROCEED,
        CheckName: PROCEED,
        ReserveName: PROCEED,
        Inspect: Inspected("xfs"),
    }
    usual.update(answers or {})
    pipeline = load_module(call)
    steps: list[Step] = []
    answer: Any = None
    while True:
        try:
            step = pipeline.send(answer)
        except StopIteration as end:
            return steps, end.value
        steps.append(step)
        answer = usual.get(type(step))


def words(steps: list[Step]) -> list[str]:
    return [f"Free {step.what}" if isinstance(step, Free) else type(step).__name__ for step in steps]


HEAD = ["Admit", "Read", "Inspect"]
TAIL = ["Allocate", "ReserveName", "Link", "Free image", "Init", "Finish", "Free init"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (V6_3, [*HEAD, *TAIL]),
        (V6_4, [*HEAD, "CheckName", *TAIL]),
        (V6_5, ["EnterGate", *HEAD, "CheckName", *TAIL]),
    ],
)
def test_a_load_that_succeeds_takes_the_steps_of_its_policy(policy: Policy, expected: list[str]) -> None:
    steps, ending = drive(spec(policy))
    assert words(steps) == expected
    assert ending == Ending(Outcome.LIVE, reserved=True, module="xfs")


def test_the_copy_of_the_file_is_freed_before_init_runs_and_the_init_part_after_the_count() -> None:
    steps, _ = drive(spec())
    order = words(steps)
    assert order.index("Free image") < order.index("Init") < order.index("Finish") < order.index("Free init")


def test_a_compressed_file_is_decompressed_right_after_the_read() -> None:
    steps, _ = drive(spec(flags=4))
    assert words(steps)[:4] == ["Admit", "Read", "Decompress", "Inspect"]


def test_init_module_passes_no_gate_and_is_unpacked_by_its_caller() -> None:
    steps, ending = drive(spec(V6_5, syscall=Syscall.INIT_MODULE))
    assert words(steps)[:4] == ["Admit", "Unpack", "Read", "Inspect"]
    assert ending.outcome is Outcome.LIVE


@pytest.mark.parametrize(
    ("failing", "call", "outcome"),
    [
        (Read, spec(), Outcome.KREAD),
        (Decompress, spec(flags=4), Outcome.DECOMPRESS),
        (Inspect, spec(), Outcome.BECOMING),
        (Allocate, spec(), Outcome.BECOMING),
        (Unpack, spec(syscall=Syscall.INIT_MODULE), Outcome.REFUSED),
    ],
)
def test_a_step_that_fails_ends_the_call_with_its_errno_and_all_memory_freed(
    failing: type[Step], call: CallSpec, outcome: Outcome
) -> None:
    steps, ending = drive(call, {failing: BAD})
    assert words(steps)[-3:] == [failing.__name__, "Free all", "Finish"]
    assert (ending.outcome, ending.errno, ending.check, ending.value) == (outcome, "ENOEXEC", "elf: magic", "junk")
    assert not ending.duplicate
    assert not ending.reserved


@pytest.mark.parametrize(("step", "outcome"), [(CheckName, Outcome.BECOMING), (ReserveName, Outcome.LOAD)])
def test_a_duplicate_ends_the_call_where_it_is_found(step: type[Step], outcome: Outcome) -> None:
    steps, ending = drive(spec(), {step: EEXIST})
    assert words(steps)[-3:] == [step.__name__, "Free all", "Finish"]
    assert ending == Ending(outcome, "EEXIST", "duplicate", duplicate=True, module="xfs")


@pytest.mark.parametrize(("step", "outcome"), [(CheckName, Outcome.BECOMING), (ReserveName, Outcome.LOAD)])
def test_a_signal_while_waiting_is_counted_but_no_duplicate(step: type[Step], outcome: Outcome) -> None:
    _, ending = drive(spec(), {step: INTERRUPTED})
    assert (ending.outcome, ending.errno, ending.duplicate) == (outcome, "EINTR", False)


def test_a_shared_result_allocates_nothing() -> None:
    steps, ending = drive(spec(V6_5), {EnterGate: Answer(Verdict.SHARED, "ENOEXEC", waited=True)})
    assert words(steps) == ["EnterGate", "Free all", "Finish"]
    assert (ending.outcome, ending.errno) == (Outcome.SHARED, "ENOEXEC")


def test_a_signal_in_the_gate_refuses_the_call() -> None:
    _, ending = drive(spec(V6_5), {EnterGate: INTERRUPTED})
    assert (ending.outcome, ending.errno) == (Outcome.REFUSED, "EINTR")


def test_an_init_that_fails_gives_the_name_back() -> None:
    steps, ending = drive(spec(), {Init: Failure("ENODEV", "init")})
    assert words(steps)[-3:] == ["Init", "Free all", "Finish"]
    assert (ending.outcome, ending.errno, ending.reserved) == (Outcome.INIT, "ENODEV", True)


def test_the_name_checked_and_reserved_is_the_one_in_the_image() -> None:
    steps, _ = drive(spec())
    names = [step.module for step in steps if isinstance(step, CheckName | ReserveName)]
    assert names == ["xfs", "xfs"]
    assert isinstance(steps[-2], Finish)
    assert isinstance(steps[0], Admit)


@pytest.mark.parametrize("character", ["v", "ü", "\udcff"])
def test_what_offended_is_told_as_far_as_an_event_has_room(character: str) -> None:
    said = "exactly" + "v" * (MAX_VALUE_BYTES - 7)
    _, ending = drive(spec(), {Inspect: Failure("ENOEXEC", "vermagic", said)})
    assert ending.value == said
    _, ending = drive(spec(), {Inspect: Failure("ENOEXEC", "vermagic", "over" + character * 100_000)})
    assert ending.value.startswith("over") and ending.value.endswith("00004 bytes)")
    assert MAX_VALUE_BYTES - 1 <= len(ending.value.encode()) <= MAX_VALUE_BYTES
