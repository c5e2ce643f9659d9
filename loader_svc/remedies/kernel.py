"""Remedies in the kernel."""

from __future__ import annotations

from dataclasses import replace

from loader_svc.boot import BootSpec
from modpressure.kernel.policy import V6_5


class NewerKernel:
    """A kernel that has both the early check and shared results (Linux 6.5)."""

    name = "newer-kernel"
    sentence = "a kernel of 6.5 or later: it looks early, and calls in flight share one result"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot on that kernel."""
        return replace(spec, policy=V6_5)


class EarlyCheck:
    """The early check alone (Linux 6.4)."""

    name = "early-check"
    sentence = "the kernel looks for the name before it allocates the layout"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot on the same kernel with the early check."""
        if spec.policy.early_check:
            return spec
        policy = replace(spec.policy, name=f"{spec.policy.name} with the early check", early_check=True)
        return replace(spec, policy=policy)


class SharedResults:
    """Shared results alone (Linux 6.5 has them on top of the early check)."""

    name = "shared-results"
    sentence = "calls in flight on one file take the result of the first"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot on the same kernel with shared results."""
        if spec.policy.share_in_flight:
            return spec
        policy = replace(spec.policy, name=f"{spec.policy.name} with shared results", share_in_flight=True)
        return replace(spec, policy=policy)


class BuiltIn:
    """Modules that are part of the kernel itself."""

    def __init__(self, *modules: str) -> None:
        self.modules = modules
        self.name = f"builtin:{','.join(modules)}"
        self.sentence = f"{' and '.join(modules)} built into the kernel"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot of a kernel that has the modules built in."""
        return replace(spec, modules=replace(spec.modules, builtin=spec.modules.builtin | {*self.modules}))
