"""Makes the calls of a script on the running kernel and writes what each came to: the table of ``verify failures``.

::

    sudo python3 capture.py calls.script --kernel v6.5 --files DIR... > calls.csv

Copy this one file to the machine that is to be measured: it needs Python 3.9 and nothing else. It loads and unloads
modules for real, so take a machine that may crash, from a fresh boot. The kernel needs CONFIG_MODULE_STATS, debugfs has
to be mounted, x86-64 it has to be. docs/verify.md has the operations.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

INIT_MODULE, DELETE_MODULE, FINIT_MODULE = 175, 176, 313
"""Numbers of arch/x86/entry/syscalls/syscall_64.tbl, Linux 6.12."""

COUNTERS = (
    *("total_mod_size", "total_text_size", "invalid_kread_bytes", "invalid_decompress_bytes"),
    *("invalid_becoming_bytes", "invalid_mod_bytes", "modcount", "failed_kreads", "failed_decompress"),
    *("failed_becoming", "failed_load_modules"),
)
COLUMNS = ("kernel", "case", "op", "path", "flags", "file_bytes", "ret", "errno", "errno_name")

DEFAULT_COUNTERS = Path("/sys/kernel/debug/modules")
MODULES_DISABLED = Path("/proc/sys/kernel/modules_disabled")

UNMAPPED = 8
"""An address at which nothing ever is (mmap_min_addr)."""
NOT_OPEN = 999
HUGE_BYTES = 1 << 40
NOBODY = 65534
BROKEN = 255
"""What a process exits with that did not come to its call; no errno is as high."""

OPENING = {"wronly": os.O_WRONLY, "rdwr": os.O_RDWR, "opath": getattr(os, "O_PATH", 0o10000000)}
LENGTHS = {"len0": 0, "len63": 63, "huge": HUGE_BYTES}
FINIT = ("", "badargs", "dir", "pipe", "wronly", "rdwr", "opath", "badfd", "closedfd", "nocap")
INIT = ("", "badptr", "partial", "len0", "len63", "huge", "nocap")

_LIBC = ctypes.CDLL(None, use_errno=True)


class Problem(Exception):
    """What keeps this from being done; one sentence."""


class Result(NamedTuple):
    """What a system call returned."""

    value: int
    errno: int


class Line(NamedTuple):
    """One line of a script."""

    case: str
    operation: str
    file: str
    flags: int
    parameters: bytes

    @property
    def variant(self) -> str:
        """What is wrong with the call."""
        return self.operation.partition("_")[2]


def read_script(path: Path) -> Iterator[Line]:
    """Yield the lines of a script. Problem names the line that is none."""
    for number, text in enumerate(path.read_text().splitlines(), 1):
        words = text.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            flags = int(words[3], 0) if len(words) > 3 else 0
            line = Line(words[0], words[1], words[2] if len(words) > 2 else "", flags, " ".join(words[4:]).encode())
        except (IndexError, ValueError):
            raise Problem(
                f"{path}, line {number}: {text.strip()[:80]!r} is not 'case operation file [flags] ...'"
            ) from None
        operation = line.operation.partition("_")[0]
        known = {"finit": FINIT, "init": INIT}.get(operation)
        others = ("del", "stats", "procmod", "disable", "modules_disabled")
        if line.operation not in others and (known is None or line.variant not in known):
            raise Problem(f"{path}, line {number}: there is no operation {line.operation!r}")
        yield line


def system_call(number: int, *arguments: object) -> Result:
    """Make a system call."""
    ctypes.set_errno(0)
    value = int(_LIBC.syscall(ctypes.c_long(number), *arguments))
    return Result(value, ctypes.get_errno() if value < 0 else 0)


def finit_module(line: Line, path: Path) -> Result:
    """Make the finit_module call of a line."""
    parameters: object = ctypes.c_char_p(line.parameters)
    opened = []
    if line.variant == "badargs":
        parameters = ctypes.c_void_p(UNMAPPED)
    if line.variant in ("badfd", "closedfd"):
        descriptor = -1 if line.variant == "badfd" else NOT_OPEN
    elif line.variant == "pipe":
        opened = list(os.pipe())
        descriptor = opened[0]
    else:
        place = path if path.is_dir() or line.variant != "dir" else path.parent
        descriptor = os.open(place, OPENING.get(line.variant, os.O_RDONLY) | os.O_CLOEXEC)
        opened = [descriptor]
    try:
        if line.variant == "nocap":
            give_up_rights()
        return system_call(FINIT_MODULE, ctypes.c_int(descriptor), parameters, ctypes.c_int(line.flags))
    finally:
        for each in opened:
            os.close(each)


def init_module(line: Line, path: Path) -> Result:
    """Make the init_module call of a line."""
    image = path.read_bytes()
    length = LENGTHS.get(line.variant, len(image))
    parameters = ctypes.c_char_p(line.parameters)
    if line.variant == "partial":
        return _init_module_half_mapped(image, parameters)
    if line.variant == "nocap":
        give_up_rights()
    buffer: object = ctypes.c_void_p(UNMAPPED) if line.variant == "badptr" else ctypes.c_char_p(image)
    return system_call(INIT_MODULE, buffer, ctypes.c_ulong(length), parameters)


def _init_module_half_mapped(image: bytes, parameters: object) -> Result:
    """Have the second half of an image lie where nothing is mapped."""
    page_bytes = os.sysconf("SC_PAGESIZE")
    whole = (len(image) // page_bytes + 2) * page_bytes
    half = whole // 2 // page_bytes * page_bytes
    _LIBC.mmap.restype = ctypes.c_void_p
    start = _LIBC.mmap(None, ctypes.c_size_t(whole), 3, 0x22, -1, ctypes.c_long(0))
    if start in (None, ctypes.c_void_p(-1).value):
        raise Problem(f"there is no memory for {whole} bytes")
    ctypes.memmove(start, image, min(len(image), half))
    _LIBC.munmap(ctypes.c_void_p(start + half), ctypes.c_size_t(whole - half))
    try:
        return system_call(INIT_MODULE, ctypes.c_void_p(start), ctypes.c_ulong(len(image)), parameters)
    finally:
        _LIBC.munmap(ctypes.c_void_p(start), ctypes.c_size_t(half))


def give_up_rights() -> None:
    """Become nobody, who has no capabilities; whoever is not root has none already."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setuid(NOBODY)


