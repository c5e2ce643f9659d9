"""Bytes as people write them: ``2G``, ``512MiB``, ``50%``; and as they like to read them."""

from __future__ import annotations

import re

_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_AMOUNT = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<prefix>[kmgtp]?)(?P<suffix>i?b?)", re.ASCII | re.IGNORECASE
)
_SHARE = re.compile(r"(?P<percent>[0-9]+(?:\.[0-9]+)?)\s*%", re.ASCII)
MAX_BYTES = (1 << 63) - 1
"""The most that a protobuf int64 or an SQL BIGINT holds; bytes."""


def parse_bytes(text: str, *, whole_bytes: int | None = None) -> int:
    """Return the bytes that ``text`` says.

    ``4096``, ``2G`` and ``2GiB`` (1024 each step, as Docker and the kernel's command line have it), ``2GB`` (1000 each
    step), and, where ``whole_bytes`` says of what, ``50%``. ValueError with a sentence that names the text.
    """
    stripped = text.strip()
    if match := _SHARE.fullmatch(stripped):
        if whole_bytes is None:
            raise ValueError(f"{text!r} is a share, but of what? Give bytes, such as 512MiB")
        percent = float(match["percent"])
        if percent > 100:
            raise ValueError(f"{text!r} is more than there is")
        return int(whole_bytes * percent / 100)
    match = _AMOUNT.fullmatch(stripped)
    suffix = match["suffix"].lower() if match else ""
    if match is None or (suffix.startswith("i") and (not match["prefix"] or suffix == "i")):
        also = " or 50%" if whole_bytes is not None else ""
        raise ValueError(f"{text!r} is not a number of bytes, such as 268435456, 256MiB, 2G{also}")
    scale = (_DECIMAL if suffix == "b" and match["prefix"] else _BINARY)[match["prefix"].lower()]
    number = match["number"]
    value = int(float(number) * scale) if "." in number else int(number) * scale
    if value > MAX_BYTES:
        raise ValueError(f"{text!r} is more than {MAX_BYTES} bytes")
    return value


def format_bytes(value_bytes: int) -> str:
    """Return a length for people: ``0 B``, ``812 B``, ``1.5 KiB``, ``20.0 MiB``."""
    amount = float(abs(value_bytes))
    sign = "-" if value_bytes < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1023.95:
            return f"{sign}{int(amount)} B" if unit == "B" else f"{sign}{amount:.1f} {unit}"
        amount /= 1024
    return f"{sign}{amount:,.1f} PiB"
