"""The facts as they are installed: one compressed text, read once and parsed module by module as asked for."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources

from loader_svc.catalogue.errors import CatalogueError
from loader_svc.catalogue.facts_text import FactsError, parse_kernel, parse_module
from loader_svc.catalogue.module_facts import KernelFacts, ModuleFacts

FILE = "catalogue.txt.xz"
_SEPARATOR = "\nmodule "


class Catalogue(Mapping[str, ModuleFacts]):
    """Facts of all modules by name, and of the kernel that they belong to. Parsed when first asked for."""

    def __init__(self, text: str) -> None:
        """Take the concatenated texts: the kernel's first. `CatalogueError` if it is no such text."""
        kernel, *modules = text.split(_SEPARATOR)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        """Differs whenever a fact does."""
        try:
            self.kernel: KernelFacts = parse_kernel(kernel)
        except FactsError as error:
            raise CatalogueError(str(error)) from error
        self._texts = {module.partition("\n")[0]: "module " + module for module in modules}
        self._parsed: dict[str, ModuleFacts] = {}

    def __getitem__(self, name: str) -> ModuleFacts:
        if name not in self._parsed:
            try:
                self._parsed[name] = parse_module(self._texts[name])
            except FactsError as error:
                raise CatalogueError(str(error)) from error
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


@cache
def catalogue() -> Catalogue:
    """Read the installed catalogue. `CatalogueError` if the build left it out."""
    try:
        packed = (resources.files("loader_svc.catalogue") / FILE).read_bytes()
        return Catalogue(lzma.decompress(packed).decode("ascii"))
    except FileNotFoundError:
        raise CatalogueError(
            f"loader_svc/catalogue/{FILE} is missing: the package was not built (python hatch_build.py makes it)"
        ) from None
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise CatalogueError(f"loader_svc/catalogue/{FILE} can't be read: {error}") from error
