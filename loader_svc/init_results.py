"""What only running a module's code could tell: how long its init function takes, and what it returns.

The file is a CSV with the columns ``module``, ``condition``, ``duration_ms`` and ``result``. ``*`` stands for
every module. A condition is ``always`` or ``while NAME is live``. A duration is

- a number of milliseconds, such as ``2.5``;
- ``parameter NAME (default N)``: what the module's parameter of that name says;
- ``quantiles A B C ...``: drawn anew for each init, between any two neighbours with equal chance, so that ``quantiles 1
  5`` is uniform, and of ``quantiles 0 2 100`` every second draw is below 2.

A result is a number, an errno such as ``-ENODEV``, a parameter likewise, or ``-EIO in 10%`` for an error that comes by
chance. Of the rows for a module the first that fits decides, and then of those for ``*``; without one an init function
returns 0 at once.
"""

from __future__ import annotations

import csv
import errno as errnos
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Final, NamedTuple

from loader_svc.virtual.costs import Duration, draw

COLUMNS: Final = ("module", "condition", "duration_ms", "result")

_WHILE_LIVE: Final = re.compile(r"while (\S+) is live\b.*")
_PARAMETER: Final = re.compile(r"parameter (\w+) \(default (-?\d+)\)")
_ERRNO: Final = re.compile(r"-(E[A-Z0-9]+)(?: in (\d+(?:\.\d+)?)%)?")
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")

ANY_MODULE: Final = "*"
MAX_DURATION_MS: Final = 10**9
"""Longest duration, some eleven days: more is a slip of the keyboard."""

_NS_PER_MS: Final = 1_000_000


class InitResultsError(ValueError):
    """A file of init results that can't be understood; one sentence that names the value."""


class InitResult(NamedTuple):
    """What running an init function comes to."""

    duration_ns: int = 0
    errno: str = ""
    """Empty for success. A positive result is one, too: the module stays."""


@dataclass(frozen=True, slots=True)
class _Value:
    parameter: str
    default: int

    def of(self, arguments: Mapping[str, str]) -> int:
        text = arguments.get(self.parameter, "") if self.parameter else ""
        try:
            return int(text, 0) if text else self.default
        except ValueError:
            return self.default


@dataclass(frozen=True, slots=True)
class _Row:
    module: str
    while_live: str
    duration_ns: Duration | _Value
    result: _Value
    chance: float
    """How often the result comes about; else it is 0."""

    def of(self, arguments: Mapping[str, str], dice: Callable[[], Random]) -> InitResult:
        is_drawn = isinstance(self.duration_ns, tuple) or self.chance < 1
        drawn = dice() if is_drawn else _NO_DICE
        if isinstance(self.duration_ns, _Value):
            duration_ns = min(max(self.duration_ns.of(arguments), 0), MAX_DURATION_MS) * _NS_PER_MS
        else:
            duration_ns = draw(self.duration_ns, drawn)
        result = self.result.of(arguments)
        if self.chance < 1 and drawn.random() >= self.chance:
            result = 0
        return InitResult(duration_ns, errnos.errorcode.get(-result, "EINVAL") if result < 0 else "")


_NO_DICE: Final = Random(0)
"""Never thrown: for what leaves nothing to chance."""


class InitResults:
    """The results of all modules that are not plain."""

    def __init__(self, rows: Iterable[Mapping[str, str | None]] = ()) -> None:
        """InitResultsError for a row that can't be understood."""
        self._rows: dict[str, list[_Row]] = {}
        for row in rows:
            parsed = _row(row)
            self._rows.setdefault(parsed.module, []).append(parsed)

    @classmethod
    def parse(cls, text: str) -> InitResults:
        """Read the text of a file. InitResultsError."""
        reader = csv.DictReader(text.splitlines())
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise InitResultsError(f"the init results lack the column {min(missing)!r}")
        return cls(reader)

    def is_told(self, module: str) -> bool:
        """Whether anything is said of the init function of ``module``."""
        return module in self._rows or ANY_MODULE in self._rows

    def looked_at_by(self, module: str) -> set[str]:
        """Return the modules that it depends on whether they are live."""
        return {row.while_live for row in self._of(module) if row.while_live}

    def _of(self, module: str) -> Iterable[_Row]:
        return (*self._rows.get(module, ()), *self._rows.get(ANY_MODULE, ()))

    def of(
        self,
        module: str,
        arguments: Mapping[str, str],
        is_live: Callable[[str], bool],
        dice: Callable[[], Random] = lambda: Random(0),
    ) -> InitResult:
        """Return what the init function of ``module`` comes to with these parameters.

        ``is_live`` tells of other modules; ``dice`` returns what to draw from, and is called at most once.
        """
        for row in self._of(module):
            if not row.while_live or is_live(row.while_live):
                return row.of(arguments, dice)
        return InitResult()


def _row(row: Mapping[str, str | None]) -> _Row:
    module, condition, duration, result = (str(row.get(column) or "").strip() for column in COLUMNS)
    match = _WHILE_LIVE.fullmatch(condition)
    if condition != "always" and match is None:
        raise InitResultsError(f"the condition {condition!r} of {module!r} is not 'always' or 'while NAME is live'")
    value, chance = _result(module, result)
    return _Row(module, match[1] if match else "", _duration(module, duration), value, chance)


def _duration(module: str, text: str) -> Duration | _Value:
    if match := _PARAMETER.fullmatch(text):
        return _Value(match[1], int(match[2]))
    word, *rest = text.split() or [""]
    figures = rest if word == "quantiles" else [text]
    if not all(map(_NUMBER.fullmatch, figures)) or (word == "quantiles" and len(figures) < 2):
        raise InitResultsError(
            f"the duration {text!r} of {module!r} is no number of ms, no parameter and no 'quantiles A B ...'"
        )
    durations_ns = [round(float(figure) * _NS_PER_MS) for figure in figures]
    if durations_ns != sorted(durations_ns) or durations_ns[-1] > MAX_DURATION_MS * _NS_PER_MS:
        raise InitResultsError(
            f"the duration {text!r} of {module!r} does not rise, or goes beyond {MAX_DURATION_MS} ms"
        )
    return tuple(durations_ns) if word == "quantiles" else durations_ns[0]


def _result(module: str, text: str) -> tuple[_Value, float]:
    if match := _PARAMETER.fullmatch(text):
        return _Value(match[1], int(match[2])), 1
    if match := _ERRNO.fullmatch(text):
        number = getattr(errnos, match[1], None)
        chance = float(match[2] or 100) / 100
        if isinstance(number, int) and chance <= 1:
            return _Value("", -number), chance
    try:
        return _Value("", int(text)), 1
    except ValueError:
        raise InitResultsError(f"the result {text!r} of {module!r} is no number, errno or parameter") from None
