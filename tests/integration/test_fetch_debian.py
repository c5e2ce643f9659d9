"""Fetching a Debian kernel with the real apt: a small one, into a directory of the test's own."""

import re
import subprocess

import pytest

from loader_svc.trees import open_tree
from loader_svc.trees.debian import DebianUnavailable, fetch_debian, kernel_packages

pytestmark = pytest.mark.timeout(900)  # some 20 MB are downloaded


@pytest.fixture(scope="module")
def small_package():
    """A kernel for clouds, which has the fewest modules."""
    try:
        kernel_packages()  # has apt make its lists where there are none
    except DebianUnavailable as error:
        pytest.skip(f"no Debian kernel to be had: {error}")
    found = subprocess.run(
        ["apt-cache", "search", "--names-only", r"^linux-image-[0-9.-]+-cloud-[a-z0-9]+-unsigned$"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    names = sorted(
        (line.split()[0] for line in found.splitlines()), key=lambda n: [int(x) for x in re.findall("[0-9]+", n)]
    )
    if not names:
        pytest.skip("apt knows no kernel for clouds")
    return names[-1]


@pytest.fixture(scope="module")
def fetched(small_package, tmp_path_factory):
    directory = tmp_path_factory.mktemp("debian")
    try:
        return directory, fetch_debian(small_package, directory)
    except DebianUnavailable as error:
        pytest.skip(f"{small_package} can't be had: {error}")


def test_a_fetched_kernel_is_a_tree_of_modules(fetched, tmp_path):
    directory, kernel = fetched
    assert kernel.root.parent == directory / f"{kernel.package}_{kernel.version}" / "lib" / "modules"
    tree = open_tree(kernel.root, modprobe_dirs=[], cache_dir=tmp_path)
    assert len(tree.names()) > 500
    assert "xfs" in tree.names()
    assert {path.name for path in directory.iterdir()} <= {f"{kernel.package}_{kernel.version}", "apt"}


def test_it_is_found_again_without_the_network(fetched, monkeypatch):
    directory, kernel = fetched
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch_debian(kernel.package, directory) == kernel


def test_without_the_network_it_is_said_so_and_nothing_is_left(fetched, tmp_path, monkeypatch):
    _, kernel = fetched
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with pytest.raises(DebianUnavailable, match=f"apt-get failed.*{re.escape(kernel.package)}") as caught:
        fetch_debian(kernel.package, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_package_is_named(small_package, tmp_path):
    with pytest.raises(DebianUnavailable, match=r"linux-image-0\.0-none") as caught:
        fetch_debian("linux-image-0.0-none", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