def make_call(line: Line, path: Path) -> Result:
    """Make the call of a line, in a process of its own where that has to give its rights away."""
    call = finit_module if line.operation.startswith("finit") else init_module
    if line.variant != "nocap":
        return call(line, path)
    child = os.fork()
    if not child:
        status = BROKEN
        try:
            status = call(line, path).errno
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == BROKEN:
        raise Problem(f"{line.case}: the process without rights ended before its call")
    return Result(-1 if status else 0, status)


def read_counters(directory: Path) -> dict[str, int]:
    """Return the kernel's counters. Problem if they can't be read."""
    try:
        return {name: int((directory / name).read_text()) for name in COUNTERS}
    except OSError as error:
        raise Problem(
            f"{error.filename} can't be read ({error.strerror}): the kernel needs CONFIG_MODULE_STATS, this needs "
            "root and debugfs (mount -t debugfs none /sys/kernel/debug)"
        ) from None


def find(name: str, directories: Sequence[Path]) -> Path | None:
    """Return the file that a script calls ``name``."""
    last = PurePosixPath(name).name
    for directory in directories:
        if (directory / last).is_file():
            return directory / last
    return next((path for directory in directories for path in sorted(directory.rglob(last)) if path.is_file()), None)


def capture(script: Path, directories: Sequence[Path], kernel: str, counters: Path) -> Iterator[dict[str, object]]:
    """Carry a script out; yield a row for each call."""
    for line in list(read_script(script)):
        if line.operation in ("stats", "procmod"):
            continue
        if line.operation in ("disable", "modules_disabled"):
            MODULES_DISABLED.write_text("1")
            continue
        if line.operation == "del":
            system_call(DELETE_MODULE, ctypes.c_char_p(line.file.encode()), ctypes.c_uint(os.O_NONBLOCK))
            continue
        path = directories[0] if line.variant in ("dir", "pipe") else find(line.file, directories)
        if path is None:
            sys.stderr.write(f"{line.case}: not run, there is no file {line.file}\n")
            continue
        before = read_counters(counters)
        result = make_call(line, path)
        after = read_counters(counters)
        names = (line.case, line.operation, line.file, line.flags, path.stat().st_size)
        came_to = (result.value, result.errno, errno.errorcode.get(result.errno, "OK"))
        row: dict[str, object] = dict(zip(COLUMNS, (kernel, *names, *came_to)))  # noqa: B905 (Python 3.10)
        yield {**row, **{f"d_{name}": after[name] - before[name] for name in COUNTERS}}


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("script", type=Path, help="the calls to make, in this order")
    parser.add_argument("--files", type=Path, nargs="+", required=True, metavar="DIR", help="where the files are")
    parser.add_argument(
        "--kernel", default="v6.5", help="what to call the kernel in the table: v6.4, v6.5, v6.5-xz ..."
    )
    parser.add_argument("--counters", type=Path, default=DEFAULT_COUNTERS, help="the kernel's counters")
    options = parser.parse_args()
    try:
        if platform.machine() != "x86_64":
            raise Problem(f"this is {platform.machine()}, and the numbers of the system calls are x86-64's")
        rows = capture(options.script, options.files, options.kernel, options.counters)
        writer = csv.DictWriter(sys.stdout, [*COLUMNS, *(f"d_{name}" for name in COUNTERS)])
        writer.writeheader()
        for row in rows:
            writer.writerow(row)
            # The next call may be the machine's last.
            sys.stdout.flush()
    except (Problem, OSError) as problem:
        sys.stderr.write(f"capture: {problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
