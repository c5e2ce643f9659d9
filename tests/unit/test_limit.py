"""How many workers a machine of finite memory bears: by arithmetic where there is no race, by itself where there is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loader_svc.boot import TreeSource
from loader_svc.limit import LimitSearch, LimitSpec
from loader_svc.plan import Plans
from loader_svc.virtual.costs import Costs
from modpressure.cli.main import app
from modpressure.errors import BadRequest, NotFound, OverLimit
from modpressure.kernel.outcome import Outcome
from modpressure.kernel.policy import V6_3, V6_4, V6_5
from modpressure.kernel.system_memory import Amounts, MemoryArea

PAGE = 4096
WORKERS = 60
SLOW_LINK = Costs(link_ns=10**10, jitter=0.3, read_cached_ns_per_byte=1.0, copy_ns_per_byte=1.0)
"""Whoever has the name keeps it until all others have allocated all that they will."""


@pytest.fixture
def tree(tmp_path: Path, make_module: Callable[..., Any], make_section: Callable[..., Any]) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    rodata = make_section(".rodata", os.urandom(7 * PAGE), 2)
    exports = make_section("__ksymtab_strings", b"big_call\0", 2)
    for name, sections, symbol in (
        ("big", [rodata, exports], ("__kstrtab_big_call", 5, 0)),
        ("user", [rodata], ("big_call", 0, 1)),
    ):
        builder = make_module(name, *sections)
        builder.symbols = [("", 1, 0), ("init_module", 1, 1), ("cleanup_module", 1, 1), symbol]
        (root / f"{name}.ko").write_bytes(builder.bytes())
    return root


def rounded(tree: Path, module: str) -> tuple[int, ...]:
    """The sizes of a layout's types, in the enum's order."""
    with (tree / f"{module}.ko").open("rb") as file:
        layout = Plans(1 << 30).of(file.fileno(), module, None, by_kernel=True, flags=0).layout
    assert layout is not None
    return layout.rounded


def types_of(tree: Path, module: str = "big") -> list[int]:
    return [size for size in rounded(tree, module) if size]


def core_bytes(tree: Path, module: str) -> int:
    """What a live module takes of the module area."""
    core = [size for size in rounded(tree, module)[:4] if size]
    return sum(core) + PAGE * len(core)


def pages(tree: Path, module: str = "big") -> int:
    return -(-(tree / f"{module}.ko").stat().st_size // PAGE) * PAGE


def spec(tree: Path, limits: Amounts, **changed: Any) -> LimitSpec:
    base = LimitSpec("big", limits, WORKERS, V6_3, TreeSource(tree), costs=SLOW_LINK)
    return replace(base, **changed)


@pytest.mark.parametrize("seed", range(4))
def test_where_all_lay_out_at_once_it_is_the_area_by_the_layout(tree: Path, seed: int) -> None:
    types = types_of(tree)
    each = sum(types) + PAGE * len(types)
    for bear in (1, 7, 31):
        trial = LimitSearch(spec(tree, Amounts(module_area_bytes=each * bear + each // 2))).trial(seed)
        assert trial.first is not None
        assert trial.first.workers == bear + 1
        refusal = trial.first.refusal
        assert refusal is not None
        assert (refusal.outcome, refusal.shortage.area) == (Outcome.BECOMING, MemoryArea.MODULES)
        assert trial.full.errnos["ENOMEM"] == WORKERS - bear
        assert trial.full.errnos[""] == 1


@pytest.mark.parametrize("seed", range(4))
def test_files_alone_fill_the_vmalloc_area(tree: Path, seed: int) -> None:
    each = pages(tree) + PAGE
    for policy in (V6_3, V6_4):
        trial = LimitSearch(spec(tree, Amounts(vmalloc_bytes=each * 12), policy=policy)).trial(seed)
        assert trial.first is not None
        assert trial.first.workers == 13
        assert trial.first.refusal is not None
        assert trial.first.refusal.outcome is Outcome.KREAD
        assert trial.first.refusal.shortage == (MemoryArea.VMALLOC, each, 0)


def test_the_storm_that_is_named_fails_and_one_worker_less_does_not(tree: Path) -> None:
    costs = Costs(link_ns=2_000_000, jitter=0.5, read_cached_ns_per_byte=20.0, copy_ns_per_byte=30.0, wake_ns=100_000)
    limits = Amounts(memory_bytes=20 * (pages(tree) + sum(types_of(tree))))
    found = set()
    for seed in range(8):
        asked = spec(tree, limits, policy=V6_4, costs=costs, workers=300)
        first = LimitSearch(asked).trial(seed).first
        assert first == LimitSearch(asked).trial(seed).first, "the same seed says the same"
        if first is None:
            continue
        found.add(first.workers)
        assert first.errnos["ENOMEM"]
        for workers, bears in ((first.workers, False), (first.workers - 1, True)):
            again = LimitSearch(replace(asked, workers=workers)).trial(seed)
            assert (again.full.refusal is None) == bears
    assert found
    # No more are borne than have their files at once, and no fewer than have all of everything.
    assert min(found) > 20


def test_a_shared_result_needs_memory_once(tree: Path) -> None:
    once = Amounts(memory_bytes=pages(tree) + sum(types_of(tree)))
    trial = LimitSearch(spec(tree, once, policy=V6_5)).trial(1)
    assert trial.first is None
    assert trial.full.errnos == {"": WORKERS}
    copies = LimitSearch(spec(tree, once, policy=V6_5, separate_copies=True)).trial(1)
    assert copies.first is not None
    assert copies.first.workers == 2


def test_what_it_needs_takes_its_share_first(tree: Path) -> None:
    core = core_bytes(tree, "big")
    mine = types_of(tree, "user")
    each = sum(mine) + PAGE * len(mine)
    for area_bytes, first in ((core + 5 * each, 6), (core + 5 * each - 1, 5)):
        trial = LimitSearch(spec(tree, Amounts(module_area_bytes=area_bytes), module="user")).trial(0)
        assert trial.first is not None
        assert trial.first.workers == first
    with pytest.raises(OverLimit, match="there is no room for big, which user needs"):
        LimitSearch(spec(tree, Amounts(module_area_bytes=PAGE), module="user")).trial(0)


def test_what_can_not_be_loaded_at_all_says_so(tree: Path) -> None:
    (tree / "junk.ko").write_bytes(b"no module" * 100)
    with pytest.raises(BadRequest, match="junk can't be loaded at all: ENOEXEC"):
        LimitSearch(spec(tree, Amounts(memory_bytes=1 << 30), module="junk")).trial(0)
    with pytest.raises(NotFound, match="nosuch"):
        LimitSearch(spec(tree, Amounts(), module="nosuch"))


def test_the_command_answers_in_a_table_in_json_and_by_its_exit_code(tree: Path) -> None:
    arguments = ["limit", "-m", "big", "-w", "30", "--tree", str(tree), "--policy", "v6.3", "--repeat", "3"]
    fits = CliRunner().invoke(app, arguments)
    assert fits.exit_code == 0, fits.output
    assert "30 workers fit, with 3 seeds." in fits.output
    # So wide that no cell is wrapped, however long the tree's path is.
    wide = {"COLUMNS": "400"}
    short = CliRunner().invoke(app, [*arguments, "--memory", str(pages(tree) + PAGE)], env=wide)
    assert short.exit_code == 1
    rows = [line.split()[1:4] for line in short.output.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [["1", "becoming", "pages"]] * 3
    assert "Fails first at 1 worker; 30 fail with 3 of 3 seeds." in short.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--memory", "4KiB", "--seed", "5", "--json"]).output)
    assert not found["fits"]
    assert [(each["seed"], each["fails_at"], each["stage"]) for each in found["seeds"]] == [
        (seed, 1, "kread") for seed in (5, 6, 7)
    ]
    assert {each["left_bytes"] for each in found["seeds"]} == {PAGE}
    assert CliRunner().invoke(app, [*arguments, "--memory", "0"]).exit_code == 2
