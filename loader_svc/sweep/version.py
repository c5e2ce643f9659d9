"""What simulates, as one word: results of another one are not taken for this one's."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from importlib.abc import Traversable
from typing import Final

from modpressure import __version__

_PACKAGES: Final = ("loader_svc", "modpressure.kernel")
_KINDS: Final = (".py", ".toml", ".xz")


@cache
def simulation_version() -> str:
    """Return the version with a digest of the code and data that a simulation runs on, such as ``0.1.0+5f0c9d21e07a``.

    Equal on two machines if the same point comes to the same end on both.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        _add(digest, resources.files(package))
    return f"{__version__}+{digest.hexdigest()[:12]}"


def _add(digest: hashlib._Hash, place: Traversable) -> None:
    for entry in sorted(place.iterdir(), key=lambda each: each.name):
        if entry.is_dir():
            _add(digest, entry)
        elif entry.name.endswith(_KINDS):
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes())
