"""The locked versions fit each other and pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.lock", "requirements-runtime.lock")


def locked(name: str) -> dict[str, str]:
    """Return each package of a lock with its version, that for this Python where they differ."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if match := re.match(r"([a-z0-9-]+)==([^ ]+)(?: ; ([^\\]+))?", line):
            if match[1] in found and match[3] and not Marker(match[3]).evaluate():
                continue
            found[match[1]] = match[2]
    assert found
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_address_and_hashes_everything(name: str) -> None:
    text = (ROOT / name).read_text()

    assert not re.search(r"://|--(extra-)?index-url|--find-links", text)
    entries = re.split(r"\n(?=[a-z0-9-]+==)", text)[1:]
    assert {entry.partition("==")[0] for entry in entries} == locked(name).keys()
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_runtime_lock_is_a_part_of_the_whole() -> None:
    assert locked(LOCKS[1]).items() <= locked(LOCKS[0]).items()


def test_the_locks_have_what_the_project_asks_for() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    runtime = [*project["dependencies"], *project["optional-dependencies"]["postgres"]]
    everything = [*runtime, *content["build-system"]["requires"]]
    for extra in ("dev", "sweep"):
        everything += project["optional-dependencies"][extra]

    for name, texts in zip(LOCKS, (everything, runtime), strict=True):
        versions = locked(name)
        for requirement in map(Requirement, texts):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} in {name} is {version}"
