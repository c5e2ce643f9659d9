"""The names that tables of measurements give their kernels, and what they stand for.

``A`` behaves as policy ``v6.5``, ``B`` as ``v6.4``, ``C`` as ``v6.3``; the policies' own names will do as well. A
suffix ``-gzip``, ``-xz`` or ``-zstd`` says what the kernel decompresses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from modpressure.errors import BadRequest
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.policy import POLICIES, V6_3, V6_4, V6_5, Policy

LETTERS: Final[dict[str, Policy]] = {"A": V6_5, "B": V6_4, "C": V6_3}

ALGORITHMS: Final = ("gzip", "xz", "zstd")


def policy_of(kernel: str) -> Policy:
    """Return how a kernel behaves. BadRequest if the name says nothing."""
    name = kernel.partition("-")[0]
    policy = LETTERS.get(name) or POLICIES.get(name)
    if policy is None:
        names = ", ".join([*LETTERS, *POLICIES])
        raise BadRequest(f"there is no kernel {kernel!r}; there are {names}, with -gzip, -xz or -zstd after it or not")
    return policy


def identity_of(kernel: str, identity: KernelIdentity) -> KernelIdentity:
    """Return ``identity`` with the decompressor that a kernel's name says. BadRequest for an unknown one."""
    algorithm = kernel.partition("-")[2]
    if not algorithm:
        return identity
    if algorithm not in ALGORITHMS:
        raise BadRequest(f"kernel {kernel!r}: there is no decompressor {algorithm!r}; there are gzip, xz, zstd")
    return replace(identity, decompressors=(algorithm,))
