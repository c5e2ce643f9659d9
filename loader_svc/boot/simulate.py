"""A boot, simulated: the trigger, udev, libkmod and the kernel, on the CPUs of one machine, in virtual time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, Final

from loader_svc.boot.autoloads import Autoloads
from loader_svc.boot.births import Births
from loader_svc.boot.device import Device, prioritized_order, trigger_order
from loader_svc.boot.files import BootFiles, files_of
from loader_svc.boot.kmod import Entry, Insertion
from loader_svc.boot.machine import Machine
from loader_svc.boot.queue import Event
from loader_svc.boot.spec import BootCall, BootResult, BootSpec
from loader_svc.boot.tally import Tally, is_live
from loader_svc.boot.udev import Udev, UdevCosts, Worker
from loader_svc.init_results import InitResult, InitResults
from loader_svc.virtual.call import Record, VirtualCall
from loader_svc.virtual.costs import Costs
from loader_svc.virtual.guest import GuestMachine
from loader_svc.virtual.machine import VirtualMachine
from loader_svc.virtual.process import Body, Process

Part = Generator[Any, Any, None]
"""A part of a process's body."""

MODPROBE: Final = "modprobe"
"""Who makes the calls for what the kernel asks for (request_module)."""

SCSI_GENERIC: Final = "sg"
"""What Debian's rules load for a SCSI device where /sys/module/sg is missing (80-drivers.rules of Debian's udev)."""


def simulate_boot(spec: BootSpec, seed: int, *, record: Callable[[BootCall], None] | None = None) -> BootResult:
    """Boot a machine and return what came of it; the same specification and seed give the same result.

    ``record`` is called with each call when that has ended. TreeError if the modules can't be had, MachineError or
    BadRequest where the specification makes no sense.
    """
    return Boot(spec, seed, None if record is None else lambda call: record(BootCall.of(call))).run()


class _MachineInits(InitResults):
    """What init functions come to that fail or sleep, as the machine's description has it."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._inits = {
            init.module: InitResult((init.duration_ns or 0) if init.is_asleep else 0, init.errno)
            for init in machine.inits
        }

    def of(self, module: str, arguments: object, is_live: object, dice: object = None) -> InitResult:
        return self._inits.get(module, InitResult())


def _costs_on(machine: Machine, costs: Costs) -> Costs:
    """Return the costs with what the machine's description says of inits that keep a CPU busy."""
    busy = {
        init.module: init.duration_ns for init in machine.inits if init.duration_ns is not None and not init.is_asleep
    }
    return replace(costs, init={**costs.init, **busy}) if busy else costs


def new_kernel(
    spec: BootSpec, files: BootFiles, seed: int, guest: Callable[..., VirtualMachine] = GuestMachine
) -> VirtualMachine:
    """Return the machine of a boot before anything has been loaded; ``guest`` makes one that has a host."""
    machine = spec.machine
    make: Callable[..., VirtualMachine] = VirtualMachine
    if machine.host_cpus is not None:
        make = partial(guest, host_cpus=machine.host_cpus)
    return make(
        identity=spec.identity,
        init_results=_MachineInits(machine),
        plans=files.plans,
        cpus=machine.cpus,
        costs=_costs_on(machine, spec.costs or machine.own_costs()),
        seed=seed,
        limits=spec.limits,
    )


