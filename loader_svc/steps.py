"""The small steps that a call is made of. The pipeline says which come when; a driver carries them out.

Each step names what the driver must do and what it sends back. Whatever fails as the kernel would fail is sent back as
a ``Failure``, never raised: what follows from it is the pipeline's to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import Policy

MAX_VALUE_BYTES: Final = 4096
"""Longest value that a call's ending tells: as long as a module's parameters, or a path. A file may name symbols of any
length, and stats_svc refuses calls of more than 16 KiB."""


def told(value: str) -> str:
    """Return a value that offended as a call's ending tells it: what is too long is cut, and says so."""
    content = value.encode(errors="replace")
    if len(content) <= MAX_VALUE_BYTES:
        return content.decode()
    end = f"... ({len(content)} bytes)"
    return content[: MAX_VALUE_BYTES - len(end)].decode(errors="ignore") + end


@dataclass(frozen=True, slots=True)
class Caller:
    """What the kernel may hold against a call besides its file: the caller's rights, descriptor and addresses."""

    is_permitted: bool = True
    """Whether it has CAP_SYS_MODULE, and loading is not switched off (sysctl kernel.modules_disabled)."""

    descriptor: Literal["readable", "write-only", "path", "none"] = "readable"
    """What finit_module is given: opened for reading or not, with O_PATH, or nothing that is open."""

    is_written: bool = False
    """Whether anybody has the file open for writing, this call's own descriptor included."""

    length_bytes: int | None = None
    """The length that init_module is told, where it is not the image's."""

    is_image_unmapped: bool = False
    """Whether init_module's image, or a part of it, is at no valid address."""

    are_parameters_unmapped: bool = False
    """Whether the parameters are at no valid address."""


@dataclass(frozen=True, slots=True)
class CallSpec:
    """What is asked of the simulated kernel: one finit_module or init_module."""

    module: str
    """Name of the module, as far as known before its image is read."""

    inode: str
    """The file on the simulated machine: identity of its tree, path, copy."""

    policy: Policy
    syscall: Syscall
    flags: int = 0
    parameters: str = ""
    caller: Caller = Caller()

    def __hash__(self) -> int:
        """Return a hash of what mostly tells specifications apart: it is asked for with every call."""
        return hash((self.module, self.inode, self.flags, self.parameters))

    @property
    def gated(self) -> bool:
        """Whether the call goes through the gate: only finit_module does, and only under a policy that shares."""
        return self.policy.share_in_flight and self.syscall is Syscall.FINIT_MODULE


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a step failed, as the kernel would say it."""

    errno: str
    check: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Inspected:
    """What the checks between the read and the layout found out."""

    name: str
    """The module's name, as struct module has it."""


# --- steps of the list and the gate, answered with kernel.modules_list.Answer ---


@dataclass(frozen=True, slots=True)
class EnterGate:
    """Enter the gate of the file; wait for the call that holds it."""

    inode: str


@dataclass(frozen=True, slots=True)
class CheckName:
    """Look for the name before the layout; wait while it is being loaded."""

    module: str


@dataclass(frozen=True, slots=True)
class ReserveName:
    """Insert the name as unformed; wait while it is being loaded."""

    module: str


# --- steps with memory and files, answered with None or a Failure where nothing else is said ---


@dataclass(frozen=True, slots=True)
class Admit:
    """Take the memory that the call will need at its peak from the machine that runs the simulation.

    A ``Failure`` if a signal ended the wait for it.
    """


@dataclass(frozen=True, slots=True)
class Unpack:
    """Before init_module: read the file into the caller's own memory, and decompress it there."""


@dataclass(frozen=True, slots=True)
class Read:
    """Allocate a buffer and read the file into it; for init_module, copy the caller's image."""


@dataclass(frozen=True, slots=True)
class Decompress:
    """Allocate a second buffer, decompress into it, free the first."""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Make the checks between the read and the layout. Answered with Inspected or a Failure."""


@dataclass(frozen=True, slots=True)
class Allocate:
    """Allocate the layout, type by type, and copy the sections into it."""


@dataclass(frozen=True, slots=True)
class Link:
    """Link the module to the kernel and to the modules that are live, and look at its parameters."""

    module: str


@dataclass(frozen=True, slots=True)
class Free:
    """Free: the ``image``, the ``init`` part of the layout, or ``all`` that the call still holds."""

    what: Literal["image", "init", "all"]


@dataclass(frozen=True, slots=True)
class Init:
    """Run the module's init function."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Count the call and tell who waits for it: the ending is final with this."""

    ending: Ending


ADMIT: Final = Admit()
UNPACK: Final = Unpack()
READ: Final = Read()
DECOMPRESS: Final = Decompress()
INSPECT: Final = Inspect()
ALLOCATE: Final = Allocate()
FREE_IMAGE: Final = Free("image")
FREE_INIT: Final = Free("init")
FREE_ALL: Final = Free("all")
INIT: Final = Init()
"""Steps that are the same in every call are made once: making one takes as long as carrying it out in virtual time."""

FileStep = Admit | Unpack | Read | Decompress | Inspect | Allocate
"""Steps that touch files or much memory; a live driver keeps them off its event loop."""

Step = EnterGate | CheckName | ReserveName | FileStep | Link | Free | Init | Finish


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of a call."""

    outcome: Outcome
    errno: str = ""
    check: str = ""
    value: str = ""
    duplicate: bool = False
    reserved: bool = False
    """True if the call had inserted its name into the list."""

    module: str = ""
    """The module's name, as far as known at the end."""
