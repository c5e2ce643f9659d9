"""``modpressure doctor``: one line for each thing that has to be well, and what to do where it is not."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modpressure.addresses import expand_addresses
from modpressure.admission import TIME_HEADER
from modpressure.cli.doctor_machine import Finding, good_until, look_at_machine
from modpressure.cli.output import print_json, print_line
from modpressure.cli.session import Session, command
from modpressure.cli.up import LOADER_SERVICE
from modpressure.cli.up_view import STATS_SERVICE
from modpressure.client_errors import REFUSED, NoAnswer, error_of, reason_of
from modpressure.errors import Forbidden, ModpressureError, Unauthenticated
from modpressure.grpc_server import split_address
from modpressure.loopback import is_socket
from modpressure.tls import open_channel

MAX_SKEW_SECONDS: Final = 5.0
_TRIES_SECONDS: Final = 3.0


@command("loaders", "stats", "system", "timeout_seconds")
async def doctor(session: Session) -> int:
    """Look at everything that modpressure needs, and say what is not well and what to do about it.

    Looks at the services that the settings name, and at what services that are started here would use. Changes nothing.
    Exit code 1 if there is a problem.

    Example:
      modpressure doctor
    """
    findings: list[Finding] = []
    async for finding in _all(session):
        findings.append(finding)
        if not session.json:
            print_line(finding.line())
    if session.json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    return 0 if all(finding.ok for finding in findings) else 1


async def _all(session: Session) -> AsyncIterator[Finding]:
    async for finding in look_at_machine(session):
        yield finding
    try:
        _ = session.tls.read() if session.tls else None
        _ = session.token
    except ModpressureError as error:
        yield Finding("credentials", False, error.sentence, "name other files (settings ca, cert, key, token_file)")
        return
    is_well = False
    for address in session.settings.stats.split(","):
        stats = await _health(session, "stats_svc", address, STATS_SERVICE)
        yield stats
        is_well = is_well or stats.ok
        if session.tls is not None and (certificate := await asyncio.to_thread(_certificate, session, address)):
            yield certificate
    if is_well:
        yield await _door(session)
    try:
        loaders = await expand_addresses(session.settings.loaders)
    except ModpressureError as error:
        yield Finding("loader_svc", False, error.sentence, "name addresses that there are (--loaders)")
        return
    for address in loaders:
        yield await _health(session, "loader_svc", address, LOADER_SERVICE)
        if session.tls is not None and (certificate := await asyncio.to_thread(_certificate, session, address)):
            yield certificate


async def _health(session: Session, what: str, address: str, service: str) -> Finding:
    """Ask a service whether it is well."""
    name, setting = f"{what} at {address}", "stats" if service == STATS_SERVICE else "loaders"
    async with open_channel(address, session.tls) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            begun = time.time()
            call = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=_TRIES_SECONDS)
            answer = await call
            skew_seconds = _skew_seconds(await call.trailing_metadata(), begun, time.time())
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return Finding(name, False, "another service answers there", "give the right address")
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return Finding(name, False, f"no answer within {_TRIES_SECONDS:g} s", f"see the setting {setting}")
            meant = error_of(error, what, address)
            if not isinstance(meant, NoAnswer):
                return Finding(name, False, meant.sentence)
            reason = reason_of(error.details() or "")
            if reason in REFUSED:
                how = f"start it: modpressure up, or see the setting {setting}"
            else:
                how = f"see the settings {setting}, ca, cert, key"
            return Finding(name, False, f"no answer: {reason}", how)
    if abs(skew_seconds) > MAX_SKEW_SECONDS:
        ahead = "ahead of" if skew_seconds > 0 else "behind"
        text = f"its clock is {abs(skew_seconds):.0f} s {ahead} this machine's"
        return Finding(name, False, text, "set the clocks (chrony, systemd-timesyncd): tokens and events go by them")
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return Finding(name, True, "serving")
    missing = "its database is away" if service == STATS_SERVICE else "it does not reach its stats_svc"
    return Finding(name, False, "not serving", f"{missing}: its log says why")


def _skew_seconds(metadata: Any, begun: float, ended: float) -> float:
    """Return by how much a service's clock is ahead of this machine's, as far as the answer's way can't explain it."""
    said = dict(metadata or ()).get(TIME_HEADER)
    if said is None:
        return 0.0
    theirs = float(said)
    return max(0.0, theirs - ended) + min(0.0, theirs - begun)


async def _door(session: Session) -> Finding:
    """Look whether we are let in to read."""
    system = session.settings.system
    try:
        async with session.client() as client:
            client.timeout_seconds = min(client.timeout_seconds, _TRIES_SECONDS)
            stats = await client.stats(system)
    except Unauthenticated as error:
        return Finding("token", False, error.sentence, "give one that is known (setting token_file; modpressure token)")
    except Forbidden as error:
        return Finding("token", False, error.sentence, "give one that may")
    except ModpressureError as error:
        return Finding("system", False, error.sentence)
    return Finding("system", True, f"{system!r} has counted {stats.calls} calls")


def _certificate(session: Session, address: str) -> Finding | None:
    """Look how long the certificate of a service is good; None if there is no connection, as said already."""
    settings, what = session.settings, f"certificate of {address}"
    if is_socket(address):
        return Finding(what, True, "it is a socket of this machine")
    host, port = split_address(address.removeprefix("dns:").rpartition("/")[2])
    context = ssl.create_default_context(cafile=settings.ca)
    if settings.cert and settings.key:
        context.load_cert_chain(settings.cert, settings.key)
    try:
        with (
            socket.create_connection((host, port), _TRIES_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as encrypted,
        ):
            shown: Any = encrypted.getpeercert()
    except ssl.SSLCertVerificationError as error:
        return Finding(what, False, f"not believed: {error.verify_message}", "see the setting ca")
    except ssl.SSLError as error:
        reason = (error.reason or "no handshake").lower().replace("_", " ")
        return Finding(what, False, f"no TLS: {reason}", "see the settings ca, cert, key")
    except OSError:
        return None
    return good_until(what, "it", datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC))
