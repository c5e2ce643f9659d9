"""Whether stats_svc is there, and for how long those wait who need it."""

from __future__ import annotations

import asyncio

import pytest

from loader_svc.presence import Presence


async def test_a_new_request_waits_for_who_has_just_gone() -> None:
    presence = Presence()
    presence.set(False)
    waiting = asyncio.ensure_future(presence.wait_briefly())
    await asyncio.sleep(0)
    assert not waiting.done()
    presence.set(True)
    assert await waiting
    assert presence.is_there
    assert await presence.wait_briefly()
    await presence.wait_there()
    presence.set(False)
    assert not presence.is_there


async def test_a_new_request_does_not_wait_for_who_is_away_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader_svc.presence.PATIENCE_SECONDS", 0)
    presence = Presence()
    presence.set(False)
    assert not await presence.wait_briefly()


async def test_those_in_flight_are_told_once_it_is_away_for_long_and_not_if_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    presence = Presence()
    presence.set(False)
    monkeypatch.setattr("loader_svc.presence.IN_FLIGHT_PATIENCE_SECONDS", 0)
    # The time that runs is that of its last going.
    presence.set(False)
    await presence.wait_long_away()
    presence.set(True)
    waiting = asyncio.ensure_future(presence.wait_long_away())
    await asyncio.sleep(0)
    assert not waiting.done()
    presence.set(False)
    presence.set(True)
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    presence.set(False)
    await presence.wait_long_away()
