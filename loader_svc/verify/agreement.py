"""What a comparison comes to, and the tables that it reads."""

from __future__ import annotations

import csv
import errno as errnos
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from modpressure.errors import BadRequest, NotFound
from modpressure.kernel.counters import KERNEL_COUNTER_NAMES, Counters

Row = Mapping[str, str]

DELTA_COLUMNS: Final = {f"d_{name}": name for name in KERNEL_COUNTER_NAMES}
"""Columns with the change of each of the kernel's counters."""


@dataclass(slots=True)
class Agreement:
    """How far the simulation agrees with a table of measurements."""

    total: int = 0
    agreed: int = 0
    differences: list[str] = field(default_factory=list)
    """A line for each row that does not agree: where, and what was measured and what was simulated."""

    notes: list[str] = field(default_factory=list)
    """What was not compared, and why."""

    def add(self, where: str, differing: Sequence[str]) -> None:
        """Count one row; ``differing`` says what differs, nothing if it agrees."""
        self.total += 1
        if differing:
            self.differences.append(f"{where}: {'; '.join(differing)}")
        else:
            self.agreed += 1

    @property
    def is_complete(self) -> bool:
        """Whether there was something to compare and all of it agrees."""
        return 0 < self.total == self.agreed

    @property
    def summary(self) -> str:
        """The last line of a report."""
        return f"{self.agreed} of {self.total} agree"


def read_table(path: Path, columns: Iterable[str]) -> list[Row]:
    """Return the rows of a CSV that has to have ``columns``. NotFound, or BadRequest that names what is wrong."""
    text = read_text(path)
    reader = csv.DictReader(text.splitlines())
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise BadRequest(f"{path} lacks the column {missing[0]!r}")
    rows: list[Row] = []
    for row in reader:
        if None in row or None in row.values():
            raise BadRequest(f"{path}, line {reader.line_num}: not as many fields as there are columns")
        rows.append(row)
    return rows


def read_text(path: Path) -> str:
    """Return the text of a file. NotFound, or BadRequest for what is no text."""
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise BadRequest(f"{str(path)!r} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadRequest(f"{str(path)!r} is no text") from None


def number(row: Row, column: str) -> int:
    """Return a whole number of a row. BadRequest names the value that is none."""
    try:
        return int(row[column])
    except ValueError:
        raise BadRequest(f"column {column}: {row[column]!r} is not a whole number", field=column) from None


MAX_WORKERS: Final = 10_000
"""Most workers that are simulated, as for storms on real loaders."""

MAX_CPUS: Final = 4096


def bounded(row: Row, column: str, most: int) -> int:
    """Return a whole number of a row that has to be from 1 to ``most``. BadRequest names the value that is not."""
    value = number(row, column)
    if not 1 <= value <= most:
        raise BadRequest(f"column {column}: {value} is not between 1 and {most}", field=column)
    return value


def errno_number(name: str) -> int:
    """Return the number of an errno by its name, 0 for none."""
    return int(getattr(errnos, name)) if name else 0


def errno_word(value: int) -> str:
    """Return the name of an errno by its number, ``OK`` for 0."""
    return errnos.errorcode.get(value, str(value)) if value else "OK"


def errno_difference(label: str, measured: int, simulated: int) -> list[str]:
    """Say how two results differ, if they do."""
    if measured == simulated:
        return []
    return [f"{label} measured {errno_word(measured)}, simulated {errno_word(simulated)}"]


def counter_differences(row: Row, before: Counters, after: Counters) -> list[str]:
    """Say in which counters a row's changes differ from those between two states."""
    differing = []
    for column, name in DELTA_COLUMNS.items():
        if column in row:
            change = getattr(after, name) - getattr(before, name)
            if change != number(row, column):
                differing.append(f"{name} measured {number(row, column):+d}, simulated {change:+d}")
    return differing
