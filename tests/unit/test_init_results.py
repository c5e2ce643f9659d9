"""What running the code would tell, read from a file."""

import pytest

from loader_svc.init_results import InitResult, InitResults, InitResultsError

HEADING = "module,condition,duration_ms,result\n"
TEXT = HEADING + (
    "fails,always,0,-ENODEV\n"
    "odd,always,7,5\n"
    "slow,always,parameter ms (default 3),parameter ret (default 0)\n"
    'shy,"while minix is live (both register, a name)",2,-EBUSY\n'
    "shy,always,1,0\n"
)


def of(module: str, live: str = "", **arguments: str) -> InitResult:
    return InitResults.parse(TEXT).of(module, arguments, lambda name: name == live)


def test_results() -> None:
    assert of("other") == InitResult(0, "")
    assert of("fails") == InitResult(0, "ENODEV")
    assert of("odd") == InitResult(7_000_000, "")
    assert of("slow") == InitResult(3_000_000, "")
    assert of("slow", ms="12", ret="-5") == InitResult(12_000_000, "EIO")
    assert of("slow", ms="0x10", ret="x") == InitResult(16_000_000, "")
    assert of("slow", ms="-1") == InitResult(0, "")
    assert of("shy", live="minix") == InitResult(2_000_000, "EBUSY")
    assert of("shy", live="xfs") == InitResult(1_000_000, "")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("m,sometimes,0,0", "'sometimes'"),
        ("m,always,soon,0", "'soon'"),
        ("m,always,0,-ENOSUCH", "'-ENOSUCH'"),
        ("m,always", "'' of 'm'"),
    ],
)
def test_a_row_that_says_nothing_is_refused(row: str, said: str) -> None:
    with pytest.raises(InitResultsError, match=said):
        InitResults.parse(HEADING + row + "\n")


def test_a_missing_column_is_named() -> None:
    with pytest.raises(InitResultsError, match="'result'"):
        InitResults.parse("module,condition,duration_ms\n")
