"""A directory of recorded boots: its table, and what each boot left in files of its own.

``boots.csv`` has a row for each boot; the other files are named for a boot (``calls/calls-BOOT.csv.gz``,
``traces/trace-BOOT.txt.gz``) or for a machine (``uevents/...-MACHINE.txt``). Nothing is read before it is wanted.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

from loader_svc.verify.agreement import number, read_table, read_text
from modpressure.errors import BadRequest, NotFound
from modpressure.kernel.policy import V6_3, V6_4, V6_5, Policy

POLICY_OF: Final = {"A": V6_5, "B": V6_4, "C": V6_3}
"""What a kernel did about duplicates, by the letter that it was booted with."""

CALIBRATION_CPUS: Final = 2
"""Costs are taken from boots with as many CPUs, and from no others."""

STANDARD_MODEL: Final = "max"
STANDARD_UDEV: Final = 252

FIGURES: Final = (
    "modcount",
    "failed_becoming",
    "failed_load_modules",
    "total_mod_size",
    "total_text_size",
    "invalid_becoming_bytes",
    "invalid_mod_bytes",
    "wasted_bytes",
    "finit_calls",
    "init_calls",
    "gate_joins",
    "init_failures",
    "peak_copy_bytes",
    "dup_waited",
    "workers",
    "module_requests",
)
"""Columns with numbers that are used, besides those that say what was booted."""

_COLUMNS: Final = (
    *("variant", "N", "ram_mib", "compress", "rep", "cpu_model", "userland", "note", "boot", "settle_seconds"),
    *FIGURES,
)
_USERLAND: Final = re.compile(r"udev(\d+)-kmod(\d+)")


class Setting(NamedTuple):
    """What boots have in common that are repetitions of each other."""

    policy: Policy
    variant: str
    cpus: int
    cpu_model: str
    compression: str
    """As a suffix, ``zst``; empty for plain files."""
    udev: int
    kmod: int
    memory_bytes: int

    @property
    def machine(self) -> str:
        """What the files of its machine are named for."""
        model = self.cpu_model.partition(",")[0]
        parts = [f"N{self.cpus}"]
        parts += [f"u{self.udev}"] if self.udev != STANDARD_UDEV else []
        parts += [model] if model != STANDARD_MODEL else []
        return "-".join(parts)

    @property
    def line(self) -> tuple[str, ...]:
        """What is the same for other numbers of CPUs."""
        return (
            self.policy.name,
            f"CPU {self.cpu_model.partition(',')[0]}",
            self.compression or "plain",
            f"udev {self.udev}, kmod {self.kmod}",
        )

    def __str__(self) -> str:
        """Return what a table is headed with."""
        policy, *rest = self.line
        return f"{self.cpus} CPUs, {policy}, {', '.join(rest)}"


@dataclass(frozen=True)
class RecordedBoot:
    """One boot as its row has it."""

    name: str
    setting: Setting
    note: str
    """What was otherwise in this boot; such boots are no repetitions of others. Empty mostly."""

    settle_seconds: float
    figures: Mapping[str, int]
    duplicates: Mapping[str, int] | None = None
    """Duplicates by module, both stages together; None where the directory does not have them."""

    @property
    def total(self) -> int:
        """Duplicates of both stages."""
        return self.figures["failed_becoming"] + self.figures["failed_load_modules"]


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One line of a trace."""

    at_ns: int
    cpu: int
    command: str
    pid: int
    event: str
    module: str
    details: str


