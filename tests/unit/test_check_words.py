"""The check for what must not be in the repository, on repositories of a few lines."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_words.py"

# In two parts, so that this file may be in the repository.
REGISTRY = "py" + "pi.org"
HOME = "/ho" + "me/someone/modules"
BESIDE = ".." + "/shared"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    return tmp_path


def check(repository: Path) -> tuple[int, list[str]]:
    subprocess.run(["git", "add", "--all"], cwd=repository, check=True)
    script = repository / "scripts" / SCRIPT.name
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


def test_the_check_passes_itself(repository: Path) -> None:
    assert check(repository) == (0, [])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"https://{REGISTRY}/simple", "host name of a package registry"),
        (f"see {HOME}/x.ko", "path that only one machine has"),
        (f"cat {BESIDE}/x", "mention of what lies beside the repository"),
    ],
)
def test_a_hit_is_named_with_its_place(repository: Path, text: str, why: str) -> None:
    (repository / "README.md").write_text(f"first\n{text}\n")

    assert check(repository) == (1, [f"README.md:2: {why}: {text}"])


def test_tests_and_the_makefile_may_look_beside_the_repository(repository: Path) -> None:
    (repository / "tests").mkdir()
    (repository / "tests" / "conftest.py").write_text(f"{BESIDE}\n")
    (repository / "Makefile").write_text(f"{BESIDE}\n")

    assert check(repository) == (0, [])


def test_what_git_does_not_track_and_what_is_no_text_is_passed_over(repository: Path) -> None:
    (repository / ".gitignore").write_text("built/\n")
    (repository / "built").mkdir()
    (repository / "built" / "log").write_text(REGISTRY)
    (repository / "picture.bin").write_bytes(b"\xff\xfe" + REGISTRY.encode())

    assert check(repository) == (0, [])


@pytest.mark.parametrize("text", ["/lib/modules/6.12", "$PWD/work/x", "a/root/b", "the /root of a tree"])
def test_paths_that_any_machine_may_have_pass(repository: Path, text: str) -> None:
    (repository / "README.md").write_text(text)

    assert check(repository) == (0, [])
