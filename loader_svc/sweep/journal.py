"""The file that a sweep appends its finished points to, so that nothing is simulated twice."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from loader_svc.sweep.finished import Finished
from modpressure.errors import BadRequest, ModpressureError, NotNow


class Journal:
    """Finished points by their keys, a line each. To be used as a context manager; one process at a time has it.

    A line is either there whole or not at all: what a killed process left of its last one is cut off, and what a full
    disk left of one, too. It survives the death of any process; a machine that loses its power may lose the last ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: dict[str, Finished] = {}
        """What has been finished, by this run and the ones before."""
        self._file = -1
        self._length_bytes = 0

    def __enter__(self) -> Self:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ModpressureError(f"cannot keep finished points in {str(self.path)!r}: {error.strerror}") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            if not os.fstat(self._file).st_size:  # nothing was finished; it is locked, so nobody else's
                os.unlink(self.path)
        os.close(self._file)

    @property
    def kept(self) -> int:
        """How many points are in the file, the one included in whose writing Ctrl-C came."""
        return self.path.read_bytes().count(b"\n")

    def add(self, key: str, finished: Finished) -> None:
        """Append one finished point. ModpressureError if there is no room for it; the file is then as before."""
        document = {"key": key, "point": finished.document()}
        line = (json.dumps(document, separators=(",", ":")) + "\n").encode()
        try:
            written = os.write(self._file, line)
            if written != len(line):  # what is left says why
                os.write(self._file, line[written:])
                raise OSError(0, "only a part of a line was written")
        except OSError as error:
            os.ftruncate(self._file, self._length_bytes)
            count = len(self.finished)
            raise ModpressureError(
                f"cannot append to {str(self.path)!r}: {error.strerror}; {count} finished points are kept in it"
            ) from None
        self._length_bytes += len(line)
        self.finished[key] = finished

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotNow(f"another sweep is writing to {str(self.path)!r}") from None
        except OSError:
            pass  # a file system without locks

    def _read(self) -> None:
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, self._length_bytes)
                    return
                try:
                    document = json.loads(line)
                    self.finished[str(document["key"])] = Finished.of(document["point"])
                except (ValueError, TypeError, KeyError):
                    raise BadRequest(
                        f"line {number} of {str(self.path)!r} is no finished point: remove it, or the file"
                    ) from None
                self._length_bytes += len(line)
