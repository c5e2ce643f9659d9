"""Page sizes and tokens: AIP-158."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modpressure.errors import BadRequest
from stats_svc.paging import MAX_PAGE_SIZE, number_position, page_size, page_token, token_position


def test_no_size_means_the_default_and_too_much_the_most() -> None:
    assert [page_size(asked) for asked in (0, 1, 10_000, 10_001, 2**31 - 1)] == [1000, 1, MAX_PAGE_SIZE, 10_000, 10_000]
    with pytest.raises(BadRequest, match="page_size -1 is negative"):
        page_size(-1)


@given(st.text(min_size=1), st.text(), st.integers())
def test_a_token_leads_back_to_its_position(position: str, first: str, second: int) -> None:
    token = page_token(position, first, second)
    assert token.isascii() and "=" not in token
    assert token_position(token, first, second) == position


@given(st.text(min_size=1))
def test_any_other_text_is_no_token(text: str) -> None:
    with pytest.raises(BadRequest, match="is none of this list's"):
        token_position(text, "events", "default")


def test_no_token_is_the_beginning() -> None:
    assert token_position("", "events") == ""
    assert number_position("", "events") == 0


@pytest.mark.parametrize("position", ["x", "-1", "1.5", "٣", "9" * 30])
def test_where_a_number_is_needed_another_position_is_refused(position: str) -> None:
    with pytest.raises(BadRequest):
        number_position(page_token(position, "events"), "events")
    assert number_position(page_token(17, "events"), "events") == 17
