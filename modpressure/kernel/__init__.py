"""What both services must agree on, pure: policies, outcomes, byte rules, counters, reports, state machines.

Nothing here does I/O, knows a protocol or imports a service. ``stats_svc`` runs the state machines live and durably; a
simulation in virtual time runs the same ones locally.
"""
