"""What running the code would tell, read from a file."""

from random import Random

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
        ("m,always,quantiles 5,0", "'quantiles 5'"),
        ("m,always,quantiles 5 1,0", "does not rise"),
        ("m,always,quantiles 1 nan,0", "'quantiles 1 nan'"),
        ("m,always,1e99,0", "'1e99'"),
        ("m,always,99999999999,0", "goes beyond"),
        ("m,always,-1,0", "'-1'"),
        ("m,always,1,-EIO in 101%", "'-EIO in 101%'"),
    ],
)
def test_a_row_that_says_nothing_is_refused(row: str, said: str) -> None:
    with pytest.raises(InitResultsError, match=said):
        InitResults.parse(HEADING + row + "\n")


def test_a_missing_column_is_named() -> None:
    with pytest.raises(InitResultsError, match="'result'"):
        InitResults.parse("module,condition,duration_ms\n")


def test_what_is_left_to_chance_is_drawn_once_for_each_init() -> None:
    results = InitResults.parse(HEADING + "m,always,quantiles 1 2 10,-EIO in 25%\n*,always,0.5,0\n")
    drawn = [results.of("m", {}, lambda name: False, lambda seed=seed: Random(seed)) for seed in range(400)]
    assert all(1_000_000 <= result.duration_ns <= 10_000_000 for result in drawn)
    # Half of the draws are below the middle figure; five standard deviations either way.
    assert 150 < sum(result.duration_ns < 2_000_000 for result in drawn) < 250
    assert 57 < sum(result.errno == "EIO" for result in drawn) < 143
    assert {result.errno for result in drawn} == {"", "EIO"}
    assert drawn[7] == results.of("m", {}, lambda name: False, lambda: Random(7))
    assert results.of("other", {}, lambda name: False) == InitResult(500_000, "")


def test_who_is_told_of_and_looks_at_whom() -> None:
    results = InitResults.parse(TEXT)
    assert results.is_told("shy")
    assert not results.is_told("other")
    assert results.looked_at_by("shy") == {"minix"}
    assert results.looked_at_by("odd") == set()
    assert InitResults.parse(HEADING + "*,always,1,0\n").is_told("other")
