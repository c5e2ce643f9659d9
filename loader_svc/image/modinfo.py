"""The `.modinfo` section: NUL-separated `tag=value` strings (kernel/module/main.c get_modinfo, Linux 6.12)."""

from typing import Final, NamedTuple

UNTERMINATED_BYTES: Final = 4096
"""How far the last string may run past its section when nothing ends it (the kernel's own reading has no bound)."""


ARRAY_PREFIX: Final = "array of "
"""What the type of an array begins with; the type of its elements follows."""


class Parameter(NamedTuple):
    """One parameter a module declares; either text may be empty."""

    name: str
    type: str
    description: str
    most: int | None = None
    """How many elements an array takes, or bytes, its NUL included, a string; None for all else, or if unknown."""

    @property
    def is_limited(self) -> bool:
        """Whether the module says how much of it there may be."""
        return self.type == "string" or self.type.startswith(ARRAY_PREFIX)


def text(raw: bytes) -> str:
    """Return bytes as text; what is not UTF-8 appears as backslash escapes, so any text can be sent on."""
    return raw.decode("utf-8", "backslashreplace")


class Modinfo:
    """The strings of one `.modinfo`, in file order.

    Made from the section's bytes, which the reader has already extended to the NUL that ends the last string.
    """

    def __init__(self, section: bytes) -> None:
        self._section = section
        self._strings: list[bytes] | None = None
        self._tags: dict[str, list[str]] | None = None

    @property
    def strings(self) -> list[bytes]:
        """Every string, as bytes; empty ones (padding) are left out as the kernel leaves them out."""
        if self._strings is None:
            self._strings = [s for s in self._section.split(b"\0") if s]
        return self._strings

    def raw(self, tag: bytes) -> bytes | None:
        """Return the first value of a tag as the kernel would read it, or None."""
        wanted = tag + b"="
        # Most callers want one of the first few of many strings (aliases come in thousands): no split.
        section = self._section
        if section.startswith(wanted):
            start = 0
        else:
            at = section.find(b"\0" + wanted)
            if at < 0:
                return None
            start = at + 1
        start += len(wanted)
        end = section.find(b"\0", start)
        return section[start : end if end >= 0 else len(section)]

    def get(self, tag: str) -> str | None:
        """Return the first value of a tag as text, or None."""
        raw = self.raw(tag.encode())
        return None if raw is None else text(raw)

    @property
    def tags(self) -> dict[str, list[str]]:
        """All values of all tags, both in file order; a string without `=` is a tag with an empty value."""
        if self._tags is None:
            tags: dict[str, list[str]] = {}
            for string in self.strings:
                tag, _, value = string.partition(b"=")
                tags.setdefault(text(tag), []).append(text(value))
            self._tags = tags
        return self._tags

    def all(self, tag: str) -> tuple[str, ...]:
        """Return every value of a tag as text, in file order."""
        return tuple(self.tags.get(tag, ()))

    @property
    def depends(self) -> tuple[str, ...]:
        """The modules that `depends=` names, in its order."""
        return tuple(name for value in self.all("depends") for name in value.split(",") if name)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What `parmtype=` and `parm=` declare, by first mention.

        A description may continue the name after a colon; a type may follow in parentheses in old modules and is then
        part of the description, as modinfo(8) has it.
        """
        types = self._by_name("parmtype")
        descriptions = self._by_name("parm")
        return tuple(
            Parameter(name, types.get(name, ""), descriptions.get(name, "")) for name in {**types, **descriptions}
        )

    def _by_name(self, tag: str) -> dict[str, str]:
        """Return what follows the first colon of a tag's values by what precedes it; the first of a name counts."""
        values: dict[str, str] = {}
        for value in self.all(tag):
            name, _, rest = value.partition(":")
            values.setdefault(name, rest)
        return values
