"""What can go wrong with the catalogue."""

from __future__ import annotations

from loader_svc.trees.errors import TreeError
from modpressure.errors import Unavailable


class CatalogueError(TreeError, Unavailable):
    """The catalogue's facts can't be read, or its files can't be built where they should be."""
