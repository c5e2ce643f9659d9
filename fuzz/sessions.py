"""One RPC from its first message to its end, made from one source of chance: what is sent, and how it is left."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from fuzz.calls import EOF, Call, Inside, OverGrpc, RpcEnded, Way
from fuzz.messages import Dice, Maker
from fuzz.tally import BAD_STATUSES, Tally
from fuzz.targets import Target
from fuzz.wire import damaged, encoded
from modpressure.v1 import ledger_service_pb2, loader_service_pb2

ANSWER_SECONDS: Final = 60.0
"""What has not ended after this long, though it has to end by itself or as its client has left, hangs."""

_LINGER_SECONDS: Final = 0.02
"""How long a client waits for an answer that may rightly never come."""

_MOST_MESSAGES: Final = 24
_WILD: Final = (0.0, 0.0, 0.0, 0.05, 0.3, 0.9)
_CODES: Final = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass
class Session:
    """One RPC. ``sent`` is what it has sent, for who wants to send it again."""

    target: Target
    way: Way
    dice: Dice
    tally: Tally
    page_tokens: deque[str]
    """Those of the last answers, for all sessions."""

    over_grpc: bool
    """Whether it goes all the way, or begins where gRPC hands it to the service."""

    sent: list[bytes] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    """What was wrong with it."""

    def _message(self) -> bytes:
        """Return the next message: meant well, extreme, damaged or noise."""
        dice, kind = self.dice, self.target.request
        maker = Maker(dice, self.page_tokens)
        # One that is refused ends a stream, and what comes after it would never be looked at.
        rarely = 0.1 if self.target.client_streaming else 1.0
        if dice.random() < 0.02 * rarely:
            message = dice.randbytes(dice.choice((0, 1, 8, 64, 512)))
        else:
            message = encoded(maker.message(kind, dice.choice(_WILD)).SerializeToString())
            if dice.random() < 0.3 * rarely:
                message = damaged(message, maker.message(kind, 0.1).SerializeToString(), dice)
        return self._sending(message)

    def _sending(self, message: bytes) -> bytes:
        self.sent.append(message)
        return message

    async def run(self) -> None:
        """Make the RPC, and count the status that it ends with."""
        target = self.target
        call: Call = (OverGrpc if self.over_grpc else Inside)(self.way, target.path)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                if target.client_streaming:
                    left = await self._streamed(call)
                else:
                    await call.write(self._message())
                    await call.done_writing()
                    left = await self._answered(call)
                if left:
                    await call.cancel()
                status = "left" if left else self._status(*await call.status())
        except TimeoutError:
            status = "HANG"
            self.tally.hangs += 1
            self.findings.append(f"no end within {ANSWER_SECONDS:g} s")
        self.tally.statuses[status] += 1
        read, parsed = call.delivered
        self.tally.messages += read
        self.tally.parsed += parsed

    def _keep_page_token(self, answer: bytes) -> None:
        if "next_page_token" in self.target.response.fields_by_name:
            token = message_factory.GetMessageClass(self.target.response).FromString(answer).next_page_token
            if token:
                self.page_tokens.append(token)

    def _status(self, code: grpc.StatusCode, details: str) -> str:
        if code.name in BAD_STATUSES:
            self.findings.append(f"{code.name}: {details[:300]}")
        return code.name

    async def _answered(self, call: Call) -> bool:
        """Read the answer, of a stream without an end of its own the first, perhaps more; return whether to leave."""
        answer = await call.read()
        if answer is EOF:
            return False
        if not self.target.server_streaming:
            self._keep_page_token(answer)
            return False
        if self.dice.random() < 0.3:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_SECONDS):
                    await call.read()
        return not call.done()

    # --- streams of requests ---

    async def _streamed(self, call: Call) -> bool:
        """Send some messages, half-close or not, wait for the end where one must come; return whether to leave."""
        dice = self.dice
        # Who waits a moment after each message has it looked at by itself, and sees when one was refused.
        patience = dice.choice((0.0, 0.2, 1.0, 1.0))
        reading = asyncio.ensure_future(self._read_all(call))
        try:
            for message in self._messages(dice.below(_MOST_MESSAGES)):
                if call.done():
                    break
                await call.write(message)
                if dice.random() < patience:
                    await asyncio.sleep(0)
            ending = dice.random()
            if ending < 0.6:
                await call.done_writing()
                # A storm that was not told to stop may go on for long.
                storm = self.target.name == "LoaderService/RunStorm"
                await asyncio.wait({reading}, timeout=dice.choice((_LINGER_SECONDS, 0.5)) if storm else None)
            elif ending < 0.9:
                await asyncio.wait({reading}, timeout=_LINGER_SECONDS)
        except RpcEnded:
            await asyncio.wait({reading})
        finally:
            left = not reading.done()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        return left and not call.done()

    def _messages(self, count: int) -> Any:
        name, dice = self.target.name, self.dice
        if name == "LedgerService/Connect":
            yield from self._ledger(count)
        elif name == "LoaderService/RunStorm" and dice.random() < 0.9:
            yield self._first("storm")
            for _ in range(count // 4):
                yield self._message() if dice.random() < 0.2 else self._first(dice.choice(("start", "stop")))
        else:
            for _ in range(count):
                yield self._message()

    def _first(self, kind: str) -> bytes:
        request = loader_service_pb2.RunStormRequest()
        part = getattr(request, kind)
        part.CopyFrom(Maker(self.dice).message(part.DESCRIPTOR, self.dice.choice(_WILD)))
        return self._sending(encoded(request.SerializeToString()))

    def _ledger(self, count: int) -> Any:
        """Yield a hello and batches, most of them in their order."""
        dice, maker = self.dice, Maker(self.dice)
        hello = maker.message(ledger_service_pb2.Hello.DESCRIPTOR, dice.choice(_WILD))
        assert isinstance(hello, ledger_service_pb2.Hello)
        if dice.random() < 0.5:
            # A loader that nobody has seen yet; the others come back, as restarted ones must not.
            hello.instance_id = f"fuzz-{dice.getrandbits(64)}"
        if dice.random() < 0.97:
            yield self._sending(encoded(ledger_service_pb2.ConnectRequest(hello=hello).SerializeToString()))
        for sequence in range(1, count + 1):
            if dice.random() < 0.01:
                yield self._message()
                continue
            batch = maker.message(ledger_service_pb2.OperationBatch.DESCRIPTOR, dice.choice(_WILD))
            assert isinstance(batch, ledger_service_pb2.OperationBatch)
            batch.sequence = sequence if dice.random() < 0.99 else dice.choice((0, -1, 1, sequence + 2, (1 << 63) - 1))
            yield self._sending(encoded(ledger_service_pb2.ConnectRequest(batch=batch).SerializeToString()))

    async def _read_all(self, call: Call) -> None:
        """Read until the end; look into the answers that carry statuses of their own."""
        while (answer := await call.read()) is not EOF:
            if self.target.name == "LoaderService/LoadModules":
                self._look(answer)

    def _look(self, answer: bytes) -> None:
        try:
            responses = loader_service_pb2.LoadModulesResponse.FromString(answer).responses
        except DecodeError as error:
            self.tally.wrong += 1
            self.findings.append(f"an answer can't be parsed: {error}")
            return
        for response in responses:
            code = _CODES.get(response.error.code, str(response.error.code)) if response.HasField("error") else "OK"
            self.tally.statuses[f"answer {code}"] += 1
            if code in ("INTERNAL", "UNKNOWN"):
                self.findings.append(f"answer {code}: {response.error.message[:300]}")
