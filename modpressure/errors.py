"""What can go wrong with a request, apart from what the simulated kernel itself answers.

    ModpressureError
    ├── BadRequest          a field's value makes no sense
    ├── NotFound            no module, system or file of that name
    ├── AlreadyExists       the name is taken
    ├── Forbidden           outside the module tree, or otherwise closed
    ├── OverLimit           more than a limit allows
    ├── NotNow              the state of things does not allow it at present
    └── Unavailable         a part that is needed is away; trying again may help

Each is one sentence that names the value. A failure of the simulated kernel is none of these: it is a result.
"""

from __future__ import annotations


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


class Forbidden(ModpressureError):
    """It lies outside of what may be used."""


class OverLimit(ModpressureError):
    """It is more than a limit allows."""


class NotNow(ModpressureError):
    """The state of things does not allow it at present."""


class Unavailable(ModpressureError):
    """A part that is needed is away; trying again may help."""
