"""Some messages to one RPC, made from one source of chance: what is sent, and how each call is left."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from fuzz import system_files
from fuzz.calls import EOF, Call, Inside, OverGrpc, RpcEnded, Way
from fuzz.messages import Dice, Maker, delimited
from fuzz.pulse import ANSWER_SECONDS, Pulse
from fuzz.tally import BAD_STATUSES, Tally
from fuzz.targets import Target
from fuzz.wire import LENGTH_DELIMITED, damaged, varint
from modpressure.v1 import ledger_service_pb2, loader_service_pb2, stats_service_pb2

_LINGER_SECONDS: Final = 0.02
"""How long a client waits for an answer that may rightly never come."""

MOST_MESSAGES: Final = 24
"""Messages of a session, at most."""

_AGAIN: Final = 1 / 32
"""The chance of a request that the service can't tell from an earlier one: all that differs is what it finds there."""

_SHORT_BYTES: Final = 64
"""Longer requests are as good as never the same."""

_FILES: Final = 0.8
"""The chance of a damaged file, where files are read, instead of anything else."""

_KEPT_PAGE_TOKENS: Final = 20
_SHOWN_BYTES: Final = 300
_WILD: Final = (0.0, 0.0, 0.0, 0.05, 0.3, 0.9)
_WILD_OF_FEW: Final = (0.0, 0.5, 0.9, 0.9)
"""What a client may mean with a message of few fields is soon all said."""

_FEW_FIELDS: Final = 4
_CODES: Final = {code.value[0]: code.name for code in grpc.StatusCode}


class History:
    """What all sessions of a target share: which requests there were, and what they take from answers."""

    def __init__(self, target: Target) -> None:
        self._request = message_factory.GetMessageClass(target.request)
        self._response = message_factory.GetMessageClass(target.response)
        self._has_page_tokens = "next_page_token" in target.response.fields_by_name
        self._seen: set[int] = set()
        self.page_tokens: deque[str] = deque(maxlen=_KEPT_PAGE_TOKENS)
        """Those of the last answers."""

        self.exported: list[system_files.Line] = []
        """The file of a system, for a target that reads such files."""

    def is_new(self, message: bytes) -> bool:
        """Return whether no request was like this one to a service, which sees only the fields that it knows."""
        if len(message) > _SHORT_BYTES:
            return True
        try:
            request = self._request.FromString(message)
        except DecodeError:
            key = hash(message)
        else:
            request.DiscardUnknownFields()  # type: ignore[no-untyped-call]
            key = hash(request.SerializeToString(deterministic=True))
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def look_for_page_token(self, answer: bytes) -> None:
        """Keep the page token of an answer, if it has one."""
        if self._has_page_tokens and (token := self._response.FromString(answer).next_page_token):
            self.page_tokens.append(token)


