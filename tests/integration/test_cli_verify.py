"""``modpressure verify`` and ``modpressure identity`` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def modpressure(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-c", "from modpressure.cli.main import run; run()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Path:
    return shared_dir / "data" / "golden"


def failures(golden: Path, table: Path, *more: object) -> tuple[int, str, str]:
    files = (golden / "bad-inputs", golden / "ko" / "extra")
    arguments = ("--script", golden / "failures.script", "--csv", table, "--files", *files)
    return modpressure("verify", "failures", *arguments, "--init", golden / "init-results.csv", *more)


def test_all_failures_agree(golden: Path) -> None:
    code, out, err = failures(golden, golden / "failures.csv")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1] == "143 of 143 agree"
    assert "A common_symbol: not run, there is no file /t/common_symbol.ko" in lines[:-1]


def test_each_row_that_differs_is_shown_and_the_exit_code_is_1(golden: Path, tmp_path: Path) -> None:
    table = tmp_path / "failures.csv"
    text = (golden / "failures.csv").read_text()
    # One errno that is wrong on both kernels, and one counter.
    text = text.replace(",-1,16,EBUSY,", ",-1,17,EEXIST,").replace(
        "A,dup_live_again,finit,/t/minix.ko,0,107272,-1,17,EEXIST,0,",
        "A,dup_live_again,finit,/t/minix.ko,0,107272,-1,17,EEXIST,9,",
    )
    table.write_text(text)
    code, out, _ = failures(golden, table)
    assert code == 1
    differing = out.splitlines()[-4:]
    assert differing[-1] == "140 of 143 agree"
    assert "A dup_live_again: total_mod_size measured +9, simulated +0" in differing
    both = [line for line in differing if "dup_live_othername_same_content" in line]
    assert both == [f"{k} dup_live_othername_same_content: errno measured EEXIST, simulated EBUSY" for k in "AB"]


def test_a_measured_row_without_its_file_does_not_agree(golden: Path, tmp_path: Path) -> None:
    table = tmp_path / "failures.csv"
    heading, row = (golden / "failures.csv").read_text().splitlines()[:2]
    table.write_text(f"{heading}\n{row.replace('one_byte', 'common_symbol').replace('onebyte', 'common_symbol.ko')}\n")
    code, out, _ = failures(golden, table, "--json")
    document = json.loads(out)
    assert (code, document["agreed"], document["total"]) == (1, 0, 1)
    assert document["differences"] == ["A common_symbol: not run, there is no file /t/common_symbol.ko"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("verify", "stats", "/nowhere.txt"), 1, "/nowhere.txt"),
        (("verify", "layout", "/nowhere.csv", "/"), 1, "/nowhere.csv"),
        (("verify", "storms", "--csv", "{csv}", "--files", "/nowhere"), 1, "/nowhere"),
        (("verify", "storms", "--csv", "{bad}", "--files", "/tmp"), 2, "lacks the column 'kernel'"),
        (("verify", "stress", "--csv", "{bad}", "--files", "/tmp"), 2, "lacks the column 'kernel'"),
        (("verify", "waits", "--script", "{bad}", "--csv", "{csv}", "--files", "/tmp"), 2, "has no operation"),
        (("verify", "layout", "{csv}", "/tmp", "--identity", "beos"), 1, "'beos'"),
        (("identity", "show", "beos"), 1, "'beos'"),
        (("identity", "from", "/nowhere"), 1, "/nowhere"),
        (("identity", "from", "{bad}"), 2, "sets no option"),
    ],
)
def test_bad_usage_gets_one_sentence(
    golden: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("nothing\n")
    filled = [each.format(csv=golden / "storms.csv", bad=bad) for each in arguments]
    got, out, err = modpressure(*filled)
    assert (got, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1


def test_an_identity_is_made_shown_and_used(golden: Path, tmp_path: Path) -> None:
    made = tmp_path / "mine.toml"
    symvers = golden / "kernel-identity" / "Module.symvers.xz"
    config = golden / "boots" / "config-boot"
    arguments = ("--release", "6.12.95-oracle", "--blacklist", "orc_exp2", "-o", made)
    assert modpressure("identity", "from", config, symvers, *arguments) == (0, "", "")
    code, out, _ = modpressure("identity", "show", made, "--json")
    shown = json.loads(out)
    assert (code, shown["vermagic"]) == (0, "6.12.95-oracle SMP preempt mod_unload modversions ")
    assert (shown["symbols"], shown["blacklist"], shown["decompressors"]) == (8506, ["orc_exp2"], ["zstd"])
    # That kernel is built without MODULE_FORCE_LOAD, and no configuration tells the size of struct module.
    _, out, _ = failures(golden, golden / "failures.csv", "--identity", made, "--json")
    kernels = {line.partition(":")[0] for line in json.loads(out)["differences"]}
    assert kernels == {
        f"{kernel} {case}"
        for kernel in "AB"
        for case in (
            "no_vermagic_tag",
            "bad_symbol_crc_IGNORE_MODVERSIONS",
            "no_modinfo_section",
            "this_module_wrong_size",
        )
    }
