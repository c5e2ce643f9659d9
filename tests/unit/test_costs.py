"""The figures of the cost model: their file, what is refused, and draws from distributions."""

from __future__ import annotations

import pickle
import tomllib
from collections import Counter
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader_svc.virtual.costs import KINDS, MAX_NS, NO_COSTS, Costs, default_costs, draw, parse_costs, read_costs
from modpressure.errors import BadRequest, NotFound


def test_every_bundled_figure_is_there_and_says_where_it_is_from() -> None:
    text = resources.files("loader_svc.virtual").joinpath("costs.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    assert {*KINDS, "init"} == document["source"].keys()
    assert document.keys() - {"source"} == {*KINDS, "init"}
    costs = default_costs()
    within_others = ("worker_ns", "device_rules_ns")
    assert all(costs.source[name].startswith("in ") for name in within_others)
    assert all(getattr(costs, name) for name in KINDS if name not in ("first_read_from_disk", *within_others))


COSTS = st.builds(
    Costs,
    **{
        name: {
            "int": st.integers(1, MAX_NS),
            "float": st.floats(0, 1) if name == "jitter" else st.floats(0, MAX_NS),
            "bool": st.booleans(),
            "Duration": st.integers(0, MAX_NS)
            | st.lists(st.integers(0, MAX_NS), min_size=2, max_size=9).map(sorted).map(tuple),
        }[kind]
        for name, kind in KINDS.items()
    },
    link=st.dictionaries(st.text(min_size=1, max_size=9), st.integers(0, MAX_NS), max_size=3),
    init=st.dictionaries(st.text(min_size=1, max_size=9), st.integers(0, MAX_NS), max_size=3),
    source=st.dictionaries(st.sampled_from(sorted(KINDS)), st.text(max_size=30), max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(COSTS)
def test_costs_survive_their_text_and_pickling(costs: Costs) -> None:
    again = parse_costs(costs.text(), NO_COSTS)
    assert again == costs
    assert again.source == costs.source
    assert pickle.loads(pickle.dumps(costs)) == costs


def test_what_a_file_leaves_out_is_as_bundled(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_text("wake_ns = 5\n[init]\nkvm = [1, 2]\n")
    costs = read_costs(path)
    assert (costs.wake_ns, costs.init_duration("kvm"), costs.page_ns) == (5, (1, 2), default_costs().page_ns)
    assert costs.init_duration("aesni_intel") == default_costs().init["aesni_intel"]
    assert costs.init_duration("loop") == costs.init_ns


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("wake_ns = -1", "wake_ns = -1 "),
        ("wake_ns = 1.5", "wake_ns = 1.5 "),
        ("wake_ns = true", "wake_ns = True "),
        ('wake_ns = "5"', "wake_ns = '5' "),
        (f"wake_ns = {MAX_NS + 1}", f"wake_ns = {MAX_NS + 1} "),
        ("read_cached_ns_per_byte = nan", "read_cached_ns_per_byte = nan "),
        ("read_cached_ns_per_byte = inf", "read_cached_ns_per_byte = inf "),
        ("read_cached_ns_per_byte = -0.1", "read_cached_ns_per_byte = -0.1 "),
        ("jitter = 1.1", "jitter = 1.1 "),
        ("slice_ns = 0", "slice_ns = 0 "),
        ("first_read_from_disk = 1", "first_read_from_disk = 1 "),
        ("init_ns = []", "init_ns = [] "),
        ("init_ns = [1]", "init_ns = [1] "),
        ("init_ns = [2, 1]", "init_ns = [2, 1] "),
        ("init_ns = [1, nan]", "init_ns: nan "),
        ("[init]\nkvm = -5", "init.kvm: -5 "),
        ('[init]\nkvm = "long"', "init.kvm = 'long' "),
        ("init = 5", "init = 5 "),
        ("source = 5", "source = 5 "),
        ("[source]\nwake_ns = 5", "source.wake_ns = 5 "),
        ("wakes_ns = 5", "'wakes_ns'"),
        ("wake_ns", "not TOML"),
    ],
)
def test_a_bad_figure_is_named(text: str, named: str) -> None:
    with pytest.raises(BadRequest) as error:
        parse_costs(text)
    assert named in error.value.sentence
    assert "\n" not in error.value.sentence


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    with pytest.raises(NotFound, match=r"costs\.toml"):
        read_costs(path)
    path.write_bytes(b"\xff")
    with pytest.raises(NotFound, match="UTF-8"):
        read_costs(path)
    path.write_text("wake_ns = -1")
    with pytest.raises(BadRequest, match=r"costs\.toml: wake_ns = -1"):
        read_costs(path)


@pytest.mark.parametrize("bad", [{"wake_ns": float("nan")}, {"init": {"kvm": (3, 1)}}, {"jitter": 2}])
def test_costs_made_in_python_are_checked_alike(bad: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        Costs(**bad)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 10**9), min_size=2, max_size=9).map(sorted).map(tuple))
def test_draws_stay_between_the_outer_quantiles(seed: int, quantiles: tuple[int, ...]) -> None:
    assert quantiles[0] <= draw(quantiles, Random(seed)) <= quantiles[-1]


def test_draws_follow_the_quantiles_and_the_seed() -> None:
    quantiles = (0, 1000, 4000, 100_000)
    draws = [draw(quantiles, dice) for dice in [Random(5)] for _ in range(3000)]
    again = [draw(quantiles, dice) for dice in [Random(5)] for _ in range(3000)]
    assert draws == again
    thirds = Counter((value > 1000) + (value > 4000) for value in draws)
    assert all(900 < count < 1100 for count in thirds.values())
    assert draw(7, Random(1)) == 7
