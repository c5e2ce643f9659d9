"""``modpressure verify`` and ``modpressure identity`` as a user calls them."""

from __future__ import annotations

import csv
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


def test_pairs_whose_files_are_away_are_not_run_and_said_so(golden: Path, tmp_path: Path) -> None:
    script, table = tmp_path / "waits.script", tmp_path / "waits.csv"
    script.write_text(
        "w_success_copy waittest /t/away.ko 0 /t/away.ko.c0 1200 0 0 0\n"
        "unmeasured waittest /t/orc_slow.ko 0 /t/other.ko 1200 0 0 0\n"
    )
    table.write_text("\n".join((golden / "waits.csv").read_text().splitlines()[:2]) + "\n")
    files = ("--script", script, "--csv", table, "--files", golden / "bad-inputs")
    code, out, _ = modpressure("verify", "waits", *files, "--init", golden / "init-results.csv")
    assert (code, out.splitlines()) == (
        1,
        [
            "A unmeasured: not run, there is no file /t/other.ko",
            "A w_success_copy: not run, there is no file /t/away.ko",
            "0 of 1 agree",
        ],
    )


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


@pytest.mark.parametrize(
    ("kind", "table", "column", "value"),
    [
        ("storms", "storms.csv", "N", "2147483648"),
        ("storms", "storms.csv", "N", "0"),
        ("storms", "storms.csv", "smp", "-3"),
        ("stress", "stress-workers.csv", "workers", "99999999999"),
        ("stress", "stress-workers.csv", "workers", "many"),
    ],
)
def test_absurd_numbers_of_a_table_are_named_and_not_simulated(
    golden: Path, tmp_path: Path, kind: str, table: str, column: str, value: str
) -> None:
    with (golden / table).open() as file:
        reader = csv.DictReader(file)
        row = next(reader)
    with (tmp_path / table).open("w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames or ())
        writer.writeheader()
        writer.writerow(row | {column: value})
    code, out, err = modpressure("verify", kind, "--csv", tmp_path / table, "--files", golden / "ko")
    assert (code, out) == (2, "")
    assert f"column {column}: " in err
    assert value in err
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


# --- whole boots ---


def some_boots(golden: Path, directory: Path, names: tuple[str, ...]) -> Path:
    """Make a directory of recorded boots that has only some of them."""
    directory.mkdir()
    rows = (golden / "boots" / "boots.csv").read_text().splitlines()
    kept = [row for row in rows[1:] if row.rpartition(",")[2] in names]
    (directory / "boots.csv").write_text("\n".join([rows[0], *kept]) + "\n")
    for name in ("uevents", "env", "calls", "traces", "modroot.tar.xz", "dups-wide.csv", "initfail-wide.csv"):
        (directory / name).symlink_to(golden / "boots" / name)
    return directory


def test_recorded_boots_are_booted_again_and_held_against_what_was_recorded(golden: Path, tmp_path: Path) -> None:
    calibrating = some_boots(golden, tmp_path / "two", ("B-N2-r1",))
    others = some_boots(golden, tmp_path / "four", ("B-N4-r1", "A-N4-r1"))
    code, out, err = modpressure(
        "verify", "boots", others, "--calibrate", calibrating, "--repeat", 1, "--calls", "--json", "--jobs", 1
    )
    assert err == ""
    document = json.loads(out)
    assert document["calibrated_from"] == ["B-N2-r1"]
    assert [table["boots"] for table in document["tables"]] == [["A-N4-r1"], ["B-N4-r1"]]
    for table in document["tables"]:
        rows = {row["what"]: row for row in table["rows"]}
        for what, value in (("workers", "24"), ("modules loaded", "110"), ("total module size", "11497472")):
            assert (rows[what]["recorded"], rows[what]["simulated"], rows[what]["agrees"]) == (value, value, True)
    shared, single = document["tables"]
    assert shared["rows"][0]["bound"] == "at most 2 a boot"
    assert {"module": "kvm", "recorded": "3", "simulated": "3"} in single["modules"]
    assert [(each["agreed"], each["total"], each["differences"]) for each in document["calls"]] == [
        (222, 222, []),
        (233, 233, []),
    ]
    assert code == (0 if document["agreed"] == document["total"] else 1)


def test_boots_that_cannot_be_booted_again_are_refused_in_one_sentence(golden: Path, tmp_path: Path) -> None:
    four = some_boots(golden, tmp_path / "four", ("B-N4-r1",))
    code, out, err = modpressure("verify", "boots", four)
    assert (code, out) == (2, "")
    assert "has no boot with 2 CPUs and a trace: --calibrate DIR names one" in err
    assert "boots.csv" in modpressure("verify", "boots", tmp_path)[2]
    two = some_boots(golden, tmp_path / "two", ("B-N2-r1",))
    (two / "modroot.tar.xz").unlink()
    assert "--tree names the modules" in modpressure("verify", "boots", two)[2]
    (two / "modroot.tar.xz").write_bytes(b"no archive")
    assert "can't be unpacked" in modpressure("verify", "boots", two)[2]
