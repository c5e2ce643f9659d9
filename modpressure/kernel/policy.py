"""What a kernel version does about duplicates: a small set of switches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """The switches in which kernel versions differ, as far as duplicates go."""

    name: str
    """The version that introduced this behaviour, such as ``v6.4``."""

    early_check: bool
    """Look for the name before the layout is allocated (kernel/module/main.c, ``early_mod_check``, Linux 6.4)."""

    share_in_flight: bool
    """Calls in flight on one inode take the first one's result (``idempotent_init_module``, Linux 6.5)."""


V6_3 = Policy("v6.3", early_check=False, share_in_flight=False)
V6_4 = Policy("v6.4", early_check=True, share_in_flight=False)
V6_5 = Policy("v6.5", early_check=True, share_in_flight=True)

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (V6_3, V6_4, V6_5)}
DEFAULT_POLICY = V6_4
"""Both kinds of failure show, early and late: what a new system does until its creator says otherwise."""


def policy_named(name: str) -> Policy:
    """Return the policy called ``name``; ValueError names the ones that there are."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}") from None
