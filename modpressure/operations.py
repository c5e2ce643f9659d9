"""What an operation of the ledger's stream means for the call that asks it, as loader_svc and stats_svc both see it."""

from __future__ import annotations

from typing import Final

STEPS: Final = frozenset(
    {"enter_gate", "check_name", "reserve_name", "form_module", "await_init", "find_symbols", "allocate_memory"}
)
"""What a call asks on its way (fields of ``Operation``): from then on it is in flight, until its ``finish_call``."""
