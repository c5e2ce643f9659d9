"""What ``modpressure doctor`` finds on this machine: what services that are started here would use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import resource
import shutil
import ssl
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from modpressure import __version__
from modpressure.cli.session import Session
from modpressure.errors import ModpressureError
from modpressure.memory import usable_memory_bytes
from modpressure.settings import LoaderSettings, StatsSettings, load_settings
from modpressure.tls import BadCredentials, ServerTls, server_tls
from modpressure.tokens import read_tokens
from modpressure.units import format_bytes

FREE_BYTES: Final = 256 << 20
"""Less than this where files go is worth a word: the catalogue and the indexes of a tree take some 40 MiB each."""

OPEN_FILES: Final = 1024
SOON_DAYS: Final = 14


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one thing."""

    what: str
    ok: bool
    text: str
    remedy: str = ""
    """What to do, where it is not well."""

    def line(self) -> str:
        """Return it for people."""
        head = f"{'OK     ' if self.ok else 'problem'}  {self.what}: {self.text}"
        return f"{head}; {self.remedy}" if self.remedy else head


async def look_at_machine(session: Session) -> AsyncIterator[Finding]:
    """Yield what is found here, one thing after another."""
    yield Finding("modpressure", True, f"{__version__} on Python {platform.python_version()}, {platform.machine()}")
    for look in (_memory, _open_files, _cache, _database, _tree, _listening, _own_certificates, _tokens, _token_files):
        yield await asyncio.to_thread(_looked, look, session)


def _looked(look: Callable[[Session], Finding], session: Session) -> Finding:
    """Return what a look found; a sentence of its own is a problem, too."""
    try:
        return look(session)
    except ModpressureError as error:
        return Finding(look.__name__.strip("_").replace("_", " "), False, error.sentence)


def _memory(session: Session) -> Finding:
    limit_bytes = load_settings(LoaderSettings, config=session.config).memory_limit_bytes
    usable_bytes = usable_memory_bytes()
    text = f"a loader may take {format_bytes(limit_bytes)} of {format_bytes(usable_bytes)}"
    if limit_bytes > usable_bytes:
        return Finding("memory", False, text, "lower memory_limit, or the system ends the loader when it gets there")
    return Finding("memory", True, text)


def _open_files(session: Session) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} for a process"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        return Finding("open files", False, text, f"ulimit -n {OPEN_FILES} before the services are started")
    return Finding("open files", True, text)


def _cache(session: Session) -> Finding:
    return _writable("cache", load_settings(LoaderSettings, config=session.config).cache_dir, "cache_dir")


def _database(session: Session) -> Finding:
    """Look whether stats_svc would start over its database; nothing is made or changed there."""
    from stats_svc.location import LaterVersion, Location
    from stats_svc.rows import StoreError

    remedy = "see docs/settings.md, database"
    try:
        location = Location(load_settings(StatsSettings, config=session.config).database)
        finding = Finding("database", True, f"{location.name} answers")
        remedy = "start the server, or mend the setting database"
        if location.is_sqlite:
            path, remedy = Path(location.name), "name another file (setting database)"
            finding = _writable("database", path.parent, "database")
            if not finding.ok:
                return finding
            if path.exists() and not os.access(path, os.R_OK | os.W_OK):
                return Finding("database", False, f"{path} can't be written to", "see who owns it")
        location.check()
    except LaterVersion as error:
        return Finding("database", False, error.sentence, "install the newer modpressure, or go back to a backup")
    except StoreError as error:
        return Finding("database", False, error.sentence, remedy)
    return finding


def _writable(what: str, directory: Path, setting: str) -> Finding:
    """Look whether files can be made in a directory, or whether it can be made."""
    there = directory
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(what, False, f"{directory} can't be written to", f"name another place (setting {setting})")
    free_bytes = shutil.disk_usage(there).free
    text = f"{directory}, {format_bytes(free_bytes)} free"
    if free_bytes < FREE_BYTES:
        return Finding(what, False, text, f"make room, or name another place (setting {setting})")
    return Finding(what, True, text)


