"""Shell patterns as fnmatch(3) without flags reads them, and tables of many of them to look a text up in.

Python's own fnmatch differs: it has no backslash, no ``[^...]`` and no character classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

_WILD = re.compile(r"[*?\[]")
_CLASSES = {
    "alnum": "a-zA-Z0-9",
    "alpha": "a-zA-Z",
    "blank": r"\x20\t",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": r"\x20-~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\x20\t-\r",
    "upper": "A-Z",
    "xdigit": "0-9a-fA-F",
}
_NOTHING = "(?!)"


def matches(pattern: str, text: str) -> bool:
    """Whether ``text`` matches the shell pattern, by fnmatch(3) in the C locale with no flags."""
    if not any(special in pattern for special in "?[\\"):
        return _matches_stars(pattern.split("*"), text)
    return _compiled(pattern).fullmatch(text) is not None


def _matches_stars(pieces: list[str], text: str) -> bool:
    """Whether ``text`` is the ``pieces`` with anything between them: most patterns are so, and this needs no regex."""
    first, last = pieces[0], pieces[-1]
    if len(pieces) == 1:
        return text == first
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for piece in pieces[1:-1]:
        at = text.find(piece, at, end)
        if at < 0:
            return False
        at += len(piece)
    return True


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = [""]  # between the stars
    at = 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "*":
            pieces.append("")
        elif char == "?":
            pieces[-1] += "."
        elif char == "[":
            bracket, at = _bracket(pattern, at)
            pieces[-1] += bracket
        elif char == "\\":
            # A backslash at the very end matches nothing.
            pieces[-1] += re.escape(pattern[at]) if at < len(pattern) else _NOTHING
            at += 1
        else:
            pieces[-1] += re.escape(char)
    if len(pieces) == 1:
        return re.compile(pieces[0], re.DOTALL)
    # The first place where a piece fits is as good as any later one; atomic groups keep a hostile pattern cheap.
    middle = "".join(f"(?>.*?{piece})" for piece in pieces[1:-1] if piece)
    return re.compile(f"{pieces[0]}{middle}.*{pieces[-1]}", re.DOTALL)


def _bracket(pattern: str, at: int) -> tuple[str, int]:
    """Regex for the bracket that was opened just before ``at``, and where it ends; a lone "[" stands for itself."""
    start = at
    negated = pattern[at : at + 1] in ("!", "^")
    at += negated
    members: list[str] = []
    while at < len(pattern):
        if pattern[at] == "]" and at > start + negated:
            body = "".join(members)
            if not body:
                return ("." if negated else _NOTHING), at + 1
            return f"[{'^' if negated else ''}{body}]", at + 1
        if pattern.startswith("[:", at) and ":]" in pattern[at + 2 :]:
            end = pattern.index(":]", at + 2)
            members.append(_CLASSES.get(pattern[at + 2 : end], ""))
            at = end + 2
            continue
        low, at = _member(pattern, at)
        if low == pattern[at - 1 :] == "\\" or pattern[at:] == "-":
            return _NOTHING, len(pattern)  # cut off within a member
        if pattern[at : at + 1] == "-" and pattern[at + 1 : at + 2] not in ("", "]"):
            high, at = _member(pattern, at + 1)
            if low <= high:
                members.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            members.append(re.escape(low))
    return re.escape("["), start


def _member(pattern: str, at: int) -> tuple[str, int]:
    """One character of a bracket, with its backslash if it has one, and where the next one is."""
    if pattern[at] == "\\" and at + 1 < len(pattern):
        at += 1
    return pattern[at], at + 1


class FirstMatch(Generic[T]):
    """Lines of a pattern and a value each, of which the first that matches a text counts."""

    def __init__(self, lines: Iterable[tuple[str, T]]) -> None:
        self._literal: dict[str, tuple[int, T]] = {}
        self._wild: list[tuple[int, str, T]] = []
        for place, (pattern, value) in enumerate(lines):
            if any(special in pattern for special in "*?[\\"):
                self._wild.append((place, pattern, value))
            else:
                self._literal.setdefault(pattern, (place, value))

    def find(self, text: str) -> T | None:
        """Return the value of the first line whose pattern ``text`` matches; None if there is none."""
        literal = self._literal.get(text)
        for place, pattern, value in self._wild:
            if literal is not None and literal[0] < place:
                break
            if matches(pattern, text):
                return value
        return literal[1] if literal is not None else None


class _Entry(NamedTuple):
    place: int
    rest: str


class PatternTable:
    """Many patterns with a value each, to find those that match a text, in the order that libkmod gives them.

    libkmod's index (depmod's ``modules.*.bin``) compares a pattern's text before its first wildcard letter by letter
    and hands only the rest to fnmatch, so a backslash there stands for itself.
    """

    def __init__(self, patterns: Sequence[str], values: Sequence[str]) -> None:
        self._values = values
        self._patterns = patterns
        self._literal: dict[str, list[int]] = {}
        self._wild: dict[str, list[_Entry]] = {}
        for place, pattern in enumerate(patterns):
            wild = _WILD.search(pattern)
            if wild is None:
                self._literal.setdefault(pattern, []).append(place)
            else:
                start = wild.start()
                self._wild.setdefault(pattern[:start], []).append(_Entry(place, pattern[start:]))
        self._longest = max(map(len, self._wild), default=0)

    def find(self, text: str) -> list[str]:
        """Values of all patterns that ``text`` matches, by the patterns' order, with repeats."""
        return [self._values[place] for place in sorted(self._places(text))]

    def find_unranked(self, text: str) -> list[str]:
        """Values as libkmod gives them where all patterns have the same priority (what is built in): last found first.

        It finds in the order in which it walks its tree of letters, and puts each pattern's values in front.
        """
        by_pattern: dict[str, list[str]] = {}
        for place in sorted(self._places(text)):
            by_pattern.setdefault(self._patterns[place], []).append(self._values[place])
        walked = sorted(by_pattern, key=_walk_order)
        return [value for pattern in reversed(walked) for value in by_pattern[pattern]]

    def _places(self, text: str) -> Iterable[int]:
        wild = _WILD.search(text)
        if wild is not None:
            return self._places_of_wild_text(text, wild.start())
        return [*self._literal.get(text, ()), *self._wild_places(text, len(text) + 1)]

    def _wild_places(self, text: str, end: int) -> list[int]:
        """Find the places of patterns that ``text`` matches and whose first wildcard comes before ``end``."""
        return [
            entry.place
            for length in range(min(end, self._longest + 1))
            for entry in self._wild.get(text[:length], ())
            if matches(entry.rest, text[length:])
        ]

    def _places_of_wild_text(self, text: str, start: int) -> list[int]:
        """Find the places for a text with wildcards of its own, the first at ``start``.

        libkmod may meet a pattern by letter and as a pattern, twice. Its tree of letters has a node where patterns part
        or end. At a node it tries all that goes on with a wildcard as patterns, and then goes on by letter, be that one
        a wildcard too; between nodes a wildcard ends the walk.
        """
        places = self._wild_places(text, start)
        known = text[:start]
        alive = [(place, pattern) for place, pattern in enumerate(self._patterns) if pattern.startswith(known)]
        for length in range(start, len(text) + 1):
            going_on = {pattern[length] for _, pattern in alive if len(pattern) > length}
            ended = [place for place, pattern in alive if len(pattern) == length]
            rest = text[length:]
            places += [
                place
                for place, pattern in alive
                if len(pattern) > length and pattern[length] in "*?[" and matches(pattern[length:], rest)
            ]
            is_node = length == 0 or bool(ended) or len(going_on) > 1
            if not rest:
                return places + ended
            if rest[0] in "*?[" and not is_node:
                return places
            alive = [(place, pattern) for place, pattern in alive if pattern[length : length + 1] == rest[0]]
        return places


def _walk_order(pattern: str) -> tuple[int, int, str]:
    """Key that sorts the patterns that match one text by when libkmod meets them."""
    wild = _WILD.search(pattern)
    if wild is None:
        return len(pattern) + 1, 0, ""
    # What begins alike but goes on is met before what ends.
    return wild.start(), "*?[".index(wild[0]), pattern[wild.start() :] + "\U0010ffff"
