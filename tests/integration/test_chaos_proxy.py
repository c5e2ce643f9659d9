"""The proxy of ``chaos``, between real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from chaos.proxy import Link


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    """A way to a server that says everything back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = Link("echo")
    await link.open()
    link.lead_to(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    yield link
    await link.close()
    server.close()
    await server.wait_closed()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(link: Link) -> Connection:
    return await asyncio.open_connection("127.0.0.1", link.port)


async def echoed(connection: Connection, text: bytes) -> bytes:
    reader, writer = connection
    writer.write(text)
    return await reader.readexactly(len(text))


async def test_what_is_said_arrives_and_comes_back(link: Link) -> None:
    connection = await connect(link)
    assert await echoed(connection, b"hello") == b"hello"
    link.delay_seconds = 0.001
    assert await echoed(connection, b"again") == b"again"
    connection[1].close()


async def test_a_cut_resets_connections_and_new_ones_work(link: Link) -> None:
    connection = await connect(link)
    assert await echoed(connection, b"hello") == b"hello"
    link.cut()
    with pytest.raises(ConnectionResetError):
        await connection[0].read(1)
    again = await connect(link)
    assert await echoed(again, b"hello") == b"hello"
    again[1].close()


async def test_a_cut_in_an_answer_lets_its_beginning_through(link: Link) -> None:
    reader, writer = await connect(link)
    link.cut_in_answer(3)
    writer.write(b"hello")
    assert await reader.readexactly(3) == b"hel"
    with pytest.raises(ConnectionResetError):
        await reader.read(1)


async def test_a_half_open_connection_stands_and_carries_nothing(link: Link) -> None:
    connection = await connect(link)
    assert await echoed(connection, b"hello") == b"hello"
    link.half_open()
    connection[1].write(b"nobody hears this")
    # A new one is a new one; what it says arrives after what the first one said.
    again = await connect(link)
    assert await echoed(again, b"hello") == b"hello"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(connection[0].read(1), 0.1)
    link.heal()
    with pytest.raises(ConnectionResetError):
        await connection[0].read(1)
    again[1].close()


async def test_a_link_that_leads_nowhere_refuses(link: Link) -> None:
    link.is_refusing = True
    reader, _ = await connect(link)
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
