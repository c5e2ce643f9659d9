"""Reading the kernel's stats text back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.report import mainline
from modpressure.kernel.report_text import ReportTextError, parse_mainline

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789_", min_size=1, max_size=55)
COUNTS = st.integers(0, 10**12)

FAILED = st.lists(
    st.builds(FailedModule, NAMES, st.integers(0, 10**9), st.integers(1, 10**9)), unique_by=lambda failed: failed.module
)


@given(
    st.builds(
        Counters,
        modcount=COUNTS,
        failed_kreads=COUNTS,
        failed_decompress=COUNTS,
        failed_becoming=st.integers(0, 200),
        failed_load_modules=st.integers(0, 200),
        total_mod_size=COUNTS,
        total_text_size=COUNTS,
        invalid_kread_bytes=COUNTS,
        invalid_decompress_bytes=COUNTS,
        invalid_becoming_bytes=COUNTS,
        invalid_mod_bytes=COUNTS,
    ),
    FAILED,
)
def test_any_text_is_rebuilt_to_the_byte_cut_or_not(counters: Counters, failed: list[FailedModule]) -> None:
    text = mainline(counters, failed, kernel_buffer=True)
    parsed = parse_mainline(text)
    assert parsed.counters == counters
    assert parsed.render() == text
    assert [module.module for module in parsed.failed] == [module.module for module in failed][: len(parsed.failed)]
    assert bool(parsed.cut) == (not text.endswith("\n"))


@given(
    st.integers(85, 130),
    st.lists(st.tuples(st.integers(1, 55), st.integers(1, 12), st.sampled_from("blt")), min_size=1, max_size=9),
    st.integers(85, 400),
    COUNTS,
)
def test_texts_around_the_cut_are_rebuilt_to_the_byte(
    names: int, shapes: list[tuple[int, int, str]], failures: int, wasted_bytes: int
) -> None:
    failed = []
    for number in range(names):
        length, digits, reason = shapes[number % len(shapes)]
        count = 10**digits - 1
        in_load = {"b": 0, "l": count, "t": count // 2}[reason]
        failed.append(FailedModule(f"{number:03}".ljust(length, "x"), count - in_load, in_load))
    text = mainline(Counters(failed_becoming=failures, invalid_becoming_bytes=wasted_bytes), failed, kernel_buffer=True)
    buffer_bytes = 1024 + 64 * min(failures, 112)
    assert len(text) < buffer_bytes
    assert text.count("\n") <= 111 + 20
    parsed = parse_mainline(text)
    assert parsed.render() == text
    assert bool(parsed.cut) == (len(text) == buffer_bytes - 1 and not text.endswith("\n"))


@pytest.mark.parametrize(("becoming", "late"), [(1, 0), (0, 1), (1, 1), (12, 0), (0, 345), (6, 7)])
def test_a_row_is_rebuilt_wherever_it_is_cut(becoming: int, late: int) -> None:
    counters = Counters(failed_becoming=100)
    cuts = set()
    for longer in range(70):
        # Longer names before it push the row that is cut beyond the buffer's end, byte by byte.
        names = [f"{number:03}".ljust(25 + min(max(longer - 14 * number, 0), 14), "x") for number in range(115)]
        text = mainline(counters, [FailedModule(name, becoming, late) for name in names], kernel_buffer=True)
        parsed = parse_mainline(text)
        assert parsed.render() == text
        cuts.add(len(parsed.cut))
    assert cuts >= set(range(68))


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "lacks the row 'Mods ever loaded'"), ("no report\n", "'no report'"), ("Mods ever loaded\tx\n", "no row")],
)
def test_what_is_no_report_is_refused(text: str, said: str) -> None:
    with pytest.raises(ReportTextError, match=said):
        parse_mainline(text)


def test_a_bad_row_is_named() -> None:
    text = mainline(Counters(failed_becoming=5), [FailedModule("xfs", 5)], kernel_buffer=True)
    with pytest.raises(ReportTextError, match="a failed module"):
        parse_mainline(text.replace("Becoming\n", "Sleeping\n"))


@pytest.mark.parametrize(
    "end", ["xfs\tmany", "xfs\t5\tBecoming\t", "xfs\t\tLoad", "xfs\t5\t\x01", "x fs", "xfs\t" + "9" * 5000]
)
def test_what_is_no_beginning_of_a_row_is_named(end: str) -> None:
    text = mainline(Counters(failed_becoming=5), [FailedModule("ext4", 5)], kernel_buffer=True)
    with pytest.raises(ReportTextError, match="is no row of a failed module"):
        parse_mainline(text + end)