@dataclass(frozen=True)
class Recording:
    """A directory of recorded boots."""

    directory: Path
    boots: tuple[RecordedBoot, ...] = field(default=())

    @classmethod
    def open(cls, directory: Path) -> Recording:
        """Read the table. NotFound; BadRequest names what makes no sense in it."""
        path = directory / "boots.csv"
        rows = read_table(path, _COLUMNS)
        if not rows:
            raise BadRequest(f"{path} has no boots")
        by_boot = _by_boot(directory / "dups-wide.csv")
        boots = []
        for row in rows:
            try:
                boots.append(_boot(row, by_boot))
            except BadRequest as error:
                raise BadRequest(f"{path}, boot {row['boot']!r}: {error.sentence}") from None
        return cls(directory, tuple(boots))

    def settings(self) -> dict[Setting, list[RecordedBoot]]:
        """Return the boots that are repetitions of each other, in the table's order; none with a note."""
        found: dict[Setting, list[RecordedBoot]] = {}
        for boot in self.boots:
            if not boot.note:
                found.setdefault(boot.setting, []).append(boot)
        return found

    @cached_property
    def calibrating(self) -> tuple[RecordedBoot, ...]:
        """The boots that costs may be taken from: those with two CPUs that left a trace."""
        return tuple(
            boot
            for boot in self.boots
            if boot.setting.cpus == CALIBRATION_CPUS and not boot.note and self.trace_path(boot).is_file()
        )

    def trace_path(self, boot: RecordedBoot) -> Path:
        """Return where the trace of a boot is, if there is one."""
        return self.directory / "traces" / f"trace-{boot.name}.txt.gz"

    def calls_path(self, boot: RecordedBoot) -> Path:
        """Return where the calls of a boot are, if they are."""
        return self.directory / "calls" / f"calls-{boot.name}.csv.gz"

    def trace(self, boot: RecordedBoot) -> Iterator[TraceEvent]:
        """Yield the events of a boot. NotFound, BadRequest."""
        path = self.trace_path(boot)
        for at, line in enumerate(unpacked(path).splitlines(), 1):
            if line.startswith("#"):
                continue
            parts = line.split(" ", 6)
            try:
                seconds, cpu, command, pid, event, module = parts[:6]
                yield TraceEvent(
                    round(float(seconds) * 1e9),
                    int(cpu),
                    command,
                    int(pid),
                    event,
                    module,
                    parts[6] if len(parts) > 6 else "",
                )
            except ValueError:
                raise BadRequest(f"{path}, line {at}: {line[:60]!r} is no event") from None

    def calls(self, boot: RecordedBoot) -> list[dict[str, str]]:
        """Return the calls of a boot, in the order in which they began. NotFound, BadRequest."""
        path = self.calls_path(boot)
        reader = csv.DictReader(unpacked(path).splitlines())
        for column in ("pid", "comm", "sys", "flags", "mod", "role", "len", "clen", "mem", "ret", "initret"):
            if column not in (reader.fieldnames or ()):
                raise BadRequest(f"{path} lacks the column {column!r}")
        return list(reader)

    def lines(self, kind: str, setting: Setting) -> list[str]:
        """Return the lines of a file about a machine, such as ``modalias``. NotFound, BadRequest."""
        return read_text(self.directory / "uevents" / f"{kind}-{setting.machine}.txt").splitlines()

    def failing(self) -> dict[str, set[str]]:
        """Return which modules' init functions failed, by the boots in which they did; empty if that is not told."""
        found: dict[str, set[str]] = {}
        path = self.directory / "initfail-wide.csv"
        for boot, counts in _by_boot(path).items():
            found[boot] = {module for module, count in counts.items() if count}
        return found


def _boot(row: Mapping[str, str], by_boot: Mapping[str, Mapping[str, int]]) -> RecordedBoot:
    policy = POLICY_OF.get(row["variant"])
    if policy is None:
        raise BadRequest(f"variant {row['variant']!r} is none of {', '.join(POLICY_OF)}")
    userland = _USERLAND.fullmatch(row["userland"])
    if userland is None:
        raise BadRequest(f"userland {row['userland']!r} is not like udev252-kmod30")
    try:
        settle_seconds = float(row["settle_seconds"])
    except ValueError:
        raise BadRequest(f"settle_seconds {row['settle_seconds']!r} is not a number") from None
    setting = Setting(
        policy,
        row["variant"],
        number(row, "N"),
        row["cpu_model"],
        "" if row["compress"] == "none" else row["compress"],
        int(userland[1]),
        int(userland[2]),
        number(row, "ram_mib") << 20,
    )
    figures = {name: number(row, name) for name in FIGURES}
    return RecordedBoot(row["boot"], setting, row["note"], settle_seconds, figures, by_boot.get(row["boot"]))


def _by_boot(path: Path) -> dict[str, dict[str, int]]:
    """Read a table with a row for each module and a column for each boot; nothing if there is none. BadRequest."""
    if not path.is_file():
        return {}
    rows = read_table(path, ["module"])
    boots = [name for name in (rows[0] if rows else ()) if name != "module"]
    try:
        return {boot: {row["module"]: number(row, boot) for row in rows} for boot in boots}
    except BadRequest as error:
        raise BadRequest(f"{path}: {error.sentence}") from None


def unpacked(path: Path) -> str:
    """Return the text of a file that gzip has packed. NotFound, BadRequest."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no file {str(path)!r}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadRequest(f"{str(path)!r} can't be read: {error}") from None