class Boot:
    """One boot, from the trigger until nothing is left to do."""

    def __init__(
        self,
        spec: BootSpec,
        seed: int,
        record: Record | None = None,
        *,
        guest: Callable[..., VirtualMachine] = GuestMachine,
    ) -> None:
        """Raise as ``simulate_boot`` does; ``guest`` makes a machine that has a host."""
        machine = spec.machine
        self._spec = spec
        self._files = files = files_of(spec)
        self.kernel = new_kernel(spec, files, seed, guest)
        self._costs = costs = self.kernel.costs
        self.kernel.on_live = self._live
        self.udev = Udev(
            self.kernel,
            self._load_for,
            UdevCosts(costs.event_ns, costs.fork_ns, costs.rules_ns, costs.worker_ns, costs.device_rules_ns),
            spec.userland.workers(machine.cpus, machine.memory_bytes),
            Random(seed),
        )
        self._vary = self.kernel.vary
        self._births = Births(machine, files.kmod)
        self._asks = dict(machine.autoload)
        self._autoloads = Autoloads(self.kernel, partial(self._load, None), merges=spec.merges_requests)
        self._tally = Tally(self.kernel, record)
        self._seqnum = 0
        self._within: frozenset[str] | None = None
        """The modules that there are; None for all of the tree."""
        self._appeared: dict[str, Device] = {device.path: device for device in machine.triggered}
        """The devices that there are."""
        self._asked: dict[str, list[Process] | None] = {}
        """Modaliases that were asked for (one_request_per_modalias): who waits while they are, None after that."""
        self._locked: defaultdict[str, list[Process]] = defaultdict(list)
        """Modules that libkmod has locked (locks_modules): who waits for each."""

    def run(self) -> BootResult:
        """Boot."""
        kernel, udev, machine = self.kernel, self.udev, self._spec.machine
        duration_ns = begun_ns = forked = 0
        if machine.initramfs:
            self._within = frozenset(machine.initramfs)
            kernel.page_cache.is_cold = False
            Process(kernel, self._trigger())
            kernel.run()
            # The root file system has a udevd of its own: by now the workers of the first one have gone, too.
            duration_ns, begun_ns, forked = udev.idle_since_ns, kernel.clock.now_ns, udev.forked
            self._tally.skip(begun_ns - duration_ns)
            self._within = None
            self._asked.clear()
            kernel.page_cache.is_cold = self._costs.first_read_from_disk
        Process(kernel, self._trigger())
        kernel.run()
        if kernel.calls_in_flight:
            # Better no figures than those of a boot that stands still.
            raise RuntimeError(f"{kernel.calls_in_flight} calls have not ended, and nothing is left to be done")
        return self._tally.result(
            duration_ns=duration_ns + udev.idle_since_ns - begun_ns,
            workers=max(forked, udev.forked - forked),
            events=udev.handled,
            autoloads=self._autoloads.count,
            autoloads_failed=self._autoloads.failed,
        )

    # --- the kernel's side ---

    def _send(self, action: str, device: Device) -> None:
        self._seqnum += 1
        self.udev.receive(Event(self._seqnum, action, device))

    def _trigger(self) -> Body:
        """``udevadm trigger``: one device after the other, without waiting for what comes of it."""
        costs, machine = self._costs, self._spec.machine
        vary, trigger_ns = self._vary, costs.trigger_ns
        subsystems = [Device(path) for path in machine.subsystems]
        runs = [subsystems, trigger_order(self._appeared.values())]
        if self._spec.userland.trigger == "root":
            runs = [prioritized_order([*subsystems, *runs[1]])]
        for devices in runs:
            if devices:
                yield vary(costs.exec_ns)
                for device in devices:
                    yield vary(trigger_ns)
                    self._send("add", device)

    def _live(self, module: str) -> None:
        """Say what the kernel says when a module's init has returned."""
        for change in self._births.live(module):
            self._send(change.action, change.device)
            path = change.device.path
            if change.action == "remove":
                self._appeared.pop(path, None)
            elif change.action == "add" and path.startswith("/devices/"):
                self._appeared[path] = change.device
        for name in self._asks.get(module, ()):
            self._autoloads.request(name)

    # --- userland ---

    def _load_for(self, worker: Worker, device: Device) -> Part:
        """Do what the rules have a worker do for a new device with a modalias."""
        modalias = device.modalias
        if self._spec.userland.one_request_per_modalias:
            yield from self._load_once(worker, modalias)
        else:
            yield from self._load(worker, modalias)
        if modalias.startswith("scsi:") and not self._is_live(SCSI_GENERIC):
            yield from self._load(worker, SCSI_GENERIC)

    def _load_once(self, worker: Worker, modalias: str) -> Part:
        """Do so as if udev made one request for each modalias: the first is made, the others wait for it."""
        waiting = self._asked.get(modalias, ...)
        if waiting is ...:
            self._asked[modalias] = []
            yield from self._load(worker, modalias)
            woken, self._asked[modalias] = self._asked[modalias], None
            for process in woken or ():
                process.wake(self._costs.wake_latency_ns)
        elif waiting is not None:
            assert worker.process is not None
            waiting.append(worker.process)
            while self._asked[modalias] is not None:
                yield None

    def _load(self, worker: Worker | None, text: str) -> Part:
        """Do what libkmod does for a MODALIAS or a name."""
        costs, vary = self._costs, self._vary
        yield vary(costs.alias_ns)
        for entry in self._files.kmod.plan(text).entries:
            if self._within is not None and entry.module not in self._within:
                continue
            yield vary(costs.initstate_ns)
            if not self._is_live(entry.module) and entry.insertions:
                yield from self._probe(worker, entry)

    def _probe(self, worker: Worker | None, entry: Entry) -> Part:
        """Try one module, with all that it brings along (``kmod_module_probe_insert_module``)."""
        costs, vary = self._costs, self._vary
        yield vary(costs.name_ns * len(entry.insertions))
        locks = self._spec.userland.locks_modules and worker is not None
        insertions = entry.insertions
        for at, insertion in enumerate(insertions):
            yield vary(costs.initstate_ns)
            if self._is_live(insertion.module):
                continue
            if locks:
                assert worker is not None
                yield from self._lock(worker, insertion.module)
                yield vary(costs.initstate_ns)
                if self._is_live(insertion.module):
                    self._unlock(insertion.module)
                    continue
            call = self._call(worker, insertion)
            if call is None:
                errno = "ENOENT"
            else:
                ending = yield call
                errno = ending.errno
                self._tally.add(call)
            if locks:
                self._unlock(insertion.module)
            if errno == "ENOMEM":
                stranded = insertions[at:] if insertion.is_required else (insertion,)
                self._tally.miss(each.module for each in stranded)
            if errno and errno != "EEXIST" and insertion.is_required:
                return

    def _lock(self, worker: Worker, module: str) -> Part:
        """Lock a module, as libkmod does not: wait for whoever loads it."""
        waiting = self._locked.get(module)
        if waiting is None:
            self._locked[module] = []
            return
        assert worker.process is not None
        waiting.append(worker.process)
        yield None
        # Woken, it has the lock: who leaves hands it on.

    def _unlock(self, module: str) -> None:
        waiting = self._locked[module]
        if waiting:
            waiting.pop(0).wake(self._costs.wake_latency_ns)
        else:
            del self._locked[module]

    def _is_live(self, module: str) -> bool:
        return is_live(self.kernel, module)

    def _call(self, worker: Worker | None, insertion: Insertion) -> VirtualCall | None:
        """Return the call that libkmod makes; None if there is no file to open."""
        files = self._files
        file = files.file(insertion.module)
        if file is None:
            return None
        spec = files.call_spec(file, insertion.module, insertion.options, self._spec)
        return VirtualCall(spec, file, worker=f"udev-{worker.number}" if worker else MODPROBE)