@dataclass
class Session:
    """A stream of messages, or as many calls with one each, one after another.

    All that it sends hangs on its dice, apart from page tokens and the exported system; a request like an earlier one
    may be left out.
    """

    target: Target
    way: Way
    dice: Dice
    tally: Tally
    history: History
    pulse: Pulse
    over_grpc: bool
    """Whether it goes all the way, or begins where gRPC hands it to the service."""

    sent: int = 0
    last_sent: deque[bytes] = field(default_factory=lambda: deque(maxlen=2))
    findings: list[str] = field(default_factory=list)
    """What was wrong with it."""

    def _message(self) -> bytes:
        """Return the next message: meant well, extreme, damaged or noise."""
        dice, kind = self.dice, self.target.request
        maker = Maker(dice, self.history.page_tokens)
        is_of_few = len(kind.fields) <= _FEW_FIELDS
        # One that is refused ends a stream, and what comes after it would never be looked at. Of damaged ones with few
        # fields most are no messages any more, and all these look the same to the service.
        damages = 0.03 if self.target.client_streaming else 0.1 if is_of_few else 0.3
        if dice.random() < damages / 15:
            return dice.randbytes(dice.choice((0, 1, 8, 64, 512)))
        message = maker.message(kind, dice.choice(_WILD_OF_FEW if is_of_few else _WILD))
        if dice.random() < damages:
            message = damaged(message, maker.message(kind, 0.1), dice)
        return message

    async def _write(self, call: Call, message: bytes) -> None:
        self.sent += 1
        self.last_sent.append(message)
        await call.write(message)

    def _found(self, what: str) -> None:
        shown = ", ".join(message[:_SHOWN_BYTES].hex() or "-" for message in self.last_sent)
        self.findings.append(f"{what} (message {self.sent}, the last of {shown})")

    async def run(self) -> None:
        """Send all, and count the statuses of the calls."""
        if self.target.client_streaming:
            await self._call(self._streamed)
            return
        for _ in range(MOST_MESSAGES):
            message, dice = self._message(), self.dice
            # Chance must not hang on answers: the same session sends the same, whatever it meets.
            again, lingers = dice.random() < _AGAIN, dice.random() < 0.3
            if self.history.is_new(message) or again:
                await self._call(lambda call, message=message, lingers=lingers: self._asked(call, message, lingers))

    async def _call(self, talk: Callable[[Call], Awaitable[bool]]) -> None:
        """Make an RPC; ``talk`` sends and reads, and returns whether the client leaves it."""
        call: Call = (OverGrpc if self.over_grpc else Inside)(self.way, self.target.path)
        try:
            with self.pulse.limited():
                if await talk(call):
                    await call.cancel()
                    status = "left"
                else:
                    code, details = await call.status()
                    status = code.name
                    if status in BAD_STATUSES:
                        self._found(f"{status}: {details[:300]}")
        except TimeoutError:
            status = "HANG"
            self.tally.hangs += 1
            self._found(f"no end within {ANSWER_SECONDS:g} s")
        self.tally.statuses[status] += 1
        read, parsed = call.delivered
        self.tally.messages += read
        self.tally.parsed += parsed

    async def _asked(self, call: Call, message: bytes, lingers: bool) -> bool:
        """Send the request; read its answer, of a stream without an end of its own the first, perhaps more."""
        await self._write(call, message)
        await call.done_writing()
        answer = await call.read()
        if answer is EOF:
            return False
        if not self.target.server_streaming:
            self.history.look_for_page_token(answer)
            return False
        if lingers:
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
            for message in self._messages(dice.below(MOST_MESSAGES)):
                if call.done():
                    break
                await self._write(call, message)
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

    def _messages(self, count: int) -> Iterator[bytes]:
        name, dice = self.target.name, self.dice
        if name == "LedgerService/Connect":
            yield from self._ledger(count)
        elif name == "LoaderService/RunStorm" and dice.random() < 0.9:
            yield self._first("storm")
            for _ in range(count // 4):
                yield self._message() if dice.random() < 0.2 else self._first(dice.choice(("start", "stop")))
        elif self.history.exported and dice.random() < _FILES:
            header = stats_service_pb2.ImportHeader(system=system_files.SYSTEM, replace=dice.random() < 0.97)
            yield _field(self.target.request, "header", header.SerializeToString())
            for piece in system_files.pieces(system_files.damaged(self.history.exported, dice), dice):
                yield _field(self.target.request, "chunk", piece)
        else:
            for _ in range(count):
                yield self._message()

    def _first(self, kind: str) -> bytes:
        part = loader_service_pb2.RunStormRequest.DESCRIPTOR.fields_by_name[kind]
        return _field(part.containing_type, kind, Maker(self.dice).message(part.message_type, self.dice.choice(_WILD)))

    def _ledger(self, count: int) -> Iterator[bytes]:
        """Yield a hello and batches, most of them in their order."""
        dice, maker, request = self.dice, Maker(self.dice), self.target.request
        hello_type, batch_type = ledger_service_pb2.Hello.DESCRIPTOR, ledger_service_pb2.OperationBatch.DESCRIPTOR
        hello = maker.message(hello_type, dice.choice(_WILD))
        if dice.random() < 0.5:
            # A loader that nobody has seen yet; the others come back, as restarted ones must not.
            # Of a field that comes twice the last one counts.
            hello += _field(hello_type, "instance_id", b"fuzz-%d" % dice.getrandbits(64))
        if dice.random() < 0.97:
            yield _field(request, "hello", hello)
        for in_order in range(1, count + 1):
            if dice.random() < 0.01:
                yield self._message()
                continue
            batch = maker.message(batch_type, dice.choice(_WILD))
            others = (0, (1 << 64) - 1, 1, in_order + 2, (1 << 63) - 1)
            sequence = in_order if dice.random() < 0.99 else dice.choice(others)
            batch += varint(batch_type.fields_by_name["sequence"].number << 3) + varint(sequence)
            yield _field(request, "batch", batch)

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
            self._found(f"an answer can't be parsed: {error}")
            return
        for response in responses:
            code = _CODES.get(response.error.code, str(response.error.code)) if response.HasField("error") else "OK"
            self.tally.statuses[f"answer {code}"] += 1
            if code in BAD_STATUSES:
                self._found(f"answer {code}: {response.error.message[:300]}")


def _field(message: Descriptor, name: str, content: bytes) -> bytes:
    """Return a field of a message type, encoded."""
    return varint(message.fields_by_name[name].number << 3 | LENGTH_DELIMITED) + delimited(content)
