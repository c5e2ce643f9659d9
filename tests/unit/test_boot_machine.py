"""Machines: their files, the ones that come along, the order of their devices, and recording one from a /sys."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest

from loader_svc.boot.device import Device, prioritized_order, trigger_order
from loader_svc.boot.machine import Machine, MachineError, ModuleInit
from loader_svc.boot.machine_file import bundled_machines, machine_of, machine_text, parse_machine, read_machine
from loader_svc.boot.machine_record import record_machine
from loader_svc.boot.userland import Userland, children_max
from modpressure.errors import BadRequest, NotFound

GIB = 1 << 30

SMALL = """
name = "small"
cpus = 4
memory_bytes = 1073741824
[[device]]
path = "/sys/devices/system/cpu/cpu{cpu}"
modalias = "cpu:type:x86"
[[device]]
path = "/devices/acpi/LNXCPU:{cpu:02x}"
[[device]]
path = "/devices/pci/a/virtio0"
born = true
"""


def test_the_description_in_the_documentation_is_one() -> None:
    """What docs/boot.md shows as an example is read, each key of it."""
    text = (Path(__file__).parents[2] / "docs" / "boot.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    machine = parse_machine(block)
    assert (machine.name, machine.cpus, machine.own_costs().page_ns) == ("example", 8, 300)
    assert [device.is_born for device in machine.devices] == [False, False, True]


def test_a_template_stands_for_one_device_of_each_cpu() -> None:
    machine = parse_machine(SMALL).with_cpus(17)
    assert len(machine.triggered) == 34
    paths = [device.path for device in machine.triggered]
    assert paths[16] == "/devices/acpi/LNXCPU:10"
    # Sorted as texts, as udevadm does.
    assert paths[17:21] == [f"/devices/system/cpu/cpu{cpu}" for cpu in (0, 1, 10, 11)]
    assert [device.path for device in machine.born] == ["/devices/pci/a/virtio0"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ('colour = "red"', "there is no key 'colour'"),
        ("cpus = 0", "cpus 0 is not between 1 and 65536"),
        ("cpus = 10000000", "cpus 10000000 is not between"),
        ("cpus = -1", "cpus -1 is not between"),
        ("cpus = 2.5", "cpus 2.5 is not a whole number"),
        ("cpus = true", "cpus True is not a whole number"),
        ("memory_bytes = -5", "memory_bytes -5 is not between"),
        ("file_factor = nan", "file_factor nan is not a finite number"),
        ("file_factor = inf", "file_factor inf is not a finite number"),
        ("file_factor = -1.0", "file_factor -1.0 is not between"),
        ("host_cpus = 0", "host_cpus 0 is not between"),
        ('device = "x"', "device 'x' is not a list"),
        ("device = [3]", "device 1 is 3, not a table"),
        ('device = [{path = "relative"}]', "'relative' is no path below /sys"),
        ('device = [{path = "/a/../b"}]', "no path below /sys"),
        ('device = [{path = "/a"}, {path = "/sys/a"}]', "device 2: /a is there twice"),
        ('device = [{path = "/a", modalia = "x"}]', "device 1: there is no key 'modalia'"),
        ("subsystems = [1]", "subsystems has 1"),
        ("costs = {page_ns = -1}", "costs: page_ns = -1 is out of bounds"),
        ("costs = {colour = 1}", "costs: there is no such cost"),
        ("file_bytes = {kvm = -1}", "file_bytes.kvm -1 is not a number of bytes"),
        ('init = {kvm = {errno = "ENOTHING"}}', "there is no errno 'ENOTHING'"),
        ("init = {kvm = {duration_ns = -1}}", "duration_ns -1 is not between"),
        ("init = {kvm = 3}", "init.kvm is 3, not a table"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_in_one_sentence(change: str, sentence: str) -> None:
    lines = [
        line
        for line in ('name = "m"', "cpus = 4", "memory_bytes = 1073741824", "device = []")
        if line.split()[0] != change.split()[0]
    ]
    with pytest.raises(MachineError) as error:
        parse_machine("\n".join([*lines, change]))
    assert sentence in error.value.sentence
    assert "\n" not in error.value.sentence


@pytest.mark.parametrize("key", ["name", "cpus", "memory_bytes", "device"])
def test_what_a_description_lacks_is_named(key: str) -> None:
    lines = ('name = "m"', "cpus = 4", "memory_bytes = 1073741824", "device = []")
    with pytest.raises(MachineError, match=f"lacks '{key}'"):
        parse_machine("\n".join(line for line in lines if line.split()[0] != key))


def test_a_file_that_is_none_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="can't be read"):
        read_machine(tmp_path / "none.toml")
    path = tmp_path / "half.toml"
    path.write_text('name = "m"\ncpus = ')
    with pytest.raises(MachineError, match=r"half\.toml: the description is not TOML"):
        read_machine(path)
    with pytest.raises(NotFound, match="there is no machine 'zx81'; there are nvme-255, "):
        machine_of("zx81")


def test_the_text_of_a_machine_reads_back_as_it_was() -> None:
    machine = Machine(
        'a "name"',
        3,
        GIB,
        (
            Device("/devices/a", 'x:"\x7f\\', "b8:0", "sda", "ahci"),
            Device("/devices/a/b", is_born=True, born_of="m", dies_with="n"),
        ),
        ("/bus/pci",),
        (ModuleInit("m", "ENODEV", 5, True), ModuleInit("n")),
        host_cpus=2,
        file_factor=6.8,
        file_bytes=(("kvm", 12),),
        costs=(("page_ns", 2000), ("first_read_from_disk", True), ("jitter", 0.25)),
        builtin=("a", "b"),
        initramfs=("m",),
        needs=(("m", ("n",)),),
        autoload=(("m", ("k", "l")),),
        description="text",
    )
    assert parse_machine(machine_text(machine, ["heading"])) == machine


def test_the_bundled_machines_read_back_and_grow() -> None:
    machines = bundled_machines()
    assert {"virtio-8", "nvme-255", "server-2s", "server-8s"} <= set(machines)
    for machine in machines.values():
        assert parse_machine(machine_text(machine)) == machine
        grown = machine.with_cpus(machine.cpus + 100)
        assert len(grown.triggered) == len(machine.triggered) + 5 * 100


def test_a_machine_can_be_pickled_after_use() -> None:
    machine = bundled_machines()["nvme-255"].with_cpus(4096)
    assert len(machine.triggered) > 4096
    packed = pickle.dumps(machine)
    assert len(packed) < 100_000
    again = pickle.loads(packed)
    assert again == machine
    assert again.triggered == machine.triggered


def test_devices_are_triggered_by_path_with_late_sound_controls_and_last_md() -> None:
    paths = [
        "/devices/virtual/block/md0",
        "/devices/virtual/block/dm-0",
        "/devices/virtual/mem/null",
        "/devices/pci/1/sound/card0/controlC0",
        "/devices/pci/1/sound/card0/pcmC0D0p",
        "/devices/pci/1/sound/card0",
        "/devices/pci/1",
        "/devices/pci/1-2",
    ]
    assert [device.path for device in trigger_order(Device(path) for path in paths)] == [
        "/devices/pci/1",
        "/devices/pci/1/sound/card0",
        "/devices/pci/1/sound/card0/pcmC0D0p",
        "/devices/pci/1/sound/card0/controlC0",
        "/devices/pci/1-2",
        "/devices/virtual/mem/null",
        "/devices/virtual/block/dm-0",
        "/devices/virtual/block/md0",
    ]


def test_on_a_root_file_system_some_subsystems_come_first_with_what_is_above_them() -> None:
    paths = [
        "/bus/pci",
        "/devices/pci/1",
        "/devices/pci/1/block/sda",
        "/devices/pci/1/block/sda/sda1",
        "/devices/pci/2",
        "/devices/pci/3/net/eth0",
        "/devices/system/cpu/cpu0",
        "/devices/virtual/tty/tty0",
        "/module/vt",
    ]
    order = [device.path for device in prioritized_order(Device(path) for path in reversed(paths))]
    assert order == [
        "/module/vt",
        "/devices/pci/1",
        "/devices/pci/1/block/sda",
        "/devices/pci/1/block/sda/sda1",
        "/devices/pci/3/net/eth0",
        "/devices/virtual/tty/tty0",
        "/bus/pci",
        "/devices/pci/2",
        "/devices/system/cpu/cpu0",
    ]


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_devices_are_triggered_in_the_recorded_order(shared_dir: Path, cpus: int) -> None:
    path = shared_dir / "data/golden/boots/uevents" / f"trigger-devices-N{cpus}.txt"
    if not path.is_file():
        pytest.skip(f"no recorded order at {path}")
    recorded = path.read_text().splitlines()
    shuffled = sorted(recorded, key=lambda line: line[::-1])
    assert [device.path for device in trigger_order(Device(line) for line in shuffled)] == recorded


@pytest.mark.parametrize(
    ("cpus", "memory_bytes", "workers"),
    [
        (2, 4 * GIB, 20),
        (4, 64 * GIB, 24),
        (8, 64 * GIB, 32),
        (255, 256 * GIB, 526),
        (4096, 6144 * GIB, 2048),
        (64, GIB, 10),
        (64, 4 * GIB, 32),
    ],
)
def test_udev_has_as_many_workers_as_its_rule_says(cpus: int, memory_bytes: int, workers: int) -> None:
    assert children_max(cpus, memory_bytes) == workers
    assert Userland(udev_workers=3).workers(cpus, memory_bytes) == 3


def test_userlands_that_there_are_not() -> None:
    with pytest.raises(BadRequest, match="kmod 31 is not 30 or 34"):
        Userland(kmod=31)
    with pytest.raises(BadRequest, match="udev_workers 0 is not between 1 and 2048"):
        Userland(udev_workers=0)
    with pytest.raises(BadRequest, match="trigger 'all' is not initramfs or root"):
        Userland(trigger="all")  # type: ignore[arg-type]
    assert not Userland(kmod=30).hands_over
    assert Userland(kmod=34).hands_over
    assert replace(Userland(kmod=34), reads_decompression=False).hands_over is False


class FakeSys:
    """A small /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "devices").mkdir(parents=True)

    def device(self, path: str, subsystem: str, uevent: str = "", module: str = "", *, loaded: bool = True) -> None:
        directory = self.root / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "uevent").write_text(uevent)
        bus = self.root / "bus" / subsystem
        bus.mkdir(parents=True, exist_ok=True)
        (directory / "subsystem").symlink_to(bus)
        if module:
            driver = bus / "drivers" / f"{module}_driver"
            driver.mkdir(parents=True)
            home = self.root / "module" / module
            home.mkdir(parents=True)
            (home / "uevent").write_text("")
            if loaded:
                (home / "initstate").write_text("live\n")
            (driver / "module").symlink_to(home)
            (directory / "driver").symlink_to(driver)


