"""Decompression by a kernel against measured calls: which files fail there, which later, and with how many bytes."""

import csv

import pytest

from loader_svc.image import ImageError, ImageProblem, kernel_decompress, plan_layout, read_elf

ALGORITHMS = {"A": "zstd", "B": "zstd", "A-xz": "xz", "A-gzip": "gzip"}
COMPRESSED_FILE = 4


@pytest.fixture(scope="module")
def rows(shared_dir):
    """The calls with flag 4 whose file is at hand and not empty (an empty one fails at the read)."""
    golden = shared_dir / "data" / "golden"
    with (golden / "failures.csv").open(newline="") as file:
        calls = [row for row in csv.DictReader(file) if row["flags"] == str(COMPRESSED_FILE)]
    for row in calls:
        path = golden / "bad-inputs" / row["path"].removeprefix("/t/")
        row["data"] = path.read_bytes() if path.is_file() else b""
    return [row for row in calls if row["data"]]


@pytest.fixture(scope="module")
def this_module_bytes(shared_dir):
    """The size of struct module in the measured kernel: that of a module which it loads."""
    return read_elf((shared_dir / "data/golden/bad-inputs/minix.ko").read_bytes()).this_module_bytes


def counted(row, image, problem):
    """Return what the kernel adds for a call that ends where `problem` says: stage, and bytes."""
    clen = len(row["data"])
    if image is None:
        return "decompress", clen
    if isinstance(problem, ImageError):
        return "becoming", len(image) + clen
    return None, 0


def test_measured_calls_fail_where_and_as_they_did(rows, this_module_bytes):
    assert len(rows) > 40
    checked = set()
    for row in rows:
        image = problem = None
        try:
            image = b"".join(kernel_decompress(row["data"], ALGORITHMS[row["kernel"]]))
            read_elf(image, this_module_bytes=this_module_bytes)
        except ImageProblem as raised:
            problem = raised
        stage, size_bytes = counted(row, image, problem)
        case = (row["kernel"], row["case"], str(problem))
        if stage is not None:
            assert row["errno_name"] == problem.errno, case
            assert row[f"d_failed_{stage}"] == "1", case
            assert row[f"d_invalid_{stage}_bytes"] == str(size_bytes), case
        else:
            assert row["d_failed_decompress"] == "0", case
        if image is not None:
            lengths_agree(row, len(image), case)
        checked.add((row["kernel"], stage))
    stages = {(kernel, stage) for kernel in ALGORITHMS for stage in ("decompress", None)}
    assert stages < checked
    assert {("A", "becoming"), ("B", "becoming"), ("A-gzip", "becoming")} <= checked


def lengths_agree(row, image_bytes, case):
    """Check the image's length by the bytes of a call that failed later, or by the layout of one that succeeded."""
    clen = len(row["data"])
    if row["d_failed_becoming"] == "1":
        assert row["d_invalid_becoming_bytes"] == str(image_bytes + clen), case
    if row["d_failed_load_modules"] == "1":
        assert row["d_invalid_mod_bytes"] == str(2 * image_bytes + clen), case
    if row["errno_name"] == "OK":
        image = b"".join(kernel_decompress(row["data"], ALGORITHMS[row["kernel"]]))
        assert row["d_total_mod_size"] == str(plan_layout(read_elf(image)).total_bytes), case
