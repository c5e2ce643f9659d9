"""docker-compose.yml on a real container engine: eight loaders are one machine, whose counts survive what comes.

Run by ``make compose-test``. The tests share one project, in the order in which they stand here.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from modpressure.client import Client
from modpressure.v1.call_pb2 import Event, Outcome
from tests.compose.project import Project, check_consistent, duplicates_beyond, run
from tests.recount import named

REPLICAS = 8

# Building the image takes most of it.
pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def project(engine: None) -> Iterator[Project]:
    """The project, up as a user would have it, with eight loaders; its first storm has ended."""
    project = Project()
    try:
        project("up", "--build", "--detach", "--scale", f"loader_svc={REPLICAS}")
        (client,) = project.containers("client")
        run("docker", "wait", client["Id"])
        yield project
    finally:
        logs = project("logs", "--no-color", "--tail", "10")
        project("down", "--volumes", "--remove-orphans", "--timeout", "10")
        sys.stderr.write(logs)


@pytest_asyncio.fixture(autouse=True)
async def no_client_outlives_its_test(project: Project) -> AsyncIterator[None]:
    yield
    for client in project.clients:
        if client.returncode is None:
            client.terminate()
            await client.communicate()
    project.clients.clear()


@pytest_asyncio.fixture
async def stats_svc(project: Project) -> AsyncIterator[Client]:
    """A client, outside of the containers, of the published port."""
    async with Client(stats=project.stats_address()) as client:
        yield client


def check_summary(summary: dict[str, Any], events: list[Event]) -> None:
    """Check what one loader says of its part of a storm against its events in a system that had only this storm.

    What the modules depend on was loaded before, by the first loader, and is in the events alone.
    """
    calls = [event.call for event in events if event.HasField("call") and event.call.loader == summary["loader"]]
    storm = [call for call in calls if call.worker.startswith("worker-")]
    assert len(storm) == summary["calls"]
    assert sum(call.duplicate for call in storm) == summary["duplicates"]
    assert Counter((Outcome.Name(call.outcome), call.errno) for call in storm) == {
        (each["outcome"], each["errno"]): each["count"] for each in summary["outcomes"]
    }
    unloads = sum(event.HasField("unload") and event.unload.loader == summary["loader"] for event in events)
    assert unloads == summary["unloads"]


def test_all_replicas_are_up_and_well(project: Project) -> None:
    for service, number in (("stats_svc", 1), ("loader_svc", REPLICAS)):
        states = [container["State"] for container in project.containers(service)]
        assert [(state["Status"], state["Health"]["Status"]) for state in states] == [("running", "healthy")] * number


async def test_the_client_ends_well_having_printed_one_report_for_all(project: Project, stats_svc: Client) -> None:
    (client,) = project.containers("client")
    assert client["State"]["Status"] == "exited"
    assert client["State"]["ExitCode"] == 0, project("logs", "--no-log-prefix", "--no-color", "client")
    printed = run("docker", "logs", client["Id"])

    report = await stats_svc.report()

    assert report in printed
    events = await check_consistent(stats_svc, "default")
    loaders = {event.call.loader for event in events if event.HasField("call")}
    assert len(loaders) == REPLICAS


@pytest.mark.parametrize("service", ["stats_svc", "loader_svc", "client"])
def test_containers_have_no_rights_that_they_do_not_need(project: Project, service: str) -> None:
    for container in project.containers(service):
        host = container["HostConfig"]
        assert container["Config"]["User"] == "10001:10001"
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert not host["Privileged"]
        assert host["Memory"] > 0
        assert host["NanoCpus"] > 0
        assert host["PidsLimit"] > 0
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}


def test_services_run_as_nobody_in_particular_and_cannot_write_to_their_root(project: Project) -> None:
    for service in ("stats_svc", "loader_svc"):
        status = project("exec", "--no-TTY", service, "cat", "/proc/1/status")
        fields = dict(line.split(":\t", 1) for line in status.splitlines())
        assert set(fields["Uid"].split()) == {"10001"}
        assert int(fields["CapEff"], 16) == 0
        assert fields["NoNewPrivs"] == "1"
        with pytest.raises(AssertionError, match="Read-only file system"):
            project("exec", "--no-TTY", service, "touch", "/opt/modpressure/new")
    with pytest.raises(AssertionError, match="Read-only file system"):
        project("exec", "--no-TTY", "loader_svc", "touch", "/modules/new")


async def test_a_storm_over_all_replicas_adds_up(project: Project, stats_svc: Client) -> None:
    storm = await project.start_client(
        "storm", "--json", "--system", "adds-up", "--workers", "64", "--module", "xfs,ext4", "--ops", "2"
    )
    out, err = await storm.communicate()
    assert storm.returncode == 0, err.decode()
    result = json.loads(out)

    events = await check_consistent(stats_svc, "adds-up")

    assert len(result["loaders"]) == REPLICAS
    assert result["total"]["operations"] == 64 * 2 * 2
    for summary in result["loaders"]:
        check_summary(summary, events)
    stats = await stats_svc.stats("adds-up")
    assert stats.duplicates == result["total"]["duplicates"] > 0
    assert stats.virtual_mem_wasted_bytes == result["total"]["wasted_bytes"]


async def test_counts_hold_while_loaders_come_and_go_under_load(project: Project, stats_svc: Client) -> None:
    await asyncio.to_thread(project.scale, 2)
    for system in ("growing", "shrinking"):
        await stats_svc.create_system(system)
    # Long enough for any machine; each is interrupted once it has seen what it is for.
    arguments = ("storm", "--json", "--workers", "40", "--module", "xfs", "--seconds", "800")

    growing = await project.start_client(*arguments, "--system", "growing", name="growing")
    await duplicates_beyond(stats_svc, "growing", 0)
    await asyncio.to_thread(project.scale, REPLICAS)
    await duplicates_beyond(stats_svc, "growing", (await stats_svc.stats("growing")).duplicates)

    shrinking = await project.start_client(*arguments, "--system", "shrinking", name="shrinking")
    await duplicates_beyond(stats_svc, "shrinking", 0)
    await asyncio.to_thread(project.scale, 3)
    await duplicates_beyond(stats_svc, "shrinking", (await stats_svc.stats("shrinking")).duplicates)

    for name in ("growing", "shrinking"):
        await asyncio.to_thread(project.interrupt, name)
    (grown, grown_err), (shrunk, shrunk_err) = await asyncio.gather(growing.communicate(), shrinking.communicate())
    for system, out, err, started in (
        ("growing", grown, grown_err, 2),
        ("shrinking", shrunk, shrunk_err, REPLICAS),
    ):
        assert out, err.decode()
        result = json.loads(out)
        assert len(result["loaders"]) + len(result["failures"]) == started
        events = await check_consistent(stats_svc, system)
        for summary in result["loaders"]:
            check_summary(summary, events)
    assert (growing.returncode, shrinking.returncode) == (130, 130)
    assert len(json.loads(shrunk)["loaders"]) >= 3
    stats = await stats_svc.stats("shrinking")
    assert stats.loaders == 3

    # What the loaders that went had reserved is free again.
    load = await project.start_client("load", "--json", "--system", "shrinking", "xfs")
    out, err = await load.communicate()
    assert load.returncode == 0, err.decode()
    assert json.loads(out)["loads"][0]["error"] == ""


async def test_the_volume_keeps_the_counts_over_down_and_up(project: Project) -> None:
    async with Client(stats=project.stats_address()) as client:
        before = {system.id: named(await client.stats(system.id)) async for system in client.systems()}
        report = await client.report("adds-up")
    assert before["adds-up"]["calls"] > 0

    project("down", "--timeout", "10")
    project("up", "--detach", "--wait", "stats_svc")

    async with Client(stats=project.stats_address()) as client:
        after = {system.id: named(await client.stats(system.id)) async for system in client.systems()}
        assert after == before
        assert await client.report("adds-up") == report


async def test_modules_of_the_host_are_mounted_where_asked(project: Project, tmp_path: Path) -> None:
    from loader_svc.catalogue import catalogue_tree

    tree = catalogue_tree("xz", tmp_path)
    tree.chmod(0o755)
    project.environment["MODULES_DIR"] = str(tree)
    project("up", "--detach", "--wait", "stats_svc", "loader_svc")

    (loader,) = project.containers("loader_svc")
    (mount,) = [mount for mount in loader["Mounts"] if mount["Destination"] == "/modules"]
    assert (mount["Type"], mount["Source"], mount["RW"]) == ("bind", str(tree), False)
    load = await project.start_client("load", "--json", "--system", "mounted", "xfs")
    out, err = await load.communicate()
    assert load.returncode == 0, err.decode()
    assert json.loads(out)["loads"][0]["call"]["file"].endswith(".ko.xz")
