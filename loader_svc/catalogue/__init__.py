"""A catalogue of kernel modules for machines that have none: facts of Debian's, and files built from them.

The facts say how long a module's file is, how it lies in memory, what it wants and gives. The files have those layouts
and lengths, load under a kernel of their own, and contain no code. ``docs/catalogue.md`` tells what is in it.
"""

from collections.abc import Mapping

from loader_svc.catalogue.build import IDENTITY, catalogue_tree
from loader_svc.catalogue.errors import CatalogueError
from loader_svc.catalogue.identity import Identity
from loader_svc.catalogue.module_facts import ModuleFacts
from loader_svc.catalogue.packed import catalogue
from loader_svc.catalogue.packing import Variant
from modpressure.kernel.identity import KernelIdentity

__all__ = [
    "IDENTITY",
    "CatalogueError",
    "ModuleFacts",
    "Variant",
    "catalogue_identity",
    "catalogue_modules",
    "catalogue_tree",
]


def catalogue_modules() -> Mapping[str, ModuleFacts]:
    """Return facts by module name, parsed when asked for. Raises `CatalogueError` if they are not installed."""
    return catalogue()


def catalogue_identity() -> KernelIdentity:
    """Return the kernel under which all modules of the catalogue load, with the symbols that it exports itself."""
    facts = catalogue()
    return Identity(facts.kernel, facts).kernel_identity()
