"""Kernel identities in files: the built-in ones, a user's own text, or made from a kernel's ``/boot/config-*``."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import IO, Final

import zstandard

from modpressure.errors import BadRequest, NotFound
from modpressure.kernel.identity import ANY, ExportedSymbol, KernelIdentity
from modpressure.kernel.identity_text import IdentityError, identity_of_config, parse_identity, render_identity
from modpressure.kernel.symvers import SymversError, parse_symvers, render_symvers

PACKAGED: Final = ("debian-12", "debian-13", "measured-6.12")
"""Identities that come as files of the package, for the sake of their many symbols; read when first asked for."""

_PACKAGE: Final = "modpressure.identities"
_LONGEST_BYTES: Final = 64 << 20
_RELEASE: Final = re.compile(r"config-(\d+\.\S+)")

_OPENERS: Final[dict[str, Callable[[IO[bytes]], IO[bytes]]]] = {
    ".xz": lzma.LZMAFile,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),  # type: ignore[dict-item,return-value]
    ".zst": lambda file: zstandard.ZstdDecompressor().stream_reader(file),
}


def identity_names() -> list[str]:
    """List the names of the built-in identities."""
    return [ANY.name, *PACKAGED]


def load_identity(name_or_path: str) -> KernelIdentity:
    """Return a built-in identity by its name, or the one that a text file describes.

    NotFound if there is neither, BadRequest for a text that can't be understood.
    """
    if name_or_path in identity_names():
        return _built_in(name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        raise NotFound(
            f"there is no kernel identity {name_or_path!r}, built in ({', '.join(identity_names())}) or as a file",
            field="identity",
        )
    try:
        identity, symvers = parse_identity(_text(path), base_named=_built_in)
    except IdentityError as error:
        raise BadRequest(f"{path}: {error}", field="identity") from None
    return replace(identity, symbols=read_symvers(path.parent / symvers)) if symvers else identity


@cache
def _built_in(name: str) -> KernelIdentity:
    """Return a built-in identity. IdentityError if there is none of that name."""
    if name == ANY.name:
        return ANY
    if name not in PACKAGED:
        raise IdentityError(f"there is no kernel identity {name!r}; there are {', '.join(identity_names())}")
    folder = resources.files(_PACKAGE)
    identity, symvers = parse_identity((folder / f"{name}.toml").read_text())
    return replace(identity, symbols=parse_symvers((folder / symvers).read_text().splitlines()))


def read_symvers(path: Path) -> dict[str, ExportedSymbol]:
    """Return what the kernel itself exports by a Module.symvers, plain or packed (.gz, .xz, .zst).

    NotFound if there is no such file, BadRequest if it can't be understood.
    """
    try:
        return parse_symvers(_text(path).splitlines())
    except SymversError as error:
        raise BadRequest(f"{path}: {error}", field="symvers") from None


def identity_from(
    config: Path,
    symvers: Path | None = None,
    *,
    release: str = "",
    name: str = "",
    blacklist: frozenset[str] = frozenset(),
) -> KernelIdentity:
    """Make the identity of a kernel from its ``/boot/config-RELEASE`` and its Module.symvers.

    The release is taken from the file's name where it is not given. NotFound, BadRequest.
    """
    named = _RELEASE.fullmatch(config.name)
    release = release or (named[1] if named else "")
    try:
        identity = identity_of_config(_text(config).splitlines(), release=release, name=name)
    except IdentityError as error:
        raise BadRequest(f"{config}: {error}", field="config") from None
    symbols = read_symvers(symvers) if symvers is not None else None
    return replace(identity, blacklist=blacklist, symbols=symbols)


def save_identity(identity: KernelIdentity, path: Path) -> None:
    """Write the text of an identity, and beside it its symbols; each file appears whole or not at all. BadRequest."""
    if path.is_dir():
        raise BadRequest(f"{str(path)!r} is a directory, not a file to write", field="output")
    symvers = ""
    try:
        if identity.symbols is not None:
            symvers = f"{path.name if path.suffix == '.symvers' else path.stem}.symvers"
            _write(path.with_name(symvers), render_symvers(identity.symbols))
        _write(path, render_identity(identity, symvers=symvers))
    except OSError as error:
        raise BadRequest(f"{str(path)!r} can't be written: {error.strerror or error}", field="output") from None


def _write(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            opener = _OPENERS.get(path.suffix)
            content = (opener(file) if opener else file).read(_LONGEST_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise BadRequest(f"{str(path)!r} can't be read: {error.strerror or error}") from None
    except (EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise BadRequest(f"{str(path)!r} can't be unpacked: {error}") from None
    if len(content) > _LONGEST_BYTES:
        raise BadRequest(f"{str(path)!r} is longer than {_LONGEST_BYTES} bytes")
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except UnicodeDecodeError:
        raise BadRequest(f"{str(path)!r} is no text") from None
