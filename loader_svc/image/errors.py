"""What can be wrong with a module image.

ImageProblem
├── ImageError      the kernel's verdict: an errno, and which check said so
└── ImageTooLarge   our own limit: the kernel might have gone on
"""

from typing import Final

VALUE_CHARS: Final = 120
"""Longest offending value that a message or an event quotes; what is longer is cut."""


def quoted(raw: bytes | bytearray | memoryview) -> str:
    """Return any bytes as text that is safe to print and to send, at most `VALUE_CHARS` long.

    Bytes that are not UTF-8, and control characters, appear as backslash escapes.
    """
    text = bytes(raw[: VALUE_CHARS + 1]).decode("utf-8", "backslashreplace")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= VALUE_CHARS else text[: VALUE_CHARS - 1] + "…"


class ImageProblem(Exception):
    """An image that cannot be used; `str()` is one sentence that names the value."""


class ImageError(ImageProblem):
    """An image that the kernel refuses.

    `errno` is the kernel's errno name (`ENOEXEC`), `check` the short stable name of the check that failed
    (`elf: e_machine`), `value` the offending value as text (may be empty where nothing is there to name) and `reason`
    what would have been right, as half a sentence.
    """

    def __init__(self, errno: str, check: str, value: object = "", reason: str = "") -> None:
        self.errno = errno
        self.check = check
        self.value = str(value)
        self.reason = reason
        said = f"{check} = {self.value}" if self.value else check
        super().__init__(f"{errno} ({said}): {reason}" if reason else f"{errno} ({said})")

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str, str, str]]:
        """Keep all fields when an error crosses a process border (indexing runs in worker processes)."""
        return ImageError, (self.errno, self.check, self.value, self.reason)


class ImageTooLarge(ImageProblem):
    """Something that would not fit under a limit of ours; `what` names it and `limit_bytes` is the limit."""

    def __init__(self, what: str, limit_bytes: int) -> None:
        self.what = what
        self.limit_bytes = limit_bytes
        super().__init__(f"{what} exceeds the limit of {limit_bytes} bytes")

    def __reduce__(self) -> tuple[type["ImageTooLarge"], tuple[str, int]]:
        """Keep both fields when an error crosses a process border."""
        return ImageTooLarge, (self.what, self.limit_bytes)
