"""Layouts against those of real kernels: sizes that 6.12 reported for modules it had loaded."""

import csv
import sys

import pytest

from loader_svc.image import LayoutConfig, plan_layout, read_elf

# Both kernels were built with KALLSYMS_ALL, as Debian's are; the custom one says so in the data's README.
CONFIG = LayoutConfig()


@pytest.mark.parametrize(
    ("table", "tree", "least"),
    [("layout-stock.csv", "stock", 50), ("layout-custom.csv", "custom", 30), ("layout-extra.csv", "extra", 5)],
)
def test_layouts_agree_with_what_a_kernel_reported(shared_dir, capsys, table, tree, least):
    golden = shared_dir / "data" / "golden"
    with (golden / table).open(newline="") as file:
        rows = list(csv.DictReader(file))
    at_hand, differing = 0, []
    for row in rows:
        path = golden / "ko" / tree / row["relpath"]
        if not path.is_file():
            continue
        at_hand += 1
        layout = plan_layout(read_elf(path.read_bytes()), CONFIG)
        got = {
            "coresize": layout.core_bytes,
            "total_mod_size_delta": layout.total_bytes,
            "total_text_size_delta": layout.text_bytes,
        }
        differing += [
            (row["module"], key, row[key], got[key]) for key in got if key in row and int(row[key]) != got[key]
        ]
    with capsys.disabled():
        sys.stdout.write(f" {table}: {at_hand} of {len(rows)} rows have their file at hand ")
    assert differing == []
    assert at_hand >= least


def test_layouts_agree_with_the_measured_boots(shared_dir, boot_tree):
    with (shared_dir / "data" / "golden" / "boots" / "sizes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 100
    differing = []
    for row in rows:
        layout = plan_layout(read_elf((boot_tree / row["path"]).read_bytes()), CONFIG)
        got = {
            "coresize_after_init": layout.core_bytes,
            "mem_total_at_alloc": layout.total_bytes,
            "mem_text_at_alloc": layout.text_bytes,
            "mem_init_at_alloc": layout.init_bytes,
            "stats_total_contrib": layout.total_bytes,
            "stats_text_contrib": layout.text_bytes,
        }
        differing += [(row["module"], key, row[key], got[key]) for key in got if row[key] and int(row[key]) != got[key]]
    assert differing == []


def test_a_call_that_ignores_versions_lays_them_out(shared_dir):
    """The one such call that was measured: minix grew by a page."""
    golden = shared_dir / "data" / "golden"
    with (golden / "failures.csv").open(newline="") as file:
        row = next(r for r in csv.DictReader(file) if r["case"] == "bad_symbol_crc_IGNORE_MODVERSIONS")
    elf = read_elf((golden / "bad-inputs" / "bad_sym_crc.ko").read_bytes())
    layout = plan_layout(elf, LayoutConfig(ignore_modversions=True))
    assert layout.total_bytes == int(row["d_total_mod_size"]) > plan_layout(elf, CONFIG).total_bytes
    assert layout.text_bytes == int(row["d_total_text_size"])