def test_a_recorded_machine_has_templates_and_knows_what_modules_brought_to_life(tmp_path: Path) -> None:
    sys = FakeSys(tmp_path)
    for cpu in range(4):
        sys.device(f"devices/system/cpu/cpu{cpu}", "cpu", "MODALIAS=cpu:type:x86,x\n")
    sys.device("devices/pci0/0000:00:01.0", "pci", "PCI_ID=1\nMODALIAS=pci:v1\n", "virtio_pci")
    sys.device("devices/pci0/0000:00:01.0/virtio0", "virtio", "MODALIAS=virtio:d1\n")
    sys.device("devices/pci0/0000:00:01.0/virtio0/block/vda", "block", "MAJOR=253\nMINOR=0\nDEVNAME=vda\n")
    sys.device("devices/pci0/0000:00:02.0", "pci", "MODALIAS=pci:v2\n", "serial8250", loaded=False)
    sys.device("devices/pci0/0000:00:02.0/tty/ttyS0", "tty", "MAJOR=4\nMINOR=64\nDEVNAME=ttyS0\n")
    sys.device("devices/pci0/0000:00:03.0/net/eth0", "net", "IFINDEX=2\nINTERFACE=eth0\n")
    machine = record_machine(tmp_path, name="fake", memory_bytes=GIB)
    assert machine.cpus == 4
    assert {device.path: device.is_born for device in machine.devices} == {
        "/devices/system/cpu/cpu{cpu}": False,
        "/devices/pci0/0000:00:01.0": False,
        "/devices/pci0/0000:00:01.0/virtio0": True,
        "/devices/pci0/0000:00:01.0/virtio0/block/vda": True,
        "/devices/pci0/0000:00:02.0": False,
        "/devices/pci0/0000:00:02.0/tty/ttyS0": False,
        "/devices/pci0/0000:00:03.0/net/eth0": False,
    }
    ids = {device.path.rsplit("/", 1)[-1]: (device.device_id, device.node, device.driver) for device in machine.devices}
    assert ids["vda"] == ("b253:0", "vda", "")
    assert ids["ttyS0"] == ("c4:64", "ttyS0", "")
    assert ids["eth0"] == ("n2", "", "")
    assert ids["0000:00:01.0"] == ("+pci:0000:00:01.0", "", "virtio_pci")
    assert ids["0000:00:02.0"][2] == ""
    # Modules that were loaded by then are not there at boot.
    assert [path for path in machine.subsystems if path.startswith("/module")] == ["/module/serial8250"]
    assert parse_machine(machine_text(machine)) == machine
    assert [device.path for device in machine.with_cpus(2).triggered if "cpu" in device.path] == [
        "/devices/system/cpu/cpu0",
        "/devices/system/cpu/cpu1",
    ]


def test_there_is_nothing_to_record_without_devices(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no directory"):
        record_machine(tmp_path)
