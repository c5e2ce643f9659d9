"""The text reports: report-formats.md."""

from __future__ import annotations

import pytest

from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.report import ReportFormat, mainline, report, rfc
from modpressure.v1 import stats_service_pb2

# The screen shot of the patch that began it all: https://lore.kernel.org/all/20230311051712.4095040-1-mcgrof@kernel.org/
SCREEN_SHOT = """\
           Modules loaded       67
        Total module size       11464704
      Total mod text size       4194304
       Failed kread bytes       890064
        Failed kmod bytes       890064
      Invalid kread bytes       890064
 Invalid decompress bytes       0
        Invalid mod bytes       890064
         Average mod size       171115
    Average mod text size       62602
Failed modules:
                kvm_intel
                      kvm
                irqbypass
         crct10dif_pclmul
      ghash_clmulni_intel
             sha512_ssse3
           sha512_generic
              aesni_intel
              crypto_simd
                   cryptd
                    evdev
                serio_raw
               virtio_pci
                     nvme
                nvme_core
    virtio_pci_legacy_dev
                   t10_pi
           crc64_rocksoft
    virtio_pci_modern_dev
             crc32_pclmul
                   virtio
             crc32c_intel
              virtio_ring
                    crc64
"""


def test_the_screen_shot_comes_out_of_its_counters() -> None:
    counters = Counters(modcount=67, total_mod_size=11464704, total_text_size=4194304, invalid_mod_image_bytes=890064)
    names = SCREEN_SHOT.partition("Failed modules:\n")[2].split()
    assert len(names) == 24
    text = rfc(counters, [FailedModule(name, load_count=1) for name in names], as_posted=True)
    # The screen shot shows the TABs as a terminal does.
    assert text.expandtabs(8) == SCREEN_SHOT
    assert text.count("\t") == 10


def test_the_kread_rows_of_the_rfc_show_the_kread_counter_since_the_next_version() -> None:
    counters = Counters(invalid_kread_bytes=5, invalid_mod_image_bytes=890064, invalid_mod_bytes=2 * 890064)
    rows = dict(row.split("\t") for row in rfc(counters, []).splitlines())
    assert {label.strip(): value for label, value in rows.items()} == {
        "Modules loaded": "0",
        "Total module size": "0",
        "Total mod text size": "0",
        "Failed kread bytes": "5",
        "Failed kmod bytes": "890064",
        "Invalid kread bytes": "5",
        "Invalid decompress bytes": "0",
        "Invalid mod bytes": "890064",
    }


MAINLINE = (
    "         Mods ever loaded\t3\n"
    "     Mods failed on kread\t1\n"
    "Mods failed on decompress\t2\n"
    "  Mods failed on becoming\t3\n"
    "      Mods failed on load\t2\n"
    "        Total module size\t10\n"
    "      Total mod text size\t4\n"
    "       Failed kread bytes\t7\n"
    "  Failed decompress bytes\t9\n"
    "    Failed becoming bytes\t10\n"
    "        Failed kmod bytes\t11\n"
    " Virtual mem wasted bytes\t37\n"
    "         Average mod size\t4\n"
    "    Average mod text size\t2\n"
    "     Avg fail kread bytes\t7\n"
    "  Avg fail becoming bytes\t4\n"
    "    Avg fail decomp bytes\t5\n"
    "  Average fail load bytes\t6\n"
    "Duplicate failed modules:\n"
    "              Module-name\t How-many-times\t                   Reason\n"
    "                      xfs\t              3\t          Becoming & Load\n"
    "                      kvm\t              1\t                 Becoming\n"
)


def test_mainline_has_every_row_and_rounds_averages_up() -> None:
    counters = Counters(
        modcount=3, failed_kreads=1, failed_decompress=2, failed_becoming=3, failed_load_modules=2,
        total_mod_size=10, total_text_size=4, invalid_kread_bytes=7, invalid_decompress_bytes=9,
        invalid_becoming_bytes=10, invalid_mod_bytes=11,
    )  # fmt: skip
    failed = [FailedModule("xfs", becoming_count=1, load_count=2), FailedModule("kvm", becoming_count=1)]
    assert mainline(counters, failed) == MAINLINE


def test_averages_appear_only_where_there_is_something_to_average() -> None:
    # A failed read by finit_module counts, and wastes no byte that is shown.
    text = mainline(Counters(failed_kreads=3, modcount=1), [])
    assert text.count("\n") == 12
    assert "vg fail" not in text and "verage" not in text


def duplicates(count: int) -> tuple[Counters, list[FailedModule]]:
    failed = [FailedModule(f"module_{number:03}", becoming_count=1) for number in range(count)]
    return Counters(failed_becoming=count), failed


@pytest.mark.parametrize("count", [0, 1, 90, 100, 111, 112, 113, 500])
def test_the_kernels_buffer_cuts_the_text_within_a_row(count: int) -> None:
    counters, failed = duplicates(count)
    whole = mainline(counters, failed)
    assert whole.count("module_") == count
    cut = mainline(counters, failed, kernel_buffer=True)
    buffer = 1024 + 64 * min(count, 112)
    assert whole.startswith(cut)
    assert len(cut) <= buffer - 1
    # Rows stop before the 112th, whatever the room.
    assert cut.count("module_") <= 111
    if len(cut) < min(len(whole), buffer - 1):
        assert cut.count("module_") == 111
        assert cut.endswith("\n")


def test_a_row_that_is_cut_in_two_stays_cut() -> None:
    counters, failed = duplicates(100)
    for module in failed:
        # Longer than its column, so that the rows take more than their budget soon.
        module.module += "_with_a_long_name_to_it"
    text = mainline(counters, failed, kernel_buffer=True)
    assert len(text) == 1024 + 64 * 100 - 1
    assert not text.endswith("\n")


def test_a_format_is_found_by_its_number_and_word() -> None:
    counters = Counters(invalid_mod_image_bytes=8)
    assert report(ReportFormat.RFC, counters, []) == rfc(counters, [])
    assert report(ReportFormat.RFC_AS_POSTED, counters, []) == rfc(counters, [], as_posted=True)
    assert report(ReportFormat.MAINLINE, counters, []) == mainline(counters, [])
    assert [kind.word for kind in ReportFormat] == ["rfc", "rfc-as-posted", "mainline"]
    for kind in ReportFormat:
        number = stats_service_pb2.ReportFormat.ValueType(kind)
        assert stats_service_pb2.ReportFormat.Name(number) == f"REPORT_FORMAT_{kind.name}"
