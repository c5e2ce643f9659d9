"""Addresses that stand for several servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable

from modpressure.client_errors import NoAnswer


async def expand_addresses(addresses: Iterable[str]) -> list[str]:
    """Return each server once: ``dns:///NAME:PORT`` is replaced by all addresses of the name, others stay.

    The IPv4 addresses of a name, or its IPv6 ones if it has no other: a replica that has both is one replica. NoAnswer
    names a name that stands for nothing.
    """
    expanded: list[str] = []
    for address in addresses:
        expanded += await _resolve(address) if address.startswith("dns:") else [address]
    return list(dict.fromkeys(expanded))


async def _resolve(address: str) -> list[str]:
    host, _, port = address.removeprefix("dns:").rpartition("/")[2].rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise NoAnswer(
            f"the name {host!r} in {address!r} stands for no address: {(error.strerror or str(error)).lower()}"
        ) from None
    v4 = sorted({str(place[0]) for family, _, _, _, place in found if family == socket.AF_INET})
    v6 = sorted({str(place[0]) for family, _, _, _, place in found if family == socket.AF_INET6})
    return [f"{ip}:{port}" for ip in v4] or [f"[{ip}]:{port}" for ip in v6]
