"""What is done to a fleet, at random moments."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from chaos.fleet import Fleet
from chaos.process import Supervised
from chaos.proxy import Link

Injection = Callable[[Fleet, Random], Awaitable[None]]

MAX_CLOCK_STEP_SECONDS: Final = 8 * 24 * 3600
"""How far a clock may be off: further than the day for which request ids are known, and the week of processes that are
over."""

MAX_SECONDS: Final = 1.6
"""How long a fault may last: longer than the lease of a loader."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    name: str
    inject: Injection
    """Does it, and undoes it where it has an end."""

    needs: Callable[[Fleet], object] = lambda fleet: True
    """Whether it can be done to a fleet."""


def _a_loader(fleet: Fleet, dice: Random) -> Supervised:
    return dice.choice(fleet.loaders)


def _a_stats(fleet: Fleet, dice: Random) -> Supervised:
    return dice.choice(fleet.stats)


def _database(fleet: Fleet, dice: Random) -> Supervised:
    assert fleet.database is not None
    return fleet.database


def _clients_to_loader(fleet: Fleet, dice: Random) -> Link:
    return dice.choice(fleet.clients_to_loader)


def _loader_to_stats(fleet: Fleet, dice: Random) -> Link:
    return dice.choice(fleet.loader_to_stats)


def _stats_to_database(fleet: Fleet, dice: Random) -> Link:
    return dice.choice(fleet.stats_to_database)


def _stats_to_stats(fleet: Fleet, dice: Random) -> Link:
    return dice.choice(fleet.stats_to_stats)


def _kill(whom: Callable[[Fleet, Random], Supervised]) -> Injection:
    async def inject(fleet: Fleet, dice: Random) -> None:
        process = whom(fleet, dice)
        process.kill(dice.choice((0.0, 0.0, 0.5, 1.2)))
        if dice.random() < 0.25:
            # Once more, as it starts or has just started.
            await asyncio.sleep(dice.uniform(0.2, MAX_SECONDS))
            process.kill()

    return inject


async def _kill_backend(fleet: Fleet, dice: Random) -> None:
    _database(fleet, dice).kill_child(dice)


def _restart(whom: Callable[[Fleet, Random], Supervised]) -> Injection:
    async def inject(fleet: Fleet, dice: Random) -> None:
        whom(fleet, dice).terminate()

    return inject


def _stop(whom: Callable[[Fleet, Random], Supervised]) -> Injection:
    async def inject(fleet: Fleet, dice: Random) -> None:
        process = whom(fleet, dice)
        process.freeze()
        await asyncio.sleep(dice.uniform(0.05, MAX_SECONDS))
        process.thaw()

    return inject


def _cut(which: Callable[[Fleet, Random], Link]) -> Injection:
    async def inject(fleet: Fleet, dice: Random) -> None:
        link = which(fleet, dice)
        for _ in range(dice.randint(1, 4)):
            link.is_refusing = dice.random() < 0.2
            link.cut()
            await asyncio.sleep(dice.uniform(0.05, 0.4))
            link.is_refusing = False

    return inject


def _cut_in_answer(which: Callable[[Fleet, Random], Link]) -> Injection:
    async def inject(fleet: Fleet, dice: Random) -> None:
        link = which(fleet, dice)
        for _ in range(dice.randint(2, 8)):
            link.cut_in_answer(dice.choice((0, 1, dice.randrange(60), dice.randrange(600))))
            await asyncio.sleep(dice.uniform(0.05, 0.25))

    return inject


def _half_open(which: Callable[[Fleet, Random], Link]) -> Injection:
    async def inject(fleet: Fleet, dice: Random) -> None:
        link = which(fleet, dice)
        link.half_open()
        await asyncio.sleep(dice.uniform(0.05, MAX_SECONDS))
        link.heal()

    return inject


def _delay(which: Callable[[Fleet, Random], Link]) -> Injection:
    async def inject(fleet: Fleet, dice: Random) -> None:
        link = which(fleet, dice)
        link.delay_seconds = dice.uniform(0.005, 0.2)
        await asyncio.sleep(dice.uniform(0.1, 1.0))
        link.delay_seconds = 0.0

    return inject


async def _fill_disk(fleet: Fleet, dice: Random) -> None:
    assert fleet.disk is not None
    fleet.disk.fill()
    await asyncio.sleep(dice.uniform(0.05, MAX_SECONDS))
    fleet.disk.free()


async def _step_clock(fleet: Fleet, dice: Random) -> None:
    dice.choice(fleet.clocks).step_to(dice.randint(-MAX_CLOCK_STEP_SECONDS, MAX_CLOCK_STEP_SECONDS))


def _has_server(fleet: Fleet) -> bool:
    return fleet.database is not None


def _on_link(name: str, which: Callable[[Fleet, Random], Link], needs: Callable[[Fleet], object]) -> list[Fault]:
    return [
        Fault(f"cut {name}", _cut(which), needs),
        Fault(f"cut in answer {name}", _cut_in_answer(which), needs),
        Fault(f"half-open {name}", _half_open(which), needs),
        Fault(f"delay {name}", _delay(which), needs),
    ]


FAULTS: Final = (
    Fault("kill loader", _kill(_a_loader)),
    Fault("kill stats_svc", _kill(_a_stats)),
    Fault("kill PostgreSQL", _kill(_database), _has_server),
    Fault("kill PostgreSQL backend", _kill_backend, _has_server),
    Fault("restart loader", _restart(_a_loader)),
    Fault("restart stats_svc", _restart(_a_stats)),
    Fault("stop loader", _stop(_a_loader)),
    Fault("stop stats_svc", _stop(_a_stats)),
    Fault("stop PostgreSQL", _stop(_database), _has_server),
    *_on_link("client-loader", _clients_to_loader, lambda fleet: True),
    *_on_link("loader-stats_svc", _loader_to_stats, lambda fleet: True),
    *_on_link("stats_svc-stats_svc", _stats_to_stats, lambda fleet: fleet.stats_to_stats),
    *_on_link("stats_svc-PostgreSQL", _stats_to_database, _has_server),
    Fault("full disk", _fill_disk, lambda fleet: fleet.disk),
    Fault("clock step", _step_clock, lambda fleet: fleet.clocks),
)


def deck(fleet: Fleet, dice: Random, names: Collection[str] = ()) -> Iterator[Fault]:
    """Yield faults for ever: all that can be done to a fleet, or those of ``names``, shuffled, and again."""
    possible = [fault for fault in FAULTS if fault.needs(fleet) and (not names or fault.name in names)]
    if not possible:
        raise ValueError(f"none of these faults can be had over {fleet.kind}: {', '.join(names)}")
    while True:
        dice.shuffle(possible)
        yield from possible
