"""The byte rules of kernel-semantics.md section 2 and report-formats.md, one call at a time and many at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modpressure.kernel.counters import COUNTER_NAMES, KERNEL_COUNTER_NAMES, SIZE_BITS, Counters, FailedModule
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.requesters import Tally
from modpressure.v1 import call_pb2, stats_service_pb2

LEN, CLEN, MOD, TEXT = 1000, 300, 8192, 4096


@dataclass
class Ended:
    """A call that ended, with the fields that are counted."""

    outcome: int
    module: str = "xfs"
    syscall: int = Syscall.FINIT_MODULE
    duplicate: bool = False
    image_bytes: int = LEN
    compressed_bytes: int = 0
    mod_bytes: int = MOD
    text_bytes: int = TEXT
    origin: int = 1
    requester: str = "udev"
    errno: str = ""

    def add_to(self, counters: Counters) -> int:
        fields = asdict(self)
        for name in ("module", "origin", "requester", "errno"):
            del fields[name]
        return counters.add_call(fields.pop("outcome"), **fields)


def changes(call: Ended) -> dict[str, int]:
    counters = Counters()
    wasted = call.add_to(counters)
    assert wasted == counters.virtual_mem_wasted_bytes
    found = {name: value for name, value in asdict(counters).items() if value}
    assert found.pop("calls") == 1
    return found


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Ended(Outcome.LIVE), {"modcount": 1, "total_mod_size": MOD, "total_text_size": TEXT}),
        # finit_module moves no bytes when the read fails; init_module adds the length that its caller gave.
        (Ended(Outcome.KREAD), {"failed_kreads": 1}),
        (Ended(Outcome.KREAD, syscall=Syscall.INIT_MODULE), {"failed_kreads": 1, "invalid_kread_bytes": LEN}),
        (
            Ended(Outcome.DECOMPRESS, compressed_bytes=CLEN),
            {"failed_decompress": 1, "invalid_decompress_bytes": CLEN},
        ),
        (Ended(Outcome.BECOMING), {"failed_becoming": 1, "invalid_becoming_bytes": LEN}),
        (
            Ended(Outcome.BECOMING, compressed_bytes=CLEN),
            {"failed_becoming": 1, "invalid_becoming_bytes": LEN + CLEN},
        ),
        # A decompressed image of length 0 leaves the compressed length alone.
        (
            Ended(Outcome.BECOMING, image_bytes=0, compressed_bytes=CLEN),
            {"failed_becoming": 1, "invalid_becoming_bytes": CLEN},
        ),
        (
            Ended(Outcome.LOAD),
            {"failed_load_modules": 1, "invalid_mod_bytes": 2 * LEN, "invalid_mod_image_bytes": LEN},
        ),
        (
            Ended(Outcome.LOAD, compressed_bytes=CLEN, duplicate=True),
            {
                "failed_load_modules": 1,
                "invalid_mod_bytes": 2 * LEN + CLEN,
                "invalid_mod_image_bytes": LEN,
                "duplicates": 1,
            },
        ),
        # The kernel counts nothing of these.
        (Ended(Outcome.INIT), {"failed_inits": 1}),
        (Ended(Outcome.SHARED), {"shared_calls": 1}),
        (Ended(Outcome.REFUSED), {"refused_calls": 1}),
    ],
)
def test_each_outcome_moves_exactly_its_counters(call: Ended, expected: dict[str, int]) -> None:
    assert changes(call) == expected
    many, failed = Counters(), dict[str, FailedModule]()
    many.add_calls([call], failed)
    assert {name: value for name, value in asdict(many).items() if value} == {**expected, "calls": 1}


def test_every_outcome_is_covered_and_has_the_contracts_number() -> None:
    for outcome in Outcome:
        # No call ends abandoned.
        assert outcome is Outcome.ABANDONED or changes(Ended(outcome))
        assert call_pb2.Outcome.Name(call_pb2.Outcome.ValueType(outcome)) == f"OUTCOME_{outcome.name}"
    for syscall in Syscall:
        assert call_pb2.Syscall.Name(call_pb2.Syscall.ValueType(syscall)) == f"SYSCALL_{syscall.name}"
    assert [outcome.word for outcome in Outcome][:5] == ["live", "kread", "decompress", "becoming", "load"]


@pytest.mark.parametrize("number", [0, 9, -1])
def test_an_outcome_that_there_is_not_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"no outcome number {number}"):
        Ended(number).add_to(Counters())
    with pytest.raises(ValueError, match=f"no outcome number {number}"):
        Counters().add_calls([Ended(number)], {})


def test_the_kernels_names_come_first_and_the_contract_has_them_all() -> None:
    assert KERNEL_COUNTER_NAMES == (
        "modcount", "failed_kreads", "failed_decompress", "failed_becoming", "failed_load_modules", "total_mod_size",
        "total_text_size", "invalid_kread_bytes", "invalid_decompress_bytes", "invalid_becoming_bytes",
        "invalid_mod_bytes",
    )  # fmt: skip
    assert set(COUNTER_NAMES) <= set(stats_service_pb2.Stats.DESCRIPTOR.fields_by_name)


SIZES = st.integers(0, 2**SIZE_BITS - 1)
CALLS = st.lists(
    st.builds(
        Ended,
        st.sampled_from([outcome for outcome in Outcome if outcome is not Outcome.ABANDONED]),
        module=st.sampled_from(["xfs", "kvm", "nvme"]),
        syscall=st.sampled_from(list(Syscall)),
        duplicate=st.booleans(),
        image_bytes=SIZES,
        compressed_bytes=SIZES,
        mod_bytes=SIZES,
        text_bytes=SIZES,
        # A message may name numbers that the enum does not have.
        origin=st.sampled_from([1, 2, 0, -1]),
        requester=st.sampled_from(["udev", "modprobe", ""]),
        errno=st.sampled_from(["", "EEXIST"]),
    )
)


@given(CALLS)
def test_many_calls_at_once_count_as_each_by_itself(calls: list[Ended]) -> None:
    one_by_one, at_once = Counters(), Counters()
    expected: dict[str, FailedModule] = {}
    for call in calls:
        wasted = call.add_to(one_by_one)
        if call.duplicate and call.outcome in (Outcome.BECOMING, Outcome.LOAD):
            module = expected.setdefault(call.module, FailedModule(call.module))
            module.becoming_count += call.outcome == Outcome.BECOMING
            module.load_count += call.outcome == Outcome.LOAD
            module.wasted_bytes += wasted
    failed: dict[str, FailedModule] = {}
    tallies: dict[tuple[int, str], Tally] = {}
    at_once.add_calls(calls, failed, tallies)
    assert at_once == one_by_one
    assert list(failed.items()) == list(expected.items())
    assert sum(tally.calls for tally in tallies.values()) == at_once.calls
    assert sum(tally.wasted_bytes for tally in tallies.values()) == at_once.virtual_mem_wasted_bytes
    for (origin, requester), tally in tallies.items():
        own = Counters()
        mine = [call for call in calls if (call.origin, call.requester) == (origin, requester)]
        own.add_calls(mine, {})
        shared_failures = sum(call.outcome == Outcome.SHARED and bool(call.errno) for call in mine)
        failures = own.calls - own.modcount - own.shared_calls + shared_failures
        assert tally == Tally(own.calls, failures, own.virtual_mem_wasted_bytes)


@given(CALLS, CALLS)
def test_counters_add_up(first: list[Ended], second: list[Ended]) -> None:
    both, left, right = Counters(), Counters(), Counters()
    both.add_calls([*first, *second], {})
    left.add_calls(first, {})
    right.add_calls(second, {})
    left.add(right)
    assert left == both


@given(CALLS)
def test_there_are_no_bytes_without_a_failure_to_count(calls: list[Ended]) -> None:
    # The kernel warns if one of its byte counters is set and the count beside it is not.
    counters = Counters()
    counters.add_calls(calls, {})
    for amount, count in (
        (counters.invalid_kread_bytes, counters.failed_kreads),
        (counters.invalid_decompress_bytes, counters.failed_decompress),
        (counters.invalid_becoming_bytes, counters.failed_becoming),
        (counters.invalid_mod_bytes, counters.failed_load_modules),
        (counters.total_mod_size, counters.modcount),
    ):
        assert count or not amount
    assert counters.calls == len(calls)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (Ended(Outcome.LIVE, mod_bytes=-1), "mod_bytes -1 is no size"),
        (Ended(Outcome.LIVE, text_bytes=2**SIZE_BITS), f"text_bytes {2**SIZE_BITS} is no size"),
        (Ended(Outcome.LOAD, image_bytes=-5), "image_bytes -5 is no size"),
        (Ended(Outcome.BECOMING, compressed_bytes=2**62), f"compressed_bytes {2**62} is no size"),
        (Ended(Outcome.KREAD, image_bytes=-1), "image_bytes -1 is no size"),
    ],
)
def test_a_size_that_makes_no_sense_is_named(call: Ended, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Counters().add_calls([Ended(Outcome.LIVE), call], {})


@pytest.mark.parametrize(
    ("becoming", "load", "reason"), [(1, 0, "Becoming"), (0, 7, "Load"), (2, 3, "Becoming & Load")]
)
def test_the_reason_is_the_kernels_word(becoming: int, load: int, reason: str) -> None:
    module = FailedModule("xfs", becoming, load)
    assert (module.count, module.reason) == (becoming + load, reason)
