"""Comparing the simulation with what a real kernel was measured to do, row by row.

Each kind of measurement has a module of its own: ``layout``, ``failures``, ``waits``, ``storms``, ``stress``,
``stats``. All return an ``Agreement``: how many rows there were, how many agree, and a line for each that does not.
"""

from loader_svc.verify.agreement import Agreement
from loader_svc.verify.failures import verify_failures
from loader_svc.verify.layout import verify_layout
from loader_svc.verify.stats import verify_stats
from loader_svc.verify.storms import verify_storms
from loader_svc.verify.stress import verify_stress
from loader_svc.verify.waits import verify_waits

__all__ = [
    "Agreement",
    "verify_failures",
    "verify_layout",
    "verify_stats",
    "verify_storms",
    "verify_stress",
    "verify_waits",
]
