"""What might be done about waste, and what a boot becomes with it."""

from __future__ import annotations

from loader_svc.remedies.registry import own_remedies, remedy_named, usual_remedies
from loader_svc.remedies.remedy import Remedy, RemedyError, applied

__all__ = ["Remedy", "RemedyError", "applied", "own_remedies", "remedy_named", "usual_remedies"]
