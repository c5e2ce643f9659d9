"""Small module trees with the indexes as a test wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class SmallTree:
    """A `/lib/modules/RELEASE` of a test's own making; `write` puts it on the disk."""

    root: Path
    make_module: Callable[..., Any]
    depends: dict[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: list[tuple[str, str]] = field(default_factory=list)
    softdeps: list[str] = field(default_factory=list)
    builtin: tuple[str, ...] = ()
    sections: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """What single modules have besides what all have."""

    def add(self, name: str, *needs: str, aliases: Iterable[str] = ()) -> None:
        """Add a module; ``needs`` is its line of modules.dep, from left to right."""
        self.depends[name] = needs
        self.aliases += [(alias, name) for alias in aliases]

    def write(self, pack: Mapping[str, tuple[str, Callable[[bytes], bytes]]] | None = None) -> Path:
        """Write files and indexes; ``pack`` gives the suffix and the packer of modules that are packed."""
        self.root.mkdir(parents=True, exist_ok=True)
        files = {}
        for name in self.depends:
            suffix, packer = (pack or {}).get(name, ("", bytes))
            files[name] = f"{name}.ko{suffix}"
            (self.root / files[name]).write_bytes(packer(self.make_module(name, *self.sections.get(name, ())).bytes()))
        self._text(
            "dep", (f"{files[name]}:{''.join(' ' + files[n] for n in needs)}" for name, needs in self.depends.items())
        )
        self._text("alias", (f"alias {alias} {name}" for alias, name in self.aliases))
        self._text("softdep", (f"softdep {line}" for line in self.softdeps))
        self._text("symbols", ())
        self._text("builtin", (f"kernel/{name}.ko" for name in self.builtin))
        return self.root

    def _text(self, what: str, lines: Iterable[str]) -> None:
        (self.root / f"modules.{what}").write_text("".join(f"{line}\n" for line in lines))
