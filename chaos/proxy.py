"""A TCP proxy that breaks connections in the ways in which networks do, after the kind of toxiproxy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Final

_CHUNK_BYTES: Final = 64 * 1024
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: close(2) then sends a reset (socket(7))."""


@dataclass(eq=False)
class _Pair:
    """One connection through the proxy: of whoever connected, and to whom that wanted."""

    ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    is_half_open: bool = False
    """Both ends think that it stands, and what they send goes nowhere."""

    def reset(self) -> None:
        """Break it, as a firewall that has forgotten it does."""
        for end in self.ends:
            connection = end.get_extra_info("socket")
            if connection is not None and connection.fileno() >= 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.transport.abort()


class Link:
    """A way from some process to another one's address, which may change; in between anything may happen."""

    def __init__(self, name: str) -> None:
        """``name`` is what reports call it."""
        self.name = name
        self.target: tuple[str, int] | None = None
        """Where connections lead; None refuses them."""

        self.port = 0
        self.is_refusing = False
        self.delay_seconds = 0.0
        """How long each piece is held back, in both directions."""

        self._answer_bytes_left: int | None = None
        self._pairs: set[_Pair] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """Where to connect."""
        return f"127.0.0.1:{self.port}"

    async def open(self) -> None:
        """Listen on a free port, the same to the end."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def lead_to(self, address: str) -> None:
        """Have new connections lead to HOST:PORT."""
        host, _, port = address.rpartition(":")
        self.target = (host, int(port))

    def cut(self) -> None:
        """Reset all connections."""
        for pair in self._pairs:
            pair.reset()

    def cut_in_answer(self, after_bytes: int) -> None:
        """Reset the connection on which the answers from now on exceed so many bytes, having passed on only those."""
        self._answer_bytes_left = after_bytes

    def half_open(self) -> None:
        """Have all connections look alive and carry nothing, until ``heal``; new ones are carried."""
        for pair in self._pairs:
            pair.is_half_open = True

    def heal(self) -> None:
        """Let all pass again. Connections that lost something are reset."""
        self.is_refusing = False
        self.delay_seconds = 0.0
        self._answer_bytes_left = None
        for pair in self._pairs:
            if pair.is_half_open:
                pair.reset()

    async def close(self) -> None:
        """Listen no more, and break what there is."""
        if self._server is not None:
            self._server.close()
        self.cut()
        # Connections end in tasks of the server's own.
        while self._pairs:
            await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        pair = None
        try:
            if self.target is None or self.is_refusing:
                return
            far_reader, far_writer = await asyncio.open_connection(*self.target)
            ends.append(far_writer)
            pair = _Pair((writer, far_writer))
            self._pairs.add(pair)
            pumps = [
                asyncio.ensure_future(self._pump(pair, reader, far_writer, is_answer=False)),
                asyncio.ensure_future(self._pump(pair, far_reader, writer, is_answer=True)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass
        finally:
            if pair is None:
                pair = _Pair((ends[0], ends[-1]))
            self._pairs.discard(pair)
            # Not a close, which would wait for a reader that has been stopped.
            pair.reset()

    async def _pump(
        self, pair: _Pair, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                if pair.is_half_open:
                    continue
                left_bytes = self._answer_bytes_left
                if is_answer and left_bytes is not None:
                    if len(data) > left_bytes:
                        self._answer_bytes_left = None
                        sink.write(data[:left_bytes])
                        # Part of the answer must arrive: a reset would overtake it.
                        await sink.drain()
                        return
                    self._answer_bytes_left = left_bytes - len(data)
                sink.write(data)
                await sink.drain()
