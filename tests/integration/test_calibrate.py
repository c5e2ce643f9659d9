"""``modpressure calibrate``: what it measures, and the file that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loader_svc.virtual import calibrate as calibration
from loader_svc.virtual.costs import KINDS, default_costs, read_costs
from modpressure.cli.main import main

Run = Callable[..., tuple[int, str, str]]

ALWAYS = {
    *("syscall_ns", "open_ns", "read_cached_ns_per_byte", "copy_user_ns_per_byte", "copy_ns_per_byte"),
    *("page_ns", "free_page_ns", "zstd_ns_per_byte", "xz_ns_per_byte", "gzip_ns_per_byte"),
}
"""What can be measured everywhere."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs a command line, with measurements that take no longer than they must."""
    for name, value in (("ROUNDS", 3), ("LOOPS", 100), ("RUNS", 2), ("SAMPLE_BYTES", 1 << 18)):
        monkeypatch.setattr(calibration, name, value)

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_what_is_measured_is_written_and_the_rest_taken_over(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    code, out, err = run("calibrate", "--output", str(path))
    assert (code, err) == (0, "")
    costs, bundled = read_costs(path), default_costs()
    measured = {name for name, text in costs.source.items() if text.startswith("measured by modpressure calibrate: ")}
    assert measured >= ALWAYS
    assert f"{len(measured)} of {len(KINDS)} figures measured here" in out
    for name in KINDS.keys() - measured:
        assert getattr(costs, name) == getattr(bundled, name)
        assert costs.source[name] == f"default: {bundled.source[name]}"
    assert costs.init == bundled.init
    assert costs.xz_ns_per_byte > costs.zstd_ns_per_byte > 0
    assert [each.name for each in tmp_path.iterdir()] == ["costs.toml"], "nothing is left behind"
    # It is taken for a storm, and for a base of the next one.
    assert run("storm", "--virtual", "-m", "xfs", "-w", "3", "--costs", str(path))[0] == 0
    path.write_text("wake_ns = 12345\n")
    again = json.loads(run("calibrate", "--base", str(path), "--json")[1])
    assert again["wake_ns"] == 12345
    assert again["source"]["wake_ns"].startswith("default: ")


def test_without_a_file_it_prints_one(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("calibrate")
    path = tmp_path / "printed.toml"
    path.write_text(out)
    assert code == 0
    assert read_costs(path).source["xz_ns_per_byte"].startswith("measured")


def test_a_write_that_fails_leaves_the_old_file_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "costs.toml"
    path.write_text("wake_ns = 1\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, out, err = run("calibrate", "--output", str(path))
    assert (code, out) == (1, "")
    assert "No space left on device" in err
    assert path.read_text() == "wake_ns = 1\n"
    assert [each.name for each in tmp_path.iterdir()] == ["costs.toml"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--output", "/nonexistent/costs.toml"), "there is no directory '/nonexistent'"),
        (("--base", "/nonexistent.toml"), "/nonexistent.toml can't be read"),
        (("--tree", "/nonexistent"), "/nonexistent"),
    ],
)
def test_bad_input_is_named_in_one_sentence(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = run("calibrate", *arguments)
    assert code in (1, 2)
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1
