"""What can go wrong with a request, apart from what the simulated kernel itself answers.

    ModpressureError
    ├── BadRequest          a field's value makes no sense
    ├── NotFound            no module, system or file of that name
    ├── AlreadyExists       the name is taken
    ├── Unauthenticated     no token, or none that is known
    ├── Forbidden           outside the module tree, or otherwise closed
    ├── OverLimit           more than a limit allows
    │   └── Overloaded      more than there is room for now; nothing was begun, trying again will help
    ├── NotNow              the state of things does not allow it at present
    │   └── LeaseEnded      whoever asks was away for too long or is not known, and has to begin anew
    ├── Replaced            whoever asks has a successor, and has to end
    └── Unavailable         a part that is needed is away; trying again may help

Each is one sentence that names the value. A failure of the simulated kernel is none of these: it is a result.
"""

from __future__ import annotations

from typing import Final

_MAX_SHOWN: Final = 80


def shown(value: str) -> str:
    """Return ``value`` as it stands in a sentence: quoted, on one line, and not too long to be read."""
    return repr(value) if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]!r}... ({len(value)} characters)"


class ModpressureError(Exception):
    """Something went wrong, said in one sentence."""

    def __init__(self, sentence: str, *, field: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.field = field
        """The field of the request that is to blame, empty for none."""


class BadRequest(ModpressureError):
    """A field's value makes no sense."""


class NotFound(ModpressureError):
    """There is nothing of that name."""


class AlreadyExists(ModpressureError):
    """The name is taken."""


class Unauthenticated(ModpressureError):
    """There is no token, or none that is known and still good."""


class Forbidden(ModpressureError):
    """It lies outside of what may be used."""


class OverLimit(ModpressureError):
    """It is more than a limit allows."""


class Overloaded(OverLimit):
    """It is more than there is room for at present: nothing of it was begun, and it may be asked again a bit later."""

    def __init__(self, sentence: str, *, field: str = "", retry_seconds: float = 1.0) -> None:
        super().__init__(sentence, field=field)
        self.retry_seconds = retry_seconds
        """When to try again."""


class NotNow(ModpressureError):
    """The state of things does not allow it at present."""


class LeaseEnded(NotNow):
    """Nothing more is accepted of whoever asks, as it was away for too long or is not known: it has to begin anew."""


class Replaced(ModpressureError):
    """Somebody newer has taken the place of whoever asks: nothing more is accepted of it, it has to end."""


class Unavailable(ModpressureError):
    """A part that is needed is away; trying again may help."""
