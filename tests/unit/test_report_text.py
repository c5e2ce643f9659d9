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
