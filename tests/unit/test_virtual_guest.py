"""A guest's mutex, and what few cores of a host do to those who load modules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loader_svc.virtual.call import VirtualCall
from loader_svc.virtual.costs import NO_COSTS
from loader_svc.virtual.guest import GuestMachine
from loader_svc.virtual.mutex import SleepingMutex
from loader_svc.virtual.spinning import _Wait


class Kernel:
    """Who was woken, in order, and who is on a CPU just now."""

    def __init__(self) -> None:
        self.woken: list[str] = []
        self.running: set[str] = set()
        self.mutex: SleepingMutex[str] = SleepingMutex(self.woken.append, self.running.__contains__)


def test_who_runs_takes_a_mutex_before_who_was_woken_for_it() -> None:
    kernel = Kernel()
    assert kernel.mutex.take("first")
    kernel.mutex.hold("first")
    assert not kernel.mutex.take("sleeper")
    kernel.mutex.free()
    assert kernel.woken == ["sleeper"]
    assert kernel.mutex.take("thief")
    kernel.mutex.hold("thief")
    assert not kernel.mutex.retry("sleeper")


def test_a_waiter_woken_in_vain_is_handed_the_mutex_where_it_spins() -> None:
    kernel = Kernel()
    kernel.mutex.hold("first")
    assert not kernel.mutex.take("sleeper")
    kernel.mutex.free()
    kernel.mutex.hold("thief")
    assert not kernel.mutex.retry("sleeper")
    kernel.mutex.free()
    assert not kernel.mutex.take("late"), "it is on its way to the sleeper"
    assert kernel.mutex.owner == "sleeper"
    assert kernel.mutex.retry("sleeper")
    kernel.mutex.free()
    assert kernel.woken == ["sleeper", "late"]


def test_a_waiter_that_sleeps_again_is_woken_when_the_mutex_is_handed_to_it() -> None:
    kernel = Kernel()
    kernel.mutex.hold("first")
    assert not kernel.mutex.take("sleeper")
    kernel.mutex.free()
    kernel.mutex.hold("thief")
    assert not kernel.mutex.retry("sleeper")
    kernel.mutex.sleep_again()
    kernel.mutex.free()
    assert kernel.woken == ["sleeper", "sleeper"]
    assert kernel.mutex.retry("sleeper")


def test_a_spinner_catches_the_mutex_if_it_runs_when_that_becomes_free() -> None:
    kernel = Kernel()
    mutex = kernel.mutex
    mutex.hold("first")
    mutex.spinners += ["ahead", "behind"]
    assert not mutex.spin("ahead")
    mutex.free()
    assert mutex.take("thief"), "the spinner has no core of the host just now"
    mutex.hold("thief")
    kernel.running.add("ahead")
    mutex.free()
    assert not mutex.take("late")
    assert not mutex.spin("behind"), "spinners have their order"
    assert mutex.spin("ahead")
    assert not mutex.is_held
    assert list(mutex.spinners) == ["behind"]
    assert mutex.spin("behind"), "it finds it free"


def test_a_spinner_that_only_looks_wakes_the_waiter_that_tried_in_vain_meanwhile() -> None:
    machine = GuestMachine(cpus=2, host_cpus=2, costs=NO_COSTS, seed=1)
    calls = [VirtualCall.__new__(VirtualCall) for _ in range(3)]
    holder, sleeper, spinner = calls
    woken: list[VirtualCall] = []
    mutex = SleepingMutex(woken.append, lambda call: True)
    mutex.hold(holder)
    assert not mutex.take(sleeper)
    mutex.spinners.append(spinner)
    mutex.free()
    assert not mutex.retry(sleeper), "the spinner has it"
    mutex.sleep_again()
    assert _Wait(machine, mutex, lambda call: "looked")._look_up(spinner) == "looked"
    assert woken == [sleeper, sleeper]
    assert mutex.retry(sleeper)


def test_a_spinner_that_catches_the_mutex_has_it_at_once() -> None:
    machine = GuestMachine(cpus=3, host_cpus=2, costs=NO_COSTS, seed=1)
    holder, spinner = (VirtualCall.__new__(VirtualCall) for _ in range(2))
    mutex = machine.list_mutex
    mutex.hold(holder)
    begun_ns: list[int] = []
    waiting = _Wait(machine, mutex, lambda call: begun_ns.append(machine.clock.now_ns))
    spinner._owed_ns, spinner._then = 0, None

    def spins() -> int | None:
        if spinner._then is None:
            waiting.begin(spinner)
        else:
            then, spinner._then, spinner._owed_ns = spinner._then, None, 0
            then(spinner)
        return spinner._owed_ns or None

    def frees() -> int | None:
        if machine.clock.now_ns:
            mutex.free()
            return None
        return 100_000

    spinner._task = spins
    machine.cpus.enter(frees)
    machine.cpus.enter(spins)
    # It waits for a core of the host from the beginning.
    machine.cpus.enter(lambda: None if machine.clock.now_ns > 5_000_000 else 5_000_000)
    machine.clock.run()
    assert begun_ns == [100_000]


@given(
    st.lists(st.sampled_from(["take", "spin", "look", "free", "run", "sleep"]), max_size=60),
    st.booleans(),
)
def test_every_waiter_gets_the_mutex_once_and_nobody_shares_it(steps: list[str], spinners_run: bool) -> None:
    kernel = Kernel()
    mutex = kernel.mutex
    holder: str | None = None
    waiting: set[str] = set()
    awake: str | None = None
    rest = ["free", "look", "run"] * (2 * len(steps) + 2)
    for number, step in enumerate([*steps, *rest]):
        name = f"caller-{number}"
        if step == "take":
            if mutex.take(name):
                assert holder is None
                mutex.hold(name)
                holder = name
            else:
                waiting.add(name)
        elif step == "spin" and mutex.is_held:
            mutex.spinners.append(name)
            if spinners_run:
                kernel.running.add(name)
        elif step == "look" and mutex.spinners:
            first = mutex.spinners[0]
            if mutex.spin(first):
                assert holder is None
                mutex.hold(first)
                holder = first
        elif step == "free" and holder is not None:
            holder = None
            mutex.free()
        elif step in ("run", "sleep"):
            awake = awake or (kernel.woken.pop(0) if kernel.woken else None)
            if awake is None:
                continue
            assert awake in waiting, "nobody is woken twice for one wait"
            if mutex.retry(awake):
                assert holder is None
                waiting.remove(awake)
                mutex.hold(awake)
                holder, awake = awake, None
            elif step == "sleep":
                mutex.sleep_again()
                awake = None
    assert not waiting
    assert not mutex.spinners
    assert mutex.waiting == 0
