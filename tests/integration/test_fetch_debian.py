"""Fetching a Debian kernel with the real apt: a small one, into a directory of the test's own."""

import re

import pytest

from loader_svc.trees import open_tree
from loader_svc.trees.debian import DebianUnavailable, fetch_debian

pytestmark = pytest.mark.timeout(900)  # some 20 MB are downloaded


def test_a_fetched_kernel_is_a_tree_of_modules(debian_kernel, tmp_path):
    kernel = debian_kernel
    directory = kernel.root.parents[3]
    assert kernel.root.parent == directory / f"{kernel.package}_{kernel.version}" / "lib" / "modules"
    tree = open_tree(kernel.root, modprobe_dirs=[], cache_dir=tmp_path)
    assert len(tree.names()) > 500
    assert "xfs" in tree.names()
    assert {path.name for path in directory.iterdir()} <= {f"{kernel.package}_{kernel.version}", "apt"}


def test_it_is_found_again_without_the_network(debian_kernel, monkeypatch):
    directory = debian_kernel.root.parents[3]
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch_debian(debian_kernel.package, directory) == debian_kernel


def test_without_the_network_it_is_said_so_and_nothing_is_left(debian_kernel, tmp_path, monkeypatch):
    kernel = debian_kernel
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with pytest.raises(DebianUnavailable, match=f"apt-get failed.*{re.escape(kernel.package)}") as caught:
        fetch_debian(kernel.package, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_package_is_named(debian_kernel, tmp_path):
    with pytest.raises(DebianUnavailable, match=r"linux-image-0\.0-none") as caught:
        fetch_debian("linux-image-0.0-none", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
