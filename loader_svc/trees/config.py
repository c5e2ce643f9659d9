"""What ``modprobe.d`` says: aliases, blacklists, options, commands and soft dependencies (modprobe.d(5)).

Read as libkmod of kmod 30 reads it, oddities included, for a line that modprobe passes over must not count here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from loader_svc.trees.names import normal_alias

SUFFIXES = (".conf", ".alias")
"""What the names of configuration files end with."""

TREE_SOFTDEPS = "modules.softdep"
"""The tree's own soft dependencies take part among the files by this name."""

MAX_FILE_BYTES = 16 << 20
"""Longest file that is read."""

_DIRECTIVES = ("alias", "blacklist", "options", "install", "remove", "softdep")
_WORD = re.compile(r'(?:[^"\s]|"[^"]*(?:"|\Z))+')
_WORD_PARTS = re.compile(r'(?P<quote>"?)(?P<module>[^."=\s]*)\.(?P<name>[^."=\s]*)(?P<value>=.*)?', re.DOTALL)


class Softdep(NamedTuple):
    """A soft dependency: what a module (a shell pattern) would like loaded before and after it."""

    module: str
    pre: tuple[str, ...]
    post: tuple[str, ...]


class Pair(NamedTuple):
    """A module, or a shell pattern for some, or an alias; and what the line says of it."""

    name: str
    value: str


@dataclass(slots=True)
class ModprobeConfig:
    """Everything of the configuration, in the order in which it counts."""

    aliases: list[Pair] = field(default_factory=list)
    """Alias pattern, module."""
    blacklist: list[str] = field(default_factory=list)
    options: list[Pair] = field(default_factory=list)
    install: list[Pair] = field(default_factory=list)
    remove: list[Pair] = field(default_factory=list)
    softdeps: list[Softdep] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """A sentence for each line that was passed over."""


def read_config(
    places: Sequence[Path], tree_softdeps: Sequence[str] = (), kernel_command_line: str = ""
) -> ModprobeConfig:
    """Read the configuration in ``places``, directories or files; what is not there is passed over, as modprobe does.

    A file's name decides: files are read in the order of their names, and of equal names the one in the first place
    counts. ``tree_softdeps`` are the lines of the tree's ``modules.softdep``. ``kernel_command_line`` may hold options
    as ``MODULE.NAME=VALUE`` and ``modprobe.blacklist=``.
    """
    config = ModprobeConfig()
    files = _files(places)
    for name in sorted(files, key=os.fsencode):
        path = files[name]
        if path is None:
            for line in tree_softdeps:
                _take_line(config, line, TREE_SOFTDEPS, 0)
            continue
        for number, line in _lines(_text(path)):
            _take_line(config, line, str(path), number)
    _take_command_line(config, kernel_command_line)
    return config


def _files(places: Sequence[Path]) -> dict[str, Path | None]:
    found: dict[str, Path | None] = {TREE_SOFTDEPS: None}
    for place in places:
        if os.path.isfile(place):  # of pathlib's own, some errors come through
            found.setdefault(place.name, place)
            continue
        try:
            names = os.listdir(place)
        except OSError:
            continue
        for name in names:
            path = place / name
            if not name.startswith(".") and name.endswith(SUFFIXES) and len(name) >= 6 and os.path.isfile(path):
                found.setdefault(name, path)
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode("utf-8", "surrogateescape")
    except OSError:
        return ""


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with the number of their last part. A backslash joins the next line; before anything else it is dropped."""
    number = 0
    line = ""
    for part in text.split("\n"):
        number += 1
        joins = (len(part) - len(part.rstrip("\\"))) % 2 == 1
        line += re.sub(r"\\(.)", r"\1", part[:-1] if joins else part)
        if not joins:
            yield number, line.partition("\0")[0]
            line = ""
    if line:
        yield number, line.partition("\0")[0]


def _token(text: str) -> tuple[str | None, str]:
    """Split off the first word of ``text``: that, and what is behind the one blank after it; None if there is none."""
    text = text.lstrip("\t ")
    if not text:
        return None, ""
    match = re.search(r"[\t ]", text)
    return (text[: match.start()], text[match.end() :]) if match else (text, "")


def _take_line(config: ModprobeConfig, line: str, source: str, number: int) -> None:
    """Add what one line says; a line that can't be understood gives a warning."""
    if line.startswith("#"):
        return
    directive, rest = _token(line)
    if directive is None or (directive in _DIRECTIVES and _take(config, directive, rest)):
        return
    place = f"{source} line {number}" if number else source
    config.warnings.append(f"{place}: ignoring bad line starting with '{directive}'")


def _take(config: ModprobeConfig, directive: str, rest: str) -> bool:
    name, rest = _token(rest)
    name = normal_alias(name) if name is not None else None
    if name is None:
        return False
    if directive == "blacklist":
        config.blacklist.append(name)
    elif directive == "alias":
        module, _ = _token(rest)
        module = normal_alias(module) if module is not None else None
        if module is None:
            return False
        config.aliases.append(Pair(name, module))
    elif not rest:
        return False
    elif directive == "options":
        config.options.append(Pair(name, rest.replace("\t", " ")))
    elif directive == "install":
        config.install.append(Pair(name, rest))
    elif directive == "remove":
        config.remove.append(Pair(name, rest))
    else:
        config.softdeps.append(_softdep(name, rest))
    return True


def _softdep(name: str, text: str) -> Softdep:
    """Read the soft dependency in ``text``: words behind ``pre:`` and ``post:``."""
    words = text.split()
    # libkmod takes a single blank at the start for a part of the word behind it, which then is neither pre: nor post:.
    if text[:1].isspace() and not text[1:2].isspace():
        words = words[1:]
    found: dict[str, list[str]] = {"pre:": [], "post:": []}
    into: list[str] | None = None
    for word in words:
        if word in found:
            into = found[word]
        elif into is not None:
            into.append(word)
    return Softdep(name, tuple(found["pre:"]), tuple(found["post:"]))


def _take_command_line(config: ModprobeConfig, text: str) -> None:
    """Add the options for modules on the kernel's command line, where quotes keep blanks in a value."""
    for match in _WORD.finditer(text):
        parts = _WORD_PARTS.fullmatch(match[0])
        if parts is None or match[0].count('"') % 2:
            continue
        module, name, value = parts["module"], parts["name"], parts["value"] or ""
        if module == "modprobe" and name == "blacklist" and value:
            config.blacklist += value[1:].split(",")
            continue
        normal = normal_alias(module)
        if normal is None:
            continue
        if parts["quote"] and value:
            value = f'="{value[1:]}'  # a boot loader moved the quote from the value to the word's start
        config.options.append(Pair(normal, name + value))
