"""What libkmod does for a MODALIAS: which modules, in which order, and what ends the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loader_svc.boot.kmod import Kmod, KmodConfig
from loader_svc.trees import ModuleTree, open_tree
from modpressure.errors import BadRequest
from tests.unit.boot_trees import SmallTree


@pytest.fixture
def small(tmp_path: Path, make_module: Callable[..., Any]) -> SmallTree:
    return SmallTree(tmp_path / "6.1-test", make_module)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., ModuleTree]:
    """A function that opens a tree with the text of a configuration file."""

    def open_with(tree: SmallTree, config: str = "") -> ModuleTree:
        path = tmp_path / "test.conf"
        path.write_text(config)
        return open_tree(tree.write(), modprobe_dirs=(path,), cache_dir=tmp_path / "cache")

    return open_with


Opened = Callable[..., ModuleTree]


def _entries(kmod: Kmod, text: str) -> list[tuple[str, list[str]]]:
    return [(entry.module, [each.module for each in entry.insertions]) for entry in kmod.plan(text).entries]


def test_aliases_count_in_line_order_and_repeats_stay(small: SmallTree, opened: Opened) -> None:
    small.add("b", aliases=["cpu:*:feature:*1*", "cpu:*:feature:*2*"])
    small.add("a", aliases=["cpu:*:feature:*3*"])
    small.aliases.append(("cpu:*", "b"))
    assert _entries(Kmod(opened(small)), "cpu:x:feature:,1,2,3") == [
        ("b", ["b"]),
        ("b", ["b"]),
        ("a", ["a"]),
        ("b", ["b"]),
    ]
    assert _entries(Kmod(opened(small)), "pci:x") == []


def test_dependencies_are_inserted_from_the_right_to_the_left(small: SmallTree, opened: Opened) -> None:
    small.add("top", "mid", "low", aliases=["x:*"])
    small.add("mid", "low")
    small.add("low")
    assert _entries(Kmod(opened(small)), "x:1") == [("top", ["low", "mid", "top"])]


def test_soft_dependencies_come_before_and_after_what_wants_them_and_bring_their_own(
    small: SmallTree, opened: Opened
) -> None:
    for name in ("pre", "pre_low", "post", "low"):
        small.add(name)
    small.depends["pre"] = ("pre_low",)
    small.add("top", "low", aliases=["x:*"])
    small.softdeps = ["top pre: pre post: post", "low pre: pre"]
    kmod = Kmod(opened(small))
    (entry,) = kmod.plan("x:1").entries
    required = {each.module: each.is_required for each in entry.insertions}
    order = [each.module for each in entry.insertions]
    assert order.index("pre_low") < order.index("pre") < order.index("low") < order.index("top") < order.index("post")
    assert required == {"pre_low": False, "pre": False, "low": True, "top": True, "post": False}


def test_what_is_blacklisted_or_built_in_is_not_inserted(small: SmallTree, opened: Opened) -> None:
    small.add("bad", aliases=["x:*"])
    small.add("low")
    small.add("good", "low", aliases=["x:*"])
    small.builtin = ("inside",)
    small.aliases.append(("x:*", "inside"))
    tree = opened(small, "blacklist bad\n")
    assert _entries(Kmod(tree), "x:1") == [("bad", []), ("good", ["low", "good"])]
    assert _entries(Kmod(tree, KmodConfig(builtin=frozenset({"low"}))), "x:1") == [("bad", []), ("good", ["good"])]
    blacklisted = Kmod(tree, KmodConfig(blacklist=frozenset({"good", "low"})))
    # A blacklist keeps an alias from leading to a module; as a dependency it is loaded.
    assert _entries(blacklisted, "x:1") == [("bad", []), ("good", [])]


def test_the_configuration_s_aliases_count_before_the_tree_s(small: SmallTree, opened: Opened) -> None:
    small.add("a", aliases=["x:*"])
    small.add("b")
    assert _entries(Kmod(opened(small, "alias x:1 b\n")), "x:1") == [("b", ["b"])]


def test_a_module_may_need_more_than_the_tree_says_or_be_part_of_another(small: SmallTree, opened: Opened) -> None:
    small.add("low")
    small.add("more")
    small.add("top", "low", aliases=["x:*"])
    tree = opened(small)
    assert _entries(Kmod(tree, KmodConfig(needs=(("top", ("more",)),))), "x:1") == [("top", ["low", "more", "top"])]
    assert _entries(Kmod(tree, KmodConfig(merged=(("low", "top"),))), "x:1") == [("top", ["top", "top"])]


def test_a_cycle_of_dependencies_is_named(small: SmallTree, opened: Opened) -> None:
    small.add("a", "b", aliases=["x:*"])
    small.add("b", "a")
    with pytest.raises(BadRequest, match="have a cycle: b needs a, which needs b"):
        Kmod(opened(small)).plan("x:1")


def test_a_loop_of_aliases_is_named(small: SmallTree, opened: Opened) -> None:
    small.add("a")
    with pytest.raises(BadRequest, match="have a loop: one -> two -> one"):
        Kmod(opened(small, "alias one two\nalias two one\n"))


def test_a_text_that_can_be_no_alias_leads_to_nothing(small: SmallTree, opened: Opened) -> None:
    small.add("a", aliases=["x:*"])
    assert _entries(Kmod(opened(small)), "x:\n" + "y" * 5000) == []
