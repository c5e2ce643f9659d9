"""What a remedy is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from loader_svc.boot import BootSpec
from modpressure.errors import BadRequest, ModpressureError


class RemedyError(BadRequest):
    """A remedy is not known, or does not do what a remedy does."""


@runtime_checkable
class Remedy(Protocol):
    """Something that might make a boot waste less: it makes another boot of one."""

    @property
    def name(self) -> str:
        """What it is called, such as ``workers:16``."""

    @property
    def sentence(self) -> str:
        """What is done, in one sentence, for a table."""

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with the remedy; equal to ``spec`` if that has it already. Pure."""


def applied(remedy: Remedy, spec: BootSpec) -> BootSpec:
    """Return a boot with a remedy. RemedyError if that fails, or gives something else than a boot."""
    try:
        made = remedy.apply(spec)
    except ModpressureError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or "no more is known"
        raise RemedyError(f"remedy {remedy.name!r} can't be applied: {type(error).__name__}: {why}") from error
    if not isinstance(made, BootSpec):
        raise RemedyError(f"remedy {remedy.name!r} gives a {type(made).__name__}, not a BootSpec")
    return made
