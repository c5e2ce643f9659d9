"""Parameters, as kernel/params.c parses them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_svc.checks.parameters import Argument, arguments, parameters_failure, split_arguments
from loader_svc.image.modinfo import Parameter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  a=1  b ", [Argument("a", "1"), Argument("b", None)]),
        ('a="x y" b=2', [Argument("a", "x y"), Argument("b", "2")]),
        ('"a=x y" b=2', [Argument("a", "x y"), Argument("b", "2")]),
        ("a=1=2", [Argument("a", "1=2")]),
        ("a= b", [Argument("a", ""), Argument("b", None)]),
        ("a=1 -- b=2", [Argument("a", "1")]),
        ("--=1 b", [Argument("--", "1"), Argument("b", None)]),
    ],
)
def test_words(text: str, expected: list[Argument]) -> None:
    assert list(split_arguments(text)) == expected


def errno(kind: str, value: str | None) -> str:
    failure = parameters_failure("p" if value is None else f'p="{value}"', [Parameter("p", kind, "")])
    return failure.errno if failure else ""


@pytest.mark.parametrize(
    ("kind", "good", "bad", "beyond"),
    [
        ("byte", ["0", "255", "0xff", "0377", "+1"], ["", "x", "-1", "1.5", "1 ", "0x", "09"], ["256", "0x100"]),
        ("short", ["-32768", "32767"], ["--1", "+-1"], ["32768", "-32769"]),
        ("ushort", ["65535"], ["-1"], ["65536"]),
        ("int", ["2147483647", "-2147483648", "-0x10", "-010"], ["abc", "1a", "0b1"], ["2147483648", "9" * 5000]),
        ("uint", ["4294967295"], ["-0"], ["4294967296"]),
        ("hexint", ["0xffffffff"], ["g"], ["0x100000000"]),
        ("long", [str(2**63 - 1), str(-(2**63))], ["l"], [str(2**63)]),
        ("ulong", [str(2**64 - 1)], ["-1"], [str(2**64)]),
        ("ullong", [str(2**64 - 1)], ["-1"], [str(2**64), "0" * 100 + "7" * 100, str(2**64) + "x"]),
        ("bool", ["y", "N", "1", "0", "on", "OFF", "true", "Yes"], ["", "2", "o", "x"], []),
        ("invbool", ["y", "n"], ["maybe"], []),
        ("bint", ["1", "n"], ["5"], []),
        ("array of int", ["1", "1,2,3"], ["1,,2", "1,x"], ["1,2147483648"]),
        ("charp", ["", "anything"], [], []),
        ("a type of its own", ["anything", ""], [], []),
    ],
)
def test_values(kind: str, good: list[str], bad: list[str], beyond: list[str]) -> None:
    assert {value: errno(kind, value) for value in good} == dict.fromkeys(good, "")
    assert {value: errno(kind, value) for value in bad} == dict.fromkeys(bad, "EINVAL")
    assert {value: errno(kind, value) for value in beyond} == dict.fromkeys(beyond, "ERANGE")


def test_a_text_has_a_limit() -> None:
    assert errno("charp", "x" * 1024) == ""
    assert errno("charp", "x" * 1025) == "ENOSPC"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bool", ""),
        ("bint", ""),
        ("invbool", "EINVAL"),
        ("int", "EINVAL"),
        ("charp", "EINVAL"),
        ("array of int", "EINVAL"),
    ],
)
def test_a_name_alone_is_true_where_that_means_something(kind: str, expected: str) -> None:
    assert errno(kind, None) == expected


def test_dashes_are_underscores_unknown_names_are_passed_over_and_the_last_error_wins() -> None:
    declared = [Parameter("a_b", "int", ""), Parameter("c", "byte", "")]
    assert parameters_failure("a-b=1 nosuch=x nosuch2", declared) is None
    failure = parameters_failure("a-b=x c=256 a_b=7", declared)
    assert failure is not None
    assert (failure.errno, failure.check, failure.value) == ("ERANGE", "parameters", "c=256")
    assert arguments("a-b=1 c a-b=2") == {"a_b": "2", "c": ""}


@given(st.text(max_size=200))
def test_any_text_is_parsed(text: str) -> None:
    for argument in split_arguments(text):
        assert "=" not in argument.name
    parameters_failure(text, [Parameter("a", "int", ""), Parameter("b", "bool", "")])


@given(st.integers(-(2**70), 2**70))
def test_every_whole_number_is_in_range_or_out_of_it(number: int) -> None:
    assert errno("int", str(number)) == ("" if -(2**31) <= number < 2**31 else "ERANGE")
    assert errno("ullong", str(number)) == ("EINVAL" if number < 0 else "" if number < 2**64 else "ERANGE")


@pytest.mark.parametrize(
    ("most", "value", "expected"),
    [
        (3, "1,2,3", ""),
        (3, "1,2,3,4", "EINVAL"),
        (3, "1,2,3,", "EINVAL"),
        (1, "5", ""),
        # Elements are set one by one, so what comes first counts.
        (2, "1,99999999999,3", "ERANGE"),
        (2, "1,2,99999999999", "EINVAL"),
        (None, ",".join("1" * 500), ""),
    ],
)
def test_an_array_takes_so_many_elements(most: int | None, value: str, expected: str) -> None:
    failure = parameters_failure(f"p={value}", [Parameter("p", "array of int", "", most)])
    assert (failure.errno if failure else "") == expected
