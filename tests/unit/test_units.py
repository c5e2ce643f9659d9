import pytest
from hypothesis import given
from hypothesis import strategies as st

from modpressure.units import MAX_BYTES, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1k", 1024),
        ("2G", 2 * 1024**3),
        ("2g", 2 * 1024**3),
        ("2GiB", 2 * 1024**3),
        ("2GB", 2 * 10**9),
        ("512MiB", 512 * 1024**2),
        ("512 MB", 512 * 10**6),
        ("1.5M", 1536 * 1024),
        (" 1T ", 1024**4),
        (str(MAX_BYTES), MAX_BYTES),
    ],
)
def test_bytes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "1X", "1iB", "1Gi", "G", "1e3", "0x10", "1,5M", "١", "1 2", "%", "5%"])
def test_a_wrong_number_of_bytes_is_named(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_bytes(text)
    assert repr(text) in str(raised.value)


def test_more_bytes_than_a_counter_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="9223372036854775808"):
        parse_bytes(str(MAX_BYTES + 1))
    with pytest.raises(ValueError, match="99999P"):
        parse_bytes("99999P")


def test_a_share_is_of_the_whole() -> None:
    assert parse_bytes("50%", whole_bytes=1000) == 500
    assert parse_bytes("12.5 %", whole_bytes=1000) == 125
    assert parse_bytes("100%", whole_bytes=3) == 3
    assert parse_bytes("1k", whole_bytes=3) == 1024
    with pytest.raises(ValueError, match="'101%'"):
        parse_bytes("101%", whole_bytes=1000)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (20 * 1024**2, "20.0 MiB"),
        (-1536, "-1.5 KiB"),
        (3 * 1024**5, "3.0 PiB"),
        (5000 * 1024**5, "5,000.0 PiB"),
    ],
)
def test_bytes_as_people_read_them(value: int, expected: str) -> None:
    assert format_bytes(value) == expected


@given(st.integers(0, 2**60))
def test_what_is_shown_is_off_by_less_than_a_twentieth(value: int) -> None:
    shown = format_bytes(value)
    if "," not in shown:
        assert abs(parse_bytes(shown) - value) <= max(1, value / 20)
