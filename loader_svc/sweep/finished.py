"""One boot that has been simulated, as a row of numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Finished:
    """What one point of a sweep came to. Counts and bytes are the simulated kernel's own; times are virtual."""

    machine: str
    cpus: int
    policy: str
    """The kernel's behaviour that was asked for; a remedy may have another one simulated."""

    remedy: str
    """Name of the remedy that was applied; ``none`` for none."""

    seed: int
    wasted_bytes: int
    """Sum of the kernel's four ``invalid_`` byte counters."""

    becoming: int
    """Calls that failed before their layout was allocated (``failed_becoming``)."""

    load: int
    """Calls that failed after it (``failed_load_modules``)."""

    modules: int
    """Modules loaded (``modcount``)."""

    finit_calls: int
    init_calls: int
    gate_joins: int
    """Calls that took the result of one in flight."""

    failed_inits: int
    failed_kreads: int
    workers: int
    """How many workers udevd started."""

    duration_ns: int
    """Virtual time from the first trigger until udev had nothing left to do."""

    peak_copy_bytes: int
    """Most bytes that copies of files had at one time."""

    peak_held_bytes: int
    """Most memory that module loading had at one time, live modules included."""

    total_mod_size: int
    total_text_size: int
    duplicates: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """By module, newest first: duplicates found at ``becoming``, those found at ``load``, and the bytes they wasted."""

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return asdict(self)

    @classmethod
    def of(cls, document: Any) -> Finished:
        """Return what `document` gave, parsed; ValueError if it is something else."""
        if not isinstance(document, dict) or document.keys() != _KINDS.keys():
            raise ValueError("not the fields of a finished point")
        for name, kind in _KINDS.items():
            if type(document[name]) is not kind:
                raise ValueError(f"{name} is {document[name]!r}")
        duplicates = {
            name: (int(early), int(late), int(wasted_bytes))
            for name, (early, late, wasted_bytes) in document["duplicates"].items()
        }
        return cls(**{**document, "duplicates": duplicates})

    def row(self) -> dict[str, str | int]:
        """Return the fields that are one value each: a row of a table."""
        return {name: getattr(self, name) for name in COLUMNS}


_KINDS: Final[dict[str, type]] = {
    each.name: {"str": str, "int": int}.get(str(each.type), dict) for each in fields(Finished)
}

COLUMNS: Final = tuple(name for name, kind in _KINDS.items() if kind is not dict)
"""Names of the columns, in their order."""
