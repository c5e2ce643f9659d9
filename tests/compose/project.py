"""docker-compose.yml as its tests use it, and what they check of a system that it counted."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from modpressure.client import Client
from modpressure.v1.call_pb2 import Event
from tests.recount import named, recount

ROOT = Path(__file__).parents[2]


class Project:
    """One Compose project, on ports and with an image of its own."""

    def __init__(self) -> None:
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": f"modpressure-test-{uuid.uuid4().hex[:8]}",
            "DOCKER_BUILDKIT": "1",
            "IMAGE": "modpressure-test",
            "STATS_PORT": "0",
        }
        self.environment.pop("MODULES_DIR", None)
        self.clients: list[asyncio.subprocess.Process] = []

    def command(self, *arguments: str) -> list[str]:
        return ["docker", "compose", "--file", str(ROOT / "docker-compose.yml"), *arguments]

    def __call__(self, *arguments: str) -> str:
        """Run docker compose to a good end and return what it printed."""
        return run(*self.command(*arguments), environment=self.environment)

    def scale(self, loaders: int) -> None:
        self("up", "--detach", "--no-recreate", "--no-deps", "--wait", "--scale", f"loader_svc={loaders}", "loader_svc")

    def containers(self, service: str) -> list[dict[str, Any]]:
        """Return what the engine knows about the containers of a service."""
        ids = self("ps", "--all", "--quiet", service).split()
        found: list[dict[str, Any]] = json.loads(run("docker", "inspect", *ids)) if ids else []
        return found

    def container_name(self, client: str) -> str:
        return f"{self.environment['COMPOSE_PROJECT_NAME']}-run-{client}"

    def interrupt(self, client: str) -> None:
        """Do to a client what Ctrl-C does."""
        run("docker", "kill", "--signal", "INT", self.container_name(client))

    def stats_address(self) -> str:
        return self("port", "stats_svc", "50050").strip()

    async def start_client(self, *arguments: str, name: str = "client") -> asyncio.subprocess.Process:
        """Start a command of the CLI in a container of its own, called so, beside what runs."""
        options = ("--rm", "--no-deps", "--no-TTY", "--name", self.container_name(name))
        client = await asyncio.create_subprocess_exec(
            *self.command("run", *options, "client", "modpressure", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
        )
        self.clients.append(client)
        return client


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


async def events_of(client: Client, system: str) -> list[Event]:
    return [event async for event in client.events(system, page_size=10_000)]


async def check_consistent(client: Client, system: str) -> list[Event]:
    """Check that a system's counters, events and report agree; return the events."""
    stats = await client.stats(system)
    events = await events_of(client, system)
    assert [event.event_id for event in events] == list(range(1, stats.events + 1))
    assert named(stats) == named(recount(events))
    assert stats.virtual_mem_wasted_bytes == sum(
        getattr(stats, f"invalid_{what}_bytes") for what in ("kread", "decompress", "becoming", "mod")
    )
    kinds = Counter((event.call.outcome, event.call.errno) for event in events if event.HasField("call"))
    assert stats.duplicates == sum(number for (_, errno), number in kinds.items() if errno in ("EEXIST", "EBUSY"))
    assert stats.live_modules == stats.modcount - stats.unloads
    return events


async def duplicates_beyond(client: Client, system: str, duplicates: int) -> None:
    """Wait until a storm, which makes duplicates where its preparation makes none, has made more than so many."""
    async with asyncio.timeout(120):
        async for stats in client.watch(system, interval_seconds=0.05):
            if stats.duplicates > duplicates:
                return
