"""Scripts of calls: ``case operation file [flags] [parameters]``, one a line, and how a line becomes a call.

``finit`` opens the file read-only and calls finit_module with flags and parameters; ``init`` reads it into memory and
calls init_module; ``del`` unloads by name; ``stats`` and ``procmod`` keep a copy of a text and change nothing;
``modules_disabled`` (or ``disable``) switches loading and unloading off. What follows an underscore says what is wrong
with the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from loader_svc.steps import Caller, CallSpec
from loader_svc.verify.agreement import read_text
from loader_svc.verify.files import Files, open_directory, open_pipe
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.errors import BadRequest
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import Policy

HUGE_BYTES: Final = 1 << 40

_DISABLING: Final = frozenset({"disable", "modules_disabled"})

WITHOUT_CALL: Final = frozenset({"stats", "procmod"}) | _DISABLING

_FINIT: Final[dict[str, Caller]] = {
    "": Caller(),
    "badargs": Caller(are_parameters_unmapped=True),
    "dir": Caller(),
    "pipe": Caller(),
    "wronly": Caller(descriptor="write-only"),
    "rdwr": Caller(is_written=True),
    "opath": Caller(descriptor="path"),
    "badfd": Caller(descriptor="none"),
    "closedfd": Caller(descriptor="none"),
    "nocap": Caller(is_permitted=False),
}

_INIT: Final[dict[str, Caller]] = {
    "": Caller(),
    "badptr": Caller(is_image_unmapped=True),
    "partial": Caller(is_image_unmapped=True),
    "len0": Caller(length_bytes=0),
    "len63": Caller(length_bytes=63),
    "huge": Caller(length_bytes=HUGE_BYTES),
    "nocap": Caller(is_permitted=False),
}

_CALLERS: Final = {"finit": _FINIT, "init": _INIT}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a script."""

    number: int
    case: str
    operation: str
    file: str
    rest: tuple[str, ...]

    @property
    def flags(self) -> int:
        """The flags of a call, 0 where the line says none. BadRequest if they are no number."""
        try:
            return int(self.rest[0], 0) if self.rest else 0
        except ValueError:
            raise BadRequest(f"line {self.number}: flags {self.rest[0]!r} are no number") from None

    @property
    def parameters(self) -> str:
        """The parameters of a call."""
        return " ".join(self.rest[1:])


def read_script(path: Path) -> list[Line]:
    """Return the lines of a script. NotFound, or BadRequest that names the line."""
    return list(_lines(path, read_text(path)))


def _lines(path: Path, text: str) -> Iterator[Line]:
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2:
            raise BadRequest(f"{path}, line {number}: {line.strip()[:80]!r} has no operation")
        yield Line(number, words[0], words[1], words[2] if len(words) > 2 else "", tuple(words[3:]))


class ScriptRunner:
    """Makes the calls of a script on one machine, one after the other."""

    def __init__(self, machine: VirtualMachine, policy: Policy, files: Files) -> None:
        self.machine = machine
        self._policy = policy
        self._files = files
        self._is_disabled = False

    def run(self, line: Line) -> str | None:
        """Carry out a line; return the errno, empty for success, or None if its file is not at hand.

        BadRequest for an operation that there is not.
        """
        if line.operation in WITHOUT_CALL:
            self._is_disabled = self._is_disabled or line.operation in _DISABLING
            return ""
        if line.operation == "del":
            return "EPERM" if self._is_disabled else self.machine.remove(line.file)
        call = self.call(line)
        return None if call is None else self.machine.call(call).errno

    def call(self, line: Line, *, parameters: str | None = None) -> VirtualCall | None:
        """Return the call that a line means, None if its file is not at hand."""
        operation, _, variant = line.operation.partition("_")
        caller = _CALLERS.get(operation, {}).get(variant)
        if caller is None:
            raise BadRequest(f"line {line.number}: there is no operation {line.operation!r}")
        if self._is_disabled:
            caller = Caller(is_permitted=False)
        opener: Callable[[], int]
        if variant in ("dir", "pipe"):
            opener = open_pipe if variant == "pipe" else partial(open_directory, self._files.directory)
            inode, path = line.operation, line.file
        else:
            file = self._files.find(line.file)
            if file is None:
                return None
            opener, inode, path = file.open, file.inode, str(file.path)
        spec = CallSpec(
            PurePosixPath(line.file).name.partition(".")[0],
            inode,
            self._policy,
            Syscall.FINIT_MODULE if operation == "finit" else Syscall.INIT_MODULE,
            line.flags if operation == "finit" else 0,
            line.parameters if parameters is None else parameters,
            caller,
        )
        return VirtualCall(spec, VirtualFile(path, opener))
