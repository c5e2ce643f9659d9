"""Addresses that no other machine reaches."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Return whether a host is this one: 127.0.0.0/8, ::1 or ``localhost``; no name is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_socket(address: str) -> bool:
    """Return whether gRPC takes an address for a socket of this machine; a host may have a name that begins so."""
    return address.startswith(("unix:", "unix-abstract:"))


def from_here(listen: str) -> str:
    """Return where this machine reaches a server on ``listen``: on the loopback, if it listens on all addresses.

    These are no address to call, and no certificate is for them.
    """
    host, _, port = listen.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return listen
    if not address.is_unspecified:
        return listen
    return f"127.0.0.1:{port}" if address.version == 4 else f"[::1]:{port}"


def is_local(listen: str) -> bool:
    """Return whether only this machine reaches a server on ``listen``, HOST:PORT or unix:PATH.

    A name is looked up: it is local if all that it stands for is; one that stands for nothing can't be listened on.
    """
    if is_socket(listen):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if is_loopback(host):
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(is_loopback(str(place[0])) for *_, place in found)