def _tree(session: Session) -> Finding:
    tree = load_settings(LoaderSettings, config=session.config).tree
    if tree.startswith("catalogue"):
        return Finding("tree", True, f"the bundled {tree}")
    remedy = "name a tree of modules (setting tree), or catalogue"
    if not Path(tree).is_dir():
        return Finding("tree", False, f"{tree!r} is no directory", remedy)
    if not os.access(tree, os.R_OK | os.X_OK):
        return Finding("tree", False, f"{tree!r} can't be read", "have the user of loader_svc read it")
    module = next((file for file in Path(tree).rglob("*.ko*") if file.is_file()), None)
    if module is None:
        return Finding("tree", False, f"there are no modules in {tree!r}", remedy)
    if not os.access(module, os.R_OK):
        return Finding("tree", False, f"{str(module)!r} can't be read", "have the user of loader_svc read it")
    return Finding("tree", True, tree)


def _services(session: Session) -> Iterator[tuple[str, StatsSettings | LoaderSettings]]:
    yield "stats_svc", load_settings(StatsSettings, config=session.config)
    yield "loader_svc", load_settings(LoaderSettings, config=session.config)


def _listening(session: Session) -> Finding:
    """Look whether services that are started here would be open to others by accident."""
    said = []
    for name, settings in _services(session):
        try:
            settings.check()
        except ModpressureError as error:
            return Finding("listening", False, f"{name} would not start: {error.sentence}", "set one of these")
        how = "TLS" if settings.tls_cert else "no TLS, as --insecure says" if settings.insecure else "no TLS"
        said.append(f"{name} on {settings.listen}, {how}")
    return Finding("listening", True, "; ".join(said))


def _own_certificates(session: Session) -> Finding:
    """Look how long the certificates are good that services which are started here would show."""
    ends: list[tuple[datetime, Path]] = []
    for _, settings in _services(session):
        tls = server_tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        if tls is not None:
            tls.credentials()
            ends.append((_end_of_certificate(tls), tls.cert))
    if not ends:
        return Finding("own certificates", True, "none is set")
    end, file = min(ends)
    return good_until("own certificates", f"{file}", end)


def _end_of_certificate(tls: ServerTls) -> datetime:
    """Return when a service's certificate ends. BadCredentials if nobody would believe it, as when it has ended.

    The standard library tells that of what was shown in a handshake alone: so there is one, in memory.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(tls.cert)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tls.cert, tls.key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True))
    try:
        for _ in range(3):
            for side in sides:
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise BadCredentials(f"{tls.cert}: {error.verify_message}") from error
    shown: Any = sides[0].getpeercert()
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC)


def _tokens(session: Session) -> Finding:
    """Look whether tokens that services which are started here would take are still good, and for how long."""
    files = {settings.tokens for _, settings in _services(session) if settings.tokens}
    if not files:
        return Finding("tokens", True, "none are asked for")
    now, grants = datetime.now(UTC), [grant for file in files for grant in read_tokens(file).values()]
    text = f"{len(grants)} in {', '.join(map(str, sorted(files)))}"
    ending = sorted((grant.expires, grant.name) for grant in grants if grant.expires is not None)
    if ending and (ending[0][0] - now).days < SOON_DAYS:
        end, name = ending[0]
        verb = "expired" if end <= now else "expires"
        return Finding("tokens", False, f"{text}; {name!r} {verb} at {end:%Y-%m-%d %H:%M}Z", "modpressure token new")
    if not grants:
        return Finding("tokens", False, f"{text}: nobody is let in", "modpressure token new")
    return Finding("tokens", True, text)


def _token_files(session: Session) -> Finding:
    """Look whether files that hold a token, of clients and loaders here, can be read by others."""
    loader = load_settings(LoaderSettings, config=session.config)
    files = sorted({file for file in (session.settings.token_file, loader.stats_token_file) if file and file.exists()})
    for file in files:
        if file.stat().st_mode & stat.S_IROTH:
            return Finding(
                "token files", False, f"anybody here can read {file}", "make it readable by its owner: chmod 600"
            )
    return Finding("token files", True, ", ".join(map(str, files)) or "none is set")


def good_until(what: str, which: str, end: datetime) -> Finding:
    """Return what is to be said of a certificate that ends then."""
    days = (end - datetime.now(UTC)).days
    text = f"{which} is good for {days} days, until {end:%Y-%m-%d}"
    if days < SOON_DAYS:
        return Finding(what, False, text, "renew it; a service takes new files without a restart")
    return Finding(what, True, text)
