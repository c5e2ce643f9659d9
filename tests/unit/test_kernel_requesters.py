"""Requesters: how many are told apart, and what becomes of the rest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modpressure.kernel.requesters import MAX_REQUESTERS, OTHER, Origin, Requester, Requesters, Tally
from modpressure.v1 import call_pb2

LABELS = st.text(max_size=200) | st.sampled_from([OTHER, "", "udev"])


@given(
    st.lists(st.dictionaries(st.tuples(st.integers(0, 3), LABELS), st.builds(Tally, st.integers(1, 9)), max_size=50))
)
def test_nothing_is_lost_and_the_labels_are_few_and_can_be_kept(
    batches: list[dict[tuple[int, str], Tally]],
) -> None:
    requesters, totals = Requesters(), dict[Requester, int]()
    for batch in batches:
        for requester, tally in requesters.fold(batch).items():
            totals[requester] = totals.get(requester, 0) + tally.calls
    assert sum(totals.values()) == sum(tally.calls for batch in batches for tally in batch.values())
    assert len(totals) <= MAX_REQUESTERS + len(Origin)
    for requester in totals:
        assert "\0" not in requester.label
        assert len(requester.label.encode()) <= 128
        assert requester.origin in tuple(Origin)


def test_who_comes_first_is_told_apart_also_by_the_next_process() -> None:
    tallies = {(2, f"r{number}"): Tally(1) for number in range(MAX_REQUESTERS + 5)}
    first = Requesters()
    folded = first.fold(tallies)
    assert folded[Requester(2, OTHER)] == Tally(5)
    assert folded[Requester(2, "r0")] == Tally(1)
    again = Requesters(folded).fold({(2, "r0"): Tally(1), (2, "late"): Tally(1), (1, "late"): Tally(1)})
    assert again == {Requester(2, "r0"): Tally(1), Requester(2, OTHER): Tally(1), Requester(1, OTHER): Tally(1)}


def test_origins_have_the_contracts_numbers() -> None:
    for origin in Origin:
        assert call_pb2.Origin.Name(call_pb2.Origin.ValueType(origin)) == f"ORIGIN_{origin.name}"
