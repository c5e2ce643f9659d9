"""docker-compose.yml with its profile postgres: two stats_svc over a real PostgreSQL server are one.

Where the image of that server can't be pulled, one is built from Debian's packages that takes the same variables.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modpressure.client import Client
from modpressure.errors import Unavailable
from tests.compose.project import Project, check_consistent, duplicates_beyond, run

IMAGE = "postgres:17"
STAND_IN = Path(__file__).with_name("postgres")

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]


def postgres_image() -> str:
    """Return the name of an image of the server: its own, else a stand-in."""
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, check=False).returncode == 0:
        return IMAGE
    if subprocess.run(["docker", "pull", "--quiet", IMAGE], capture_output=True, check=False).returncode == 0:
        return IMAGE
    name = "postgres:modpressure-test"
    sys.stderr.write(f"{IMAGE} can't be pulled; {name} stands in\n")
    run("docker", "build", "--quiet", "--network", "host", "--tag", name, str(STAND_IN))
    return name


@pytest.fixture(scope="module")
def project(engine: None) -> Iterator[Project]:
    """The project, up as a user would have it with this profile; its first storm has ended."""
    project = Project()
    project.environment["POSTGRES_PASSWORD"] = "swordfish7"
    project.environment["POSTGRES_IMAGE"] = postgres_image()
    project.environment["COMPOSE_PROFILES"] = "postgres"
    try:
        project("up", "--build", "--detach", "--scale", "loader_svc=2")
        (client,) = project.containers("client")
        run("docker", "wait", client["Id"])
        yield project
    finally:
        logs = project("logs", "--no-color", "--tail", "15")
        project("down", "--volumes", "--remove-orphans", "--timeout", "10")
        sys.stderr.write(logs)


async def test_all_is_well_and_counted_in_the_server(project: Project) -> None:
    (client,) = project.containers("client")
    assert client["State"]["ExitCode"] == 0, project("logs", "--no-log-prefix", "--no-color", "client")
    for service, number in (("stats_svc", 1), ("stats_svc_2", 1), ("postgres", 1), ("loader_svc", 2)):
        states = [container["State"] for container in project.containers(service)]
        assert [(state["Status"], state["Health"]["Status"]) for state in states] == [("running", "healthy")] * number
    query = "SELECT calls FROM systems WHERE name = 'default'"
    psql = ("psql", "--username=modpressure", "--host=/run/postgresql", "--no-align", "--tuples-only", "modpressure")
    async with Client(stats=project.stats_address()) as stats_svc:
        await check_consistent(stats_svc, "default")
        stats = await stats_svc.stats()
    stored = project("exec", "--no-TTY", "postgres", *psql, "--command", query)
    assert int(stored) == stats.calls > 0
    assert stats.loaders == 2


def test_the_server_has_no_rights_that_it_does_not_need(project: Project) -> None:
    (container,) = project.containers("postgres")
    host = container["HostConfig"]
    assert container["Config"]["User"] == "postgres"
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Privileged"]
    assert not host["PortBindings"]
    for service in ("stats_svc", "stats_svc_2"):
        (container,) = project.containers(service)
        assert not any("swordfish7" in argument for argument in container["Config"]["Cmd"])
    assert "swordfish7" not in project("logs", "--no-color")


async def test_the_other_takes_over_from_one_that_is_killed_under_load(project: Project) -> None:
    async with Client(stats=project.stats_address()) as stats_svc:
        await stats_svc.create_system("failover")
        storm = await project.start_client(
            "storm", "--json", "--system", "failover", "--workers", "16", "--module", "xfs", "--seconds", "600"
        )
        await duplicates_beyond(stats_svc, "failover", 100)
        logs = project("logs", "--no-color", "--no-log-prefix", "stats_svc")
        leader = "stats_svc_2" if '"standing by"' in logs else "stats_svc"
        (container,) = project.containers(leader)
        run("docker", "kill", "--signal", "KILL", container["Id"])
        # It is started again; if it is the one with the published port, that may be another one by then.
        run("docker", "start", container["Id"])
    async with asyncio.timeout(120):
        while True:
            try:
                async with Client(stats=project.stats_address()) as stats_svc:
                    before = (await stats_svc.stats("failover")).duplicates
                    await duplicates_beyond(stats_svc, "failover", before + 100)
                    break
            except (Unavailable, AssertionError):
                await asyncio.sleep(0.5)
    await asyncio.to_thread(project.interrupt, "client")
    out, err = await storm.communicate()
    assert storm.returncode == 130, err.decode()
    result = json.loads(out)
    async with Client(stats=project.stats_address()) as stats_svc:
        events = await check_consistent(stats_svc, "failover")
    assert len(events) >= result["total"]["operations"] > 0
