"""``python -m chaos``: rounds over SQLite and over PostgreSQL side by side; exit 1 if anything is lost or doubled.

Ctrl-C ends it after the round that runs, and what the rounds so far came to is printed; a second one ends it at once.
The same seed asks the same and has the same faults at the same moments; what the operating system makes of that may
differ.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import SystemRandom

from chaos import clock
from chaos.disk import own_mounts
from chaos.faults import FAULTS
from chaos.fleet import DatabaseKind, running_fleet, temporary_directory
from chaos.rounds import Rounds, Score
from tests import postgres

KINDS: tuple[DatabaseKind, ...] = ("sqlite", "postgresql")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="rounds over each database (200)")
    parser.add_argument("--seed", type=int, default=None, help="of what is asked and which faults come when")
    parser.add_argument("--database", choices=KINDS, action="append", help="only this one (both)")
    names = [fault.name for fault in FAULTS]
    parser.add_argument(
        "--fault", choices=names, action="append", default=[], metavar="NAME", help="only this one (all)"
    )
    parser.add_argument("--evidence", type=Path, default=None, help="directory for what was found")
    parser.add_argument(
        "--stop-at-first", action="store_true", help="end with the first round in which anything is found"
    )
    parser.add_argument(
        "--stats-command",
        type=shlex.split,
        default=[sys.executable, "-m", "stats_svc"],
        help="what starts stats_svc (python -m stats_svc)",
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is less than 1")
    return options


async def _run(
    kinds: tuple[DatabaseKind, ...], options: argparse.Namespace, seed: int, *, with_disk: bool
) -> list[Score]:
    preload = clock.library()
    if preload is None:
        print("not injected: clock step, as libfaketime is not installed")
    evidence = options.evidence or Path(tempfile.gettempdir()) / f"modpressure-chaos-evidence-{seed}"
    stopping = asyncio.Event()
    with temporary_directory() as directory:

        async def side(kind: DatabaseKind) -> Score:
            home = Path(directory) / kind
            home.mkdir()
            async with running_fleet(
                kind, home, with_disk=with_disk, preload=preload, stats_command=options.stats_command
            ) as fleet:
                rounds = Rounds(fleet, seed, evidence, options.fault)
                await rounds.run(options.rounds, stopping, stop_at_first=options.stop_at_first)
                return rounds.score

        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            print("stopping after this round", file=sys.stderr, flush=True)
            stopping.set()

        loop.add_signal_handler(signal.SIGINT, stop)
        # If one of them fails the other one is ended before the directory goes.
        async with asyncio.TaskGroup() as sides:
            tasks = [sides.create_task(side(kind)) for kind in kinds]
        return [task.result() for task in tasks]


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def main() -> None:
    """Run, print what came of it, and exit."""
    options = _parsed()
    seed = options.seed if options.seed is not None else SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    kinds: tuple[DatabaseKind, ...] = tuple(options.database or KINDS)
    if "postgresql" in kinds and postgres.programs() is None:
        print("not tested: PostgreSQL, as it is not installed")
        kinds = tuple(kind for kind in kinds if kind != "postgresql")
        if not kinds:
            raise SystemExit(1)
    why_not = "no mount(8) here" if shutil.which("mount") is None else own_mounts()
    if why_not:
        print(f"not injected: full disk, {why_not}")
    begun = time.monotonic()
    try:
        scores = asyncio.run(_run(kinds, options, seed, with_disk=not why_not))
    except* RuntimeError as errors:
        raise SystemExit(f"chaos: {errors.exceptions[0]!s}") from None
    found: Counter[str] = Counter()
    for kind, score in zip(kinds, scores, strict=True):
        print(f"{kind}: {score.rounds} rounds, {score.answered} requests answered, {score.unanswered} not")
        print(f"  faults: {_listed(score.faults)}")
        print(f"  attempts that failed: {_listed(score.statuses)}")
        print(f"  {score.events} events: {_listed(score.ends)}")
        found += score.findings
        for path in score.evidence:
            print(f"  see {path}")
    print(f"{time.monotonic() - begun:.0f} s; faults {sum(sum(score.faults.values()) for score in scores)}")
    if found["wrong"]:
        print(f"wrong {found['wrong']}")
    print(f"lost {found['lost']}")
    print(f"doubled {found['doubled']}")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
