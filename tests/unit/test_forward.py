"""Handing on to the stats_svc that leads."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from modpressure.errors import Unavailable
from stats_svc.forward import Forwarder, Vouching


class FailsWhenLeft:
    """A call at the leader whose connection breaks just when nobody waits for its next message any more."""

    def __init__(self) -> None:
        self.is_read = asyncio.Event()

    async def read(self) -> Any:
        self.is_read.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionResetError("the leader was killed") from None


@pytest.mark.parametrize("reason", ["stopped", "cancelled"])
def test_a_read_that_fails_as_it_is_left_is_no_error_of_its_own(reason: str) -> None:
    logged: list[str] = []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))
        stopping = asyncio.Event()
        forwarder = Forwarder(lambda: "127.0.0.1:1", None, stopping, Vouching(lambda: "leader"))
        call = FailsWhenLeft()
        asking = asyncio.ensure_future(forwarder._next(call))
        await call.is_read.wait()
        if reason == "stopped":
            stopping.set()
            with pytest.raises(Unavailable, match="is stopping"):
                await asking
        else:
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        del asking
        await asyncio.sleep(0)
        gc.collect()

    asyncio.run(leave())
    assert logged == []
