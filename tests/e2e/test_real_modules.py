"""Storms on Debian's own modules, plain and compressed, through four loaders, by grpcurl and by the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from loader_svc.trees.debian import DebianKernel, DebianUnavailable, fetch_debian, kernel_packages
from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.outcome import Outcome
from modpressure.kernel.report import mainline, rfc
from tests.e2e.conftest import StartUp, Up

MODULES = ("xfs", "virtio_net", "snd_hda_intel", "i2c_i801")
"""Modules of every Debian kernel, small and large, with many dependencies and few."""

LOADERS = 4


@pytest.fixture(scope="module", params=["plain", "compressed"])
def debian(request: pytest.FixtureRequest) -> DebianKernel:
    """A Debian kernel whose module files are packed, or are not."""
    wanted = request.param == "compressed"
    try:
        # One of each series is enough to look at: a series does not change how it packs its files.
        by_series = {package.split("-")[2].rpartition(".")[0]: package for package in reversed(kernel_packages())}
        for package in by_series.values():
            kernel = fetch_debian(package)
            if debian_packs(kernel) == wanted:
                return kernel
    except DebianUnavailable as error:
        pytest.skip(f"no Debian kernel to be had: {error}")
    pytest.skip(f"apt knows no kernel whose modules are {request.param}")


@pytest.fixture(scope="module")
def grpcurl() -> str:
    found = shutil.which("grpcurl")
    if found is None:
        pytest.skip("no grpcurl here (make grpcurl builds it)")
    return found


@pytest.fixture
def machine(start_up: StartUp, debian: DebianKernel) -> Iterator[Up]:
    yield start_up("--loaders", str(LOADERS), "--tree", str(debian.root))


def call(grpcurl: str, address: str, method: str, request: Any = None) -> list[dict[str, Any]]:
    """Make a call as a person would; return the messages of the answer."""
    data = json.dumps(request or {})
    done = subprocess.run(
        [grpcurl, "-plaintext", "-emit-defaults", "-d", data, address, f"modpressure.v1.{method}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    decoder, text, messages = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        message, end = decoder.raw_decode(text)
        messages.append(message)
        text = text[end:].lstrip()
    return messages


def events(grpcurl: str, stats: str) -> list[dict[str, Any]]:
    """Return all events, page by page."""
    found: list[dict[str, Any]] = []
    token = ""
    while True:
        request = {"page_size": 1000, "page_token": token}
        [page] = call(grpcurl, stats, "StatsService/ListEvents", request)
        found += page["events"]
        token = page["next_page_token"]
        if not token:
            return found


def recount(calls: list[dict[str, Any]]) -> tuple[Counters, dict[str, FailedModule]]:
    """Count calls by the rules of the specification alone: nothing is taken from what the services counted.

    The names of duplicates come in the order in which they first failed.
    """
    counters, failed = Counters(), {}
    for one in calls:
        outcome = Outcome[one["outcome"].removeprefix("OUTCOME_")]
        image, packed, mod = int(one["image_bytes"]), int(one["compressed_bytes"]), int(one["mod_bytes"])
        # EEXIST and EBUSY of a call that ran are the duplicates; of one that shared a result they are not.
        duplicate = one["errno"] in ("EEXIST", "EBUSY") and outcome is not Outcome.SHARED
        assert duplicate == one["duplicate"]
        wasted = 0
        counters.calls += 1
        counters.duplicates += duplicate
        if outcome is Outcome.LIVE:
            counters.modcount += 1
            counters.total_mod_size += mod
            counters.total_text_size += int(one["text_bytes"])
        elif outcome is Outcome.BECOMING:
            wasted = image + packed
            counters.failed_becoming += 1
            counters.invalid_becoming_bytes += wasted
        elif outcome is Outcome.LOAD:
            wasted = 2 * image + packed
            counters.failed_load_modules += 1
            counters.invalid_mod_bytes += wasted
            counters.invalid_mod_image_bytes += image
        else:
            assert outcome is Outcome.SHARED, one
            counters.shared_calls += 1
        if duplicate:
            module = failed.setdefault(one["module"], FailedModule(one["module"]))
            module.becoming_count += outcome is Outcome.BECOMING
            module.load_count += outcome is Outcome.LOAD
            module.wasted_bytes += wasted
    return counters, failed


@pytest.mark.timeout(1800)  # a download may be part of it
@pytest.mark.parametrize("policy", ["v6.3", "v6.4", "v6.5"])
def test_what_a_storm_of_real_modules_counts_follows_from_its_calls(
    machine: Up, debian: DebianKernel, grpcurl: str, policy: str
) -> None:
    names = [argument for name in MODULES for argument in ("--module", name)]
    storm = machine.cli("storm", "--workers", "24", *names, "--policy", policy, "--json")
    assert storm.code == 0, storm
    stats = machine.running["stats"]
    by_grpcurl = call(
        grpcurl,
        machine.running["loaders"][1],
        "LoaderService/RunStorm",
        {"storm": {"modules": ["xfs"], "workers": 6, "mode": "MODE_ONCE", "policy": f"POLICY_{policy_word(policy)}"}},
    )
    summary = by_grpcurl[-1]["summary"]
    assert int(summary["calls"]) == 6

    logged = events(grpcurl, stats)
    calls = [event["call"] for event in logged if "call" in event]
    counters, failed = recount(calls)
    [answer] = call(grpcurl, stats, "StatsService/GetStats")
    counted = answer["stats"]
    assert {name: int(counted[name]) for name in KERNEL_NAMES} == {
        name: getattr(counters, name) for name in KERNEL_NAMES
    }
    assert int(counted["virtual_mem_wasted_bytes"]) == counters.virtual_mem_wasted_bytes
    # Every loader was one of the machine's.
    assert len({one["loader"] for one in calls}) == LOADERS
    # What the clients were told is what was logged.
    told = sum(loader["calls"] for loader in storm.json["loaders"]) + int(summary["calls"])
    with_storm = Counter(one["requester"] == "storm" for one in calls)
    assert told <= with_storm[True]

    newest_first = list(reversed(failed.values()))
    for report_format, text in (
        ("REPORT_FORMAT_UNSPECIFIED", rfc(counters, newest_first)),
        ("REPORT_FORMAT_MAINLINE", mainline(counters, newest_first)),
    ):
        [report] = call(grpcurl, stats, "StatsService/GetReport", {"format": report_format})
        assert report["text"] == text
    ran = [one for one in calls if one["outcome"] != "OUTCOME_SHARED"]
    packed = [one for one in ran if not one["file"].endswith(".ko")]
    assert all(one["compressed_bytes"] == one["file_bytes"] for one in packed)
    assert len(packed) == (len(ran) if debian_packs(debian) else 0)


KERNEL_NAMES = (
    "modcount",
    "failed_kreads",
    "failed_decompress",
    "failed_becoming",
    "failed_load_modules",
    "total_mod_size",
    "total_text_size",
    "invalid_kread_bytes",
    "invalid_decompress_bytes",
    "invalid_becoming_bytes",
    "invalid_mod_bytes",
    "invalid_mod_image_bytes",
    "calls",
    "shared_calls",
    "duplicates",
)


def debian_packs(debian: DebianKernel) -> bool:
    """Return whether the module files of a kernel are compressed."""
    return next(debian.root.rglob("*.ko*")).suffix != ".ko"


def policy_word(policy: str) -> str:
    """Return a policy's name as the enum has it."""
    return policy.upper().replace(".", "_")
