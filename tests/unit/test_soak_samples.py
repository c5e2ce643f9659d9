"""What ``make soak`` takes for growth, and what not."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest

from soak.samples import FEWEST_SAMPLES, Life, Sample, growth, trend

MIB = 1 << 20
SEED = 6


def samples(values: list[float]) -> list[Sample]:
    return [Sample(float(number), value) for number, value in enumerate(values)]


def noisy(count: int, a_second: float) -> list[Sample]:
    dice = random.Random(SEED)
    return samples([90 * MIB + a_second * number + dice.uniform(-MIB, MIB) for number in range(count)])


def test_what_grows_all_the_time_is_growth() -> None:
    grown = growth(noisy(300, 0.1 * MIB))
    # The warm-up, a third of it, is not looked at.
    assert grown == pytest.approx(0.1 * MIB * 200, rel=0.1)
    assert not trend("x", [noisy(300, 0.1 * MIB)], share=0.1, least=8 * MIB).flat


def test_noise_a_peak_and_a_warm_up_are_none() -> None:
    level = noisy(300, 0)
    peak = [*level[:250], *(Sample(one.seconds, 3 * one.value) for one in level[250:260]), *level[260:]]
    warming = [*(Sample(one.seconds, one.value * one.seconds / 90) for one in level[:90]), *level[90:]]
    for some in (level, peak, warming):
        assert trend("x", [some], share=0.1, least=8 * MIB).flat


def test_the_middle_of_many_lives_counts() -> None:
    growing, level = noisy(60, MIB), noisy(60, 0)
    assert trend("x", [growing, level, level], share=0.1, least=8 * MIB).flat
    assert not trend("x", [growing, growing, level], share=0.1, least=8 * MIB).flat


def test_too_few_samples_tell_nothing() -> None:
    assert growth(samples([1.0, 2.0] * (FEWEST_SAMPLES // 2))) is None
    assert trend("x", [], share=0, least=0).grown is None


def test_a_process_that_leaks_is_seen() -> None:
    code = "import sys; kept = []\nfor _ in sys.stdin: kept += bytearray(1 << 20), open('/dev/null'), print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as leaky:
        assert leaky.stdin is not None
        assert leaky.stdout is not None
        life = Life(leaky.pid)
        for _ in range(40):
            leaky.stdin.write("\n")
            leaky.stdin.flush()
            leaky.stdout.readline()
            assert life.look(time.monotonic())
        leaky.stdin.close()
    assert not trend("bytes", [life.resident_bytes], share=0.1, least=8 * MIB).flat
    assert not trend("files", [life.open_files], share=0, least=3).flat
    assert not life.look(time.monotonic()), "a process that is gone has no size"
