"""What comes out on standard error, and how."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from modpressure import log
from modpressure.errors import BadRequest

PROGRAM = """
import logging, sys
import structlog
from modpressure import log
log.configure(sys.argv[1], sys.argv[2])
logger = structlog.get_logger("mine")
logger.debug("a detail")
logger.info("it happened", loader="a", calls=3)
logging.getLogger("a.library").warning("it %s", "warns")
logging.getLogger("a.library").info("chatter")
try:
    raise ValueError("no")
except ValueError:
    logger.error("it failed", exc_info=True)
    # As gRPC has it (aio/server.pyx.pxi), of a client whose connection broke.
    logging.getLogger("grpc").exception("ExecuteBatchError raised in core by servicer method [%s]", "/a/b")
"""


def lines(level: str, format: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, level, format]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout == ""
    return ended.stderr.splitlines()


@pytest.mark.parametrize("format", ["json", "auto"])
def test_each_line_is_one_json_object_where_no_terminal_is(format: str) -> None:
    found = [json.loads(line) for line in lines("info", format)]
    assert [(line["event"], line["level"]) for line in found] == [
        ("it happened", "info"),
        ("it warns", "warning"),
        ("it failed", "error"),
    ]
    assert (found[0]["loader"], found[0]["calls"]) == ("a", 3)
    assert all(line["timestamp"].endswith("Z") for line in found)
    assert "ValueError: no" in found[2]["exception"]


def test_levels_cut_off_what_is_below_them() -> None:
    assert [json.loads(line)["event"] for line in lines("error", "json")] == ["it failed"]
    assert json.loads(lines("debug", "json")[0])["event"] == "a detail"


def test_people_get_plain_lines() -> None:
    first = lines("info", "console")[0]
    assert "it happened" in first and "loader=a" in first
    assert "\x1b" not in first


@pytest.mark.parametrize(
    ("level", "format", "sentence"),
    [("loud", "json", "no log level 'loud'"), ("info", "xml", "no log format 'xml'; there are auto, console, json")],
)
def test_a_level_or_format_that_there_is_not_is_named(level: str, format: str, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        log.configure(level, format)
