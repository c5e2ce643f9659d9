"""Rows of storms as other kernels would print them: honest ones agree, those of another race or law do not."""

import csv
from collections.abc import Iterable
from pathlib import Path

import pytest

from loader_svc.init_results import InitResults
from loader_svc.memory import page_round
from loader_svc.verify import Agreement, verify_storms
from loader_svc.verify.crowd import Targets
from loader_svc.verify.files import Files
from loader_svc.verify.storms import COLUMNS, KERNEL_STACK_BYTES
from modpressure.identity_files import load_identity
from modpressure.kernel.identity import KernelIdentity

PUBLISHED_64 = (28, 18, 51, 25, 1)
"""Late duplicates of 64 workers on xfs in five runs, as kernel-semantics.md has them."""


@pytest.fixture(scope="module")
def identity() -> KernelIdentity:
    return load_identity("measured-6.12")


class Storms:
    """Makes rows by the rules alone and verifies them."""

    def __init__(self, golden: Path, directory: Path, identity: KernelIdentity) -> None:
        self.directories = [golden / "ko", golden / "bad-inputs"]
        self.table = directory / "storms.csv"
        self.identity = identity

    def rows(
        self,
        kernel: str,
        module: str,
        workers: int,
        late: Iterable[int],
        *,
        copies: bool = False,
        peak_kb: int = 0,
        stragglers: int = 0,
    ) -> list[dict[str, object]]:
        with Files(self.directories) as files:
            targets = Targets(files, self.identity, InitResults())
            target = targets.find(module)
            assert target is not None
            plan = targets.plan(target)
        assert plan.layout is not None
        shared = kernel == "A" and not copies
        rows = []
        for repetition, count in enumerate(late):
            readers = 1 if shared else workers
            peak = readers * page_round(plan.version.size_bytes) + (count + 1) * plan.layout_bytes
            becoming = (stragglers > 0) if shared else workers - 1 - count
            row: dict[str, object] = dict.fromkeys(COLUMNS, 0)
            row |= {
                "kernel": kernel, "module": module, "N": workers, "smp": 4, "rep": repetition,
                "separate_copies": int(copies), "files_per_worker": 1, "modcount": 1,
                "failed_becoming": int(becoming), "failed_load": count,
                "invalid_becoming_bytes": becoming * plan.image_bytes,
                "invalid_mod_bytes": count * 2 * plan.image_bytes,
                "ok": workers - stragglers if shared else 1, "eexist": stragglers if shared else workers - 1,
                "vmallocused_peak_kb": (peak + workers * KERNEL_STACK_BYTES) // 1024 + peak_kb,
                "total_mod_size": plan.layout_bytes, "total_text_size": plan.layout.text_bytes,
            }  # fmt: skip
            rows.append(row)
        return rows

    def verify(self, rows: list[dict[str, object]]) -> Agreement:
        with self.table.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return verify_storms(self.table, self.directories, self.identity)


@pytest.fixture
def storms(shared_dir: Path, tmp_path: Path, identity: KernelIdentity) -> Storms:
    return Storms(shared_dir / "data" / "golden", tmp_path, identity)


def test_larger_storms_agree(storms: Storms) -> None:
    rows = [
        *storms.rows("B", "xfs", 64, PUBLISHED_64),
        *storms.rows("B", "xfs", 255, (0, 31, 4)),
        *storms.rows("A", "xfs", 255, (0, 80, 9), copies=True),
        *storms.rows("A", "xfs", 255, (0, 0, 0)),
        *storms.rows("B", "minix", 255, (1, 0, 1)),
        *storms.rows("A", "minix", 255, (0,), stragglers=9),
        *storms.rows("C", "minix", 255, (254, 254)),
        *storms.rows("v6.3", "xfs", 48, (47,)),
    ]
    agreement = storms.verify(rows)
    assert agreement.differences == []
    assert agreement.total == len(rows) + 8


def test_a_group_of_another_race_does_not_agree(storms: Storms) -> None:
    agreement = storms.verify(storms.rows("B", "minix", 64, (40, 50, 60)))
    assert agreement.agreed == 3
    assert [line.split(":")[:2] for line in agreement.differences] == [["B minix N=64", " late duplicates"]]


def test_a_peak_beyond_the_law_does_not_agree(storms: Storms) -> None:
    rows = [
        *storms.rows("B", "xfs", 32, (3,), peak_kb=20_000),
        *storms.rows("B", "xfs", 16, (3,), peak_kb=-20_000),
    ]
    differences = storms.verify(rows).differences
    assert len(differences) == 2
    assert all("peak" in line and "by the law" in line for line in differences)


def test_bytes_and_results_off_by_one_do_not_agree(storms: Storms) -> None:
    rows = storms.rows("B", "minix", 8, (1, 0, 1, 1)) + storms.rows("A", "minix", 8, (0,))
    for row, column in zip(rows, ("invalid_mod_bytes", "eexist", "modcount", "failed_becoming", "ok"), strict=True):
        row[column] = int(str(row[column])) + 1
    assert storms.verify(rows).agreed == 2  # the two comparisons of late duplicates
