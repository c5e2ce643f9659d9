"""What is said where no Debian kernel can be had. Fetching one is tested with the real apt, beside kmod."""

from pathlib import Path

import pytest

from loader_svc.trees import TreeError
from loader_svc.trees.debian import DebianUnavailable, fetch_debian, kernel_packages
from modpressure.errors import Unavailable


def test_without_apt_it_is_said_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DebianUnavailable, match="dpkg is not installed") as caught:
        kernel_packages(tmp_path)
    assert isinstance(caught.value, TreeError)
    assert isinstance(caught.value, Unavailable)
    with pytest.raises(DebianUnavailable, match="apt-cache is not installed"):
        fetch_debian("linux-image-6.1.0-1-amd64", tmp_path)


@pytest.mark.parametrize("name", ["", "-o=Dir=/", "a b", "../x", "x\n", "A"])
def test_what_is_no_package_name_never_reaches_apt(name: str, tmp_path: Path) -> None:
    with pytest.raises(DebianUnavailable, match="is no name of a package"):
        fetch_debian(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tool_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "apt-cache"
    tool.write_text("#!/bin/sh\necho first >&2\necho E: No packages found >&2\nexit 100\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(DebianUnavailable, match="apt-cache failed: E: No packages found"):
        fetch_debian("linux-image-6.1.0-1-amd64", tmp_path / "cache")
