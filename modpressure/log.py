"""Logging of every process: one event a line on standard error, as JSON for programs or coloured for people."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import structlog

from modpressure.errors import BadRequest

LogFormat = Literal["auto", "console", "json"]
"""``auto`` is ``console`` on a terminal and ``json`` elsewhere."""

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


_CALL: Final[ContextVar[Mapping[str, Any]]] = ContextVar("call", default=MappingProxyType({}))
_PROCESS: Final[dict[str, Any]] = {}


def about(**fields: Any) -> None:
    """Have each line that is logged from here on in this task, and in those that it starts, say what it belongs to.

    An empty value says nothing.
    """
    _CALL.set({**_CALL.get(), **{name: value for name, value in fields.items() if value}})


def about_process(**fields: Any) -> None:
    """Have each line of this process say what it belongs to, such as the name of the loader."""
    _PROCESS.update(fields)


def _add_what_it_is_about(logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    # What the line itself says counts more.
    return {**_PROCESS, **_CALL.get(), **event}


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Return False for the traceback that gRPC logs where a client's connection breaks before its answer is out.

    That is nobody's mistake, and what was done is counted.
    """
    return not str(record.msg).startswith("ExecuteBatchError raised in core")


def configure(level: str = "info", format: str = "auto", *, for_good: bool = False) -> None:
    """Set up structlog, and the standard library's logging to come out alike.

    ``level`` is one of ``LEVELS``, ``format`` one of ``LogFormat``; BadRequest names a value that is neither.
    ``for_good`` is for a program that sets it up once, at its start: nothing changes it afterwards.
    """
    number = LEVELS.get(level.lower())
    if number is None:
        raise BadRequest(f"there is no log level {level!r}; there are {', '.join(LEVELS)}", field="log_level")
    if format not in get_args(LogFormat):
        formats = ", ".join(get_args(LogFormat))
        raise BadRequest(f"there is no log format {format!r}; there are {formats}", field="log_format")
    as_json = format == "json" or (format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        _add_what_it_is_about,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
    ]
    last: list[structlog.typing.Processor]
    if as_json:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        # Else each line puts a logger together, if only to be dropped.
        cache_logger_on_first_use=for_good,
    )
    # What libraries log through the standard library takes the same road.
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_worth_telling)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)
