"""What ``modpressure up`` shows: where all is, and the log lines of the services."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from modpressure.cli.children import Child, parse_line
from modpressure.cli.output import printable
from modpressure.settings import ClientSettings
from modpressure.settings_sources import variable
from modpressure.tls import ClientTls

STATS_SERVICE: Final = "modpressure.v1.StatsService"

_COLOURS: Final = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


@dataclass(frozen=True, slots=True)
class Running:
    """What was started, and where."""

    stats: str
    loaders: list[str]
    database: str
    pids: dict[str, int]

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {"stats": self.stats, "loaders": self.loaders, "database": self.database, "pids": self.pids}


def announcement(running: Running, tls: ClientTls | None = None) -> str:
    """Return what a user has to know about what runs, and talks ``tls``."""
    lines = [
        f"stats_svc   {running.stats}",
        *(f"loader_svc  {address}" for address in running.loaders),
        f"database    {running.database}",
        "",
        "In another terminal:",
    ]
    defaults = ClientSettings()
    if running.stats != defaults.stats:
        lines.append(f"  export {variable(ClientSettings, 'stats')}={running.stats}")
    if running.loaders != defaults.loaders:
        lines.append(f"  export {variable(ClientSettings, 'loaders')}={','.join(running.loaders)}")
    files = {"ca": tls.ca, "cert": tls.cert, "key": tls.key} if tls else {}
    said = {name: shlex.quote(str(file.absolute())) for name, file in files.items() if file}
    lines += [f"  export {variable(ClientSettings, name)}={file}" for name, file in said.items()]
    how = " ".join(f"-{name.replace('ca', 'cacert')} {file}" for name, file in said.items()) or "-plaintext"
    lines += [
        "  modpressure storm --workers 100 --module xfs",
        "  modpressure report",
        f"  grpcurl {how} {running.stats} {STATS_SERVICE}/GetReport | jq -r .text",
        "",
        "Ctrl-C stops all of them.",
    ]
    return "\n".join(lines) + "\n"


class _LogConsole(Console):
    """Where log lines go; if nobody reads them any more, all is stopped, as by any other signal."""

    def on_broken_pipe(self) -> None:
        """Stop, in order."""
        self.quiet = True
        signal.raise_signal(signal.SIGTERM)


def line_printer(quiet: bool) -> Callable[[Child, str], None]:
    """Return what prints a child's lines on standard error; ``quiet`` leaves out all but warnings and errors."""
    target = _LogConsole(stderr=True, markup=False, highlight=False, emoji=False)
    numbers: dict[str, int] = {}

    def print_line(child: Child, line: str) -> None:
        if quiet and parse_line(line).get("level") not in ("warning", "error", "critical"):
            return
        colour = _COLOURS[numbers.setdefault(child.name, len(numbers)) % len(_COLOURS)]
        target.print(Text(f"{child.name:<10}", style=colour), log_text(line), soft_wrap=True)

    return print_line


def log_text(line: str) -> str:
    """Return a line of a structured log for people; any other line as it is, but printable.

    Much in it was chosen by clients, who are not to write lines of their own: values are quoted as by the services'
    log for terminals, and a stack trace is set off.
    """
    event = parse_line(line)
    if not event:
        return printable(line)
    time, level, what = (str(event.pop(key, "")) for key in ("timestamp", "level", "event"))
    trace = event.pop("exception", None)
    rest = " ".join(f"{key}={_value_text(value)}" for key, value in event.items())
    head = printable(" ".join(part for part in (time[11:19], f"{level:<7}", what, rest) if part))
    return "\n    ".join((head, *map(printable, str(trace).split("\n")))) if trace else head


def _value_text(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else repr(text)
