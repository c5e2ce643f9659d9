"""What the garbage collector of a service looks through."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from modpressure import garbage


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


class Node:
    """Something that may refer to itself."""

    def __init__(self) -> None:
        self.other = self


def test_what_is_there_is_passed_over_and_what_comes_later_is_not() -> None:
    stays = Node()
    garbage.spare_what_stays()
    comes = Node()
    looked_through = {id(each) for each in gc.get_objects()}
    assert id(stays) not in looked_through
    assert id(comes) in looked_through


def test_cycles_that_come_later_are_found_without_being_asked_for() -> None:
    garbage.spare_what_stays()
    first = weakref.ref(Node())
    others: list[Node] = []
    while first() is not None and len(others) < 3 * garbage.THRESHOLD:
        others.append(Node())
    assert first() is None
    assert len(others) >= garbage.THRESHOLD / 2, "looked through no sooner than it was said"
