"""The simulation against what real kernels were measured to do: all rows of the measured data that are at hand."""

from pathlib import Path

import pytest

from loader_svc.init_results import InitResults
from loader_svc.verify import (
    Agreement,
    verify_failures,
    verify_layout,
    verify_stats,
    verify_storms,
    verify_stress,
    verify_waits,
)
from modpressure.identity_files import load_identity
from modpressure.kernel.identity import KernelIdentity


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Path:
    return shared_dir / "data" / "golden"


@pytest.fixture(scope="module")
def identity() -> KernelIdentity:
    return load_identity("measured-6.12")


@pytest.fixture(scope="module")
def init_results(golden: Path) -> InitResults:
    return InitResults.parse((golden / "init-results.csv").read_text())


def differing(agreement: Agreement) -> list[str]:
    return [*agreement.differences, *([] if agreement.is_complete else [agreement.summary])]


@pytest.mark.parametrize(
    ("script", "rows"), [("failures.script", 143), ("failures-xz.script", 12), ("failures-gzip.script", 11)]
)
def test_errno_and_counters_of_every_call(
    golden: Path, identity: KernelIdentity, init_results: InitResults, script: str, rows: int
) -> None:
    directories = [golden / "bad-inputs", golden / "ko" / "extra"]
    agreement = verify_failures(golden / script, golden / "failures.csv", directories, init_results, identity)
    assert differing(agreement) == []
    assert agreement.total == rows


def test_who_waits_and_what_the_waiters_get(golden: Path, identity: KernelIdentity, init_results: InitResults) -> None:
    script, table = golden / "waits.script", golden / "waits.csv"
    agreement = verify_waits(script, table, [golden / "bad-inputs"], init_results, identity)
    assert differing(agreement) == []
    assert agreement.total == 16


@pytest.mark.parametrize(("name", "rows"), [("stock", 57), ("custom", 36), ("extra", 7)])
def test_sizes_of_modules(golden: Path, identity: KernelIdentity, name: str, rows: int) -> None:
    agreement = verify_layout(golden / f"layout-{name}.csv", golden / "ko" / name, identity)
    assert differing(agreement) == []
    assert agreement.total == rows


@pytest.mark.slow
def test_storms(golden: Path, identity: KernelIdentity) -> None:
    agreement = verify_storms(golden / "storms.csv", [golden / "ko" / "storm", golden / "bad-inputs"], identity)
    assert differing(agreement) == []
    assert agreement.total == 261 + 39  # rows, and groups of repetitions of one module


def test_stress_workers(golden: Path, identity: KernelIdentity) -> None:
    directories = [golden / "ko" / "storm", golden / "bad-inputs"]
    agreement = verify_stress(golden / "stress-workers.csv", directories, identity)
    assert differing(agreement) == []
    assert agreement.total == 8


def test_texts_of_whole_boots_are_rebuilt_to_the_byte(golden: Path) -> None:
    agreement = verify_stats(sorted((golden / "boots").glob("stats-*.txt")))
    assert differing(agreement) == []
    assert agreement.total == 33


def test_texts_are_rebuilt_to_the_byte(golden: Path) -> None:
    agreement = verify_stats([golden / "stats"])
    assert differing(agreement) == []
    assert agreement.total == 98


def test_the_symbols_of_the_built_in_identity_are_the_measured_kernels(golden: Path, identity: KernelIdentity) -> None:
    from modpressure.identity_files import read_symvers

    assert read_symvers(golden / "kernel-identity" / "Module.symvers.xz") == identity.symbols
