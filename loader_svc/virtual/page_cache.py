"""Files that a simulated machine has read from its disk once: from then on they are in its page cache."""

from __future__ import annotations

from loader_svc.virtual.costs import Costs
from loader_svc.virtual.files import VirtualFile


class PageCache:
    """When each file is, or will be, in the page cache."""

    __slots__ = ("_cached_at_ns", "_costs", "is_cold")

    def __init__(self, costs: Costs) -> None:
        """Begin with nothing in the cache, if the costs say that first reads go to the disk."""
        self._costs = costs
        self.is_cold = costs.first_read_from_disk
        """Whether the first read of each file goes to the disk."""
        self._cached_at_ns: dict[VirtualFile, int] = {}

    def cached_at_ns(self, file: VirtualFile, size_bytes: int, now_ns: int) -> int:
        """Return when a file is in the cache: who is the first to ask reads it from the disk from now on."""
        at_ns = self._cached_at_ns.get(file)
        if at_ns is None:
            costs = self._costs
            at_ns = now_ns + costs.read_disk_ns + int(costs.read_disk_ns_per_byte * size_bytes)
            self._cached_at_ns[file] = at_ns
        return at_ns
