"""HTTP/2 by hand (RFC 9113), for what no well-behaved client does."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
MAX_CONCURRENT_STREAMS, ENHANCE_YOUR_CALM = 3, 11
SECONDS = 30


def connect(address: str, seconds: float = SECONDS) -> socket.socket:
    """Open a TCP connection to HOST:PORT."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), seconds)


def is_closed(connection: socket.socket) -> bool:
    """Return whether the other side closes a connection, reading what it says before that. TimeoutError if not."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """Return a frame (section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


@dataclass
class Connection:
    """A connection that has said hello."""

    address: str
    _socket: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self._socket = connect(self.address)
        self._socket.sendall(PREFACE + frame(SETTINGS))

    def send(self, content: bytes) -> None:
        """Send frames."""
        self._socket.sendall(content)

    def _take(self, length: int) -> bytes:
        content = b""
        while len(content) < length:
            part = self._socket.recv(length - len(content))
            if not part:
                raise EOFError
            content += part
        return content

    def frame(self) -> tuple[int, bytes]:
        """Return kind and payload of the next frame. EOFError if the other side has hung up."""
        head = self._take(9)
        return head[3], self._take(int.from_bytes(head[:3], "big"))

    def payload(self, kind: int) -> bytes:
        """Return the payload of the next frame of a kind."""
        while True:
            found, payload = self.frame()
            if found == kind:
                return payload

    def settings(self) -> dict[int, int]:
        """Return what the server's first settings say."""
        return dict(struct.iter_unpack(">HI", self.payload(SETTINGS)))

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
