"""Patterns against the C library's own fnmatch, and tables of patterns against a plain reading of the rules."""

import ctypes
import ctypes.util

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from loader_svc.trees.names import normal_alias
from loader_svc.trees.patterns import PatternTable, matches

libc = ctypes.CDLL(ctypes.util.find_library("c"))


def libc_matches(pattern: str, text: str) -> bool:
    return libc.fnmatch(pattern.encode(), text.encode(), 0) == 0


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("pci:v00008086d*sv*", "pci:v00008086d1237sv0000"),
        ("usb:v[0-9a-c]p?*", "usb:vbp1"),
        ("a[!b-d]e", "aae"),
        ("a[^b-d]e", "ace"),
        ("a[]b]c", "a]c"),
        ("a[b", "a[b"),
        ("x\\*y", "x*y"),
        ("x\\", "x"),
        ("[[:digit:]_]*", "7up"),
        ("*a*b*c", "xxaxxbxxcxxc"),
        ("ab*ba", "aba"),
        ("", ""),
    ],
)
def test_a_pattern_is_read_as_the_c_library_reads_it(pattern: str, text: str) -> None:
    assert matches(pattern, text) == libc_matches(pattern, text)
    assert matches(pattern, text + "z") == libc_matches(pattern, text + "z")


@settings(max_examples=1000, deadline=None)
@given(pattern=st.text("ab-*?[]!^\\", max_size=10), text=st.text("ab-[]\\", max_size=8))
@example(pattern="[a-]", text="-")
@example(pattern="[b-a]", text="b")
@example(pattern="[!]", text="[!]")
@example(pattern="[]-a]", text="^")
@example(pattern="[\\]]", text="]")
def test_any_pattern_matches_what_the_c_library_says(pattern: str, text: str) -> None:
    # What kmod takes for a pattern has brackets that match; of others the C library makes this or that.
    assume(normal_alias(pattern) is not None)
    assert matches(pattern, text) == libc_matches(pattern, text)


@pytest.mark.timeout(20)
def test_a_pattern_made_to_be_slow_is_not() -> None:
    assert not matches("*a?" * 30 + "b", "a" * 3000)


def test_a_table_gives_values_in_the_order_of_the_patterns_with_repeats() -> None:
    table = PatternTable(["b:*", "a:*", "a:1", "?:1", "a:[12]"], ["five", "one", "one", "two", "one"])
    assert table.find("a:1") == ["one", "one", "two", "one"]
    assert table.find("b:") == ["five"]
    assert table.find("c:2") == []


def test_before_the_first_wildcard_a_table_compares_by_letter() -> None:
    table = PatternTable(["a\\b", "a\\b*", "a*\\*"], ["plain", "wild", "escaped"])
    assert table.find("a\\b") == ["plain", "wild"]
    assert table.find("a-*") == ["escaped"]


def test_without_priorities_what_was_found_last_comes_first() -> None:
    table = PatternTable(["a*", "ab*", "abc", "ab?", "a*", "ab*c"], ["1", "2", "3", "4", "5", "6"])
    # As kmod 30 answers for such a modules.builtin.modinfo: literal, then by the place of the wildcard.
    assert table.find_unranked("abc") == ["3", "4", "2", "6", "1", "5"]
