"""Pages of a list: sizes and tokens, by AIP-158."""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Final

from modpressure.errors import BadRequest, shown

DEFAULT_PAGE_SIZE: Final = 1000
MAX_PAGE_SIZE: Final = 10_000


def page_size(asked: int) -> int:
    """Return how many entries a page has. BadRequest if less than 0 are asked for."""
    if asked < 0:
        raise BadRequest(f"page_size {asked} is negative", field="page_size")
    return min(asked or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def page_token(position: str | int, *request: object) -> str:
    """Return a token that goes on after ``position``; it is good for a list with the same ``request`` alone."""
    return base64.urlsafe_b64encode(f"{_mark(request)}:{position}".encode()).decode().rstrip("=")


def token_position(token: str, *request: object) -> str:
    """Return the position that a token goes on after, "" for no token. BadRequest if it isn't one of this list."""
    if not token:
        return ""
    try:
        text = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        text = ""
    mark, _, position = text.partition(":")
    if mark != _mark(request) or not position:
        raise BadRequest(f"page_token {shown(token)} is none of this list's", field="page_token")
    return position


def number_position(token: str, *request: object) -> int:
    """Return the position of a token as a number, 0 for no token. BadRequest if it isn't one of this list."""
    position = token_position(token, *request) or "0"
    if not (position.isascii() and position.isdecimal() and len(position) < 19):
        raise BadRequest(f"page_token {shown(token)} is none of this list's", field="page_token")
    return int(position)


def _mark(request: tuple[object, ...]) -> str:
    """Return a few characters that tell this request's tokens from another's. No secret: a token gives no access."""
    return f"{zlib.crc32(repr(request).encode()):08x}"
