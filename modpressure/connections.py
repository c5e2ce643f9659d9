"""How many connections one host may have.

gRPC holds all connections against one limit, and asks nobody before it takes one: who opens as many as there may be
shuts out everybody else. So a server looks, each second, whose they are, and hangs up on the newest of a host that has
too many.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import structlog

LOOK_SECONDS: Final = 1.0
"""How often a server looks."""

_FILES: Final = "/proc/self/fd"
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)

_Peer: TypeAlias = tuple[Any, ...]

_log = structlog.get_logger(__name__)


class Connections:
    """Those of this process to one port of its own."""

    def __init__(self, port: int, most_of_a_host: int) -> None:
        self._port = port
        self._most = most_of_a_host
        self._numbers: dict[_Peer, int] = {}
        """Of each connection that was there at the last look: a number, lower the longer it has been there."""

        self._next = 0

    def hang_up_on_crowds(self) -> int:
        """Shut down what a host has beyond its limit, the newest first; return how many these are.

        To its owner, gRPC, that looks as if the other side had hung up.
        """
        if len(os.listdir(_FILES)) <= self._most:
            # Whoever these are, nobody can have too many.
            return 0
        with contextlib.ExitStack() as opened:
            found: dict[_Peer, socket.socket] = {}
            hosts: defaultdict[str, list[_Peer]] = defaultdict(list)
            for connection, peer in self._connections():
                found[peer] = opened.enter_context(connection)
                hosts[peer[0]].append(peer)
                if peer not in self._numbers:
                    self._numbers[peer] = self._next
                    self._next += 1
            self._numbers = {peer: number for peer, number in self._numbers.items() if peer in found}
            closed = 0
            for host, peers in hosts.items():
                peers.sort(key=self._numbers.__getitem__)
                for peer in peers[self._most :]:
                    with contextlib.suppress(OSError):
                        found[peer].shutdown(socket.SHUT_RDWR)
                if too_many := len(peers[self._most :]):
                    _log.warning("hung up on a host with too many connections", host=host, connections=too_many)
                    closed += too_many
            return closed

    def _connections(self) -> Iterator[tuple[socket.socket, _Peer]]:
        """Yield each connection, as a file of its own that is to be closed, and who is at its other end."""
        for name in os.listdir(_FILES):
            try:
                # The same file, whatever becomes of the number meanwhile.
                duplicate = os.dup(int(name))
            except OSError:
                continue
            try:
                connection = socket.socket(fileno=duplicate)
            except OSError:
                os.close(duplicate)
                continue
            try:
                if connection.family in _FAMILIES and connection.getsockname()[1] == self._port:
                    yield connection, connection.getpeername()
                    continue
            except OSError:
                # It listens, or its other side has gone.
                pass
            connection.close()
