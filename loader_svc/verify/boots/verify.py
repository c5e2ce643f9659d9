"""Recorded boots, each booted again in virtual time under several seeds, and held against what was recorded."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loader_svc.boot.births import Births
from loader_svc.boot.files import BootFiles
from loader_svc.boot.spec import BootSpec
from loader_svc.sweep.finished import Finished
from loader_svc.sweep.point import Point
from loader_svc.sweep.side_by_side import agreed
from loader_svc.verify.agreement import Agreement
from loader_svc.verify.boots.calibration import Calibration, calibrated, calibrating_boots
from loader_svc.verify.boots.calls import compare_calls
from loader_svc.verify.boots.comparison import BootsTable, compared, lines
from loader_svc.verify.boots.fit import fitted
from loader_svc.verify.boots.machine import has_modprobe_dir, recorded_machine, recorded_spec, write_modprobe_dir
from loader_svc.verify.boots.monitor import monitored
from loader_svc.verify.boots.recorded import RecordedBoot, Recording, Setting
from loader_svc.virtual.costs import Costs, default_costs
from modpressure.errors import BadRequest, NotFound

Run = Callable[[list[Point]], Sequence[Finished]]
"""Simulates points and returns what they came to, in their order."""

PACKED_TREE = "modroot.tar.xz"


@dataclass(frozen=True)
class Comparison:
    """What a directory of boots came to."""

    tables: list[BootsTable]
    calibrated_from: tuple[str, ...]
    """The boots that costs were taken from."""
    notes: list[str]
    calls: list[Agreement]
    """The calls of each boot, if they were asked for."""

    @property
    def rows(self) -> tuple[int, int]:
        """How many figures that have a bound agree, and how many there are."""
        figures, bounded = agreed(self.tables)
        return figures + sum(each.agreed for each in self.calls), bounded + sum(each.total for each in self.calls)

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        right, total = self.rows
        return {
            "agreed": right,
            "total": total,
            "calibrated_from": list(self.calibrated_from),
            "notes": self.notes,
            "tables": [table.document() for table in self.tables],
            "calls": [
                {"agreed": each.agreed, "total": each.total, "differences": each.differences} for each in self.calls
            ],
        }


class Boots:
    """A directory of recorded boots, with all that is needed to simulate them: a tree, configuration, costs."""

    def __init__(self, recording: Recording, tree: Path, directory: Path, calibrating: Recording, base: Costs) -> None:
        """``directory`` is where configuration may be written; ``calibrating`` has the boots that costs come from."""
        self.recording = recording
        self._tree = tree
        self._directory = directory
        self._configured = recording if has_modprobe_dir(recording) else calibrating
        self._monitor = monitored(recording.directory) or monitored(calibrating.directory)
        self.calibration = self._calibrated(calibrating, base)
        self._costs = self._fitted(calibrating)

    def spec(self, setting: Setting) -> BootSpec:
        """Return the boot of a setting. NotFound, BadRequest."""
        return self._spec(self.recording, setting, self._costs, self.calibration)

    def _spec(self, recording: Recording, setting: Setting, costs: Costs, calibration: Calibration | None) -> BootSpec:
        failing = dict(calibration.failing.get(setting.cpu_model, {})) if calibration is not None else {}
        if calibration is not None and not failing:
            failing = self._told_to_fail(recording, setting)
        machine = recorded_machine(
            recording,
            setting,
            failing=failing,
            asked=calibration.asked if calibration is not None else {},
            monitor=self._monitor,
        )
        modprobe = write_modprobe_dir(self._configured, setting, self._directory / f"modprobe-u{setting.udev}")
        return recorded_spec(recording, setting, machine, self._tree, [modprobe] if modprobe else [], costs)

    @staticmethod
    def _told_to_fail(recording: Recording, setting: Setting) -> dict[str, str]:
        """Return what fails on a CPU model that no calibrating boot had: the table of failed inits has no errnos."""
        failing = recording.failing()
        names = {boot.name for boot in recording.boots if boot.setting.cpu_model == setting.cpu_model}
        return {module: "ENODEV" for name in names for module in failing.get(name, ())}

    def _calibrated(self, calibrating: Recording, base: Costs) -> Calibration:
        spec = self._spec(calibrating, calibrating_boots(calibrating)[0].setting, base, None)
        files = BootFiles(spec)
        makers = Births(spec.machine, files.kmod).makers()

        def relocations(module: str) -> int:
            file = files.file(module)
            if file is None:
                raise BadRequest(f"the tree {self._tree} has no module {module!r}, which a recorded boot loaded")
            plan, _ = file.plan(files.plans, files.call_spec(file, module, "", spec))
            return plan.linkage.relocations if plan.linkage is not None else 0

        return calibrated(calibrating, relocations, lambda modalias: makers.get(modalias, ""), base)

    def _fitted(self, calibrating: Recording) -> Costs:
        calibration = self.calibration
        settings = {boot.setting: None for boot in calibration.boots}
        specs = [self._spec(calibrating, setting, calibration.costs, calibration) for setting in settings]
        return fitted(calibration.costs, calibration.steps, specs, calibration.start)


@contextmanager
def opened(
    directory: Path, *, tree: Path | None = None, calibrate: Path | None = None, base: Costs | None = None
) -> Iterator[Boots]:
    """Open a directory of boots, with its tree unpacked for as long. NotFound, BadRequest, OSError.

    ``tree`` is one to be taken instead of the directory's own, ``calibrate`` has the boots with two CPUs if the
    directory has none, ``base`` says what decompressing takes.
    """
    recording = Recording.open(directory)
    calibrating = recording if calibrate is None or calibrate == directory else Recording.open(calibrate)
    calibrating_boots(calibrating)  # refuses before anything is unpacked
    with tempfile.TemporaryDirectory(prefix="modpressure-boots-") as made:
        root = tree if tree is not None else _unpacked(directory, calibrate, Path(made))
        yield Boots(recording, root, Path(made), calibrating, base or default_costs())


def _unpacked(directory: Path, calibrate: Path | None, made: Path) -> Path:
    """Unpack the tree of a directory of boots, or else of the one that is calibrated from. NotFound, BadRequest."""
    places = [directory, *([calibrate] if calibrate is not None else [])]
    packed = next((place / PACKED_TREE for place in places if (place / PACKED_TREE).is_file()), None)
    if packed is None:
        raise NotFound(f"there is no {PACKED_TREE} in {directory}: --tree names the modules that were booted")
    try:
        with tarfile.open(packed) as archive:
            archive.extractall(made / "tree", filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise BadRequest(f"{packed} can't be unpacked: {error}") from None
    found = sorted((made / "tree").glob("lib/modules/*"))
    if len(found) != 1:
        raise BadRequest(f"{packed} has {len(found)} directories lib/modules/RELEASE, not one")
    return found[0]


def compare(boots: Boots, run: Run, *, repeat: int, seed: int, calls: bool = False) -> Comparison:
    """Simulate every boot with as many seeds, from ``seed`` on, and hold the figures against each other.

    ``calls`` says whether to compare the calls of each boot, too, as far as they were recorded.
    """
    settings = boots.recording.settings()
    points = []
    for place, setting in enumerate(settings):
        spec = boots.spec(setting)
        points += [
            Point(setting.machine, setting.cpus, setting.policy.name, "none", each, spec, f"recorded boots {place}")
            for each in range(seed, seed + repeat)
        ]
    done = run(points)
    both: dict[Setting, tuple[Sequence[RecordedBoot], Sequence[Finished]]] = {}
    for place, (setting, recorded) in enumerate(settings.items()):
        both[setting] = recorded, done[place * repeat : (place + 1) * repeat]
    tables = [compared(setting, recorded, simulated) for setting, (recorded, simulated) in both.items()]
    notes = [f"left out: {boot.name}, {boot.note}" for boot in boots.recording.boots if boot.note]
    agreements = []
    for setting, recorded in settings.items() if calls else ():
        for boot in recorded:
            if boots.recording.calls_path(boot).is_file():
                agreements.append(compare_calls(boots.recording, boot, boots.spec(setting), seed))
            else:
                notes.append(f"no calls: {boot.name}")
    return Comparison(
        [*tables, *lines(both)],
        tuple(boot.name for boot in boots.calibration.boots),
        notes,
        agreements,
    )
