"""Remedies: what each makes of a boot, and how they are found by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loader_svc.boot import BootSpec, Device, Machine, ModuleConfig, Userland, simulate_boot
from loader_svc.remedies import RemedyError, applied, remedy_named, usual_remedies
from loader_svc.trees import BadModuleName, UnknownModule
from modpressure.kernel.policy import V6_3, V6_4, V6_5

CPU = Device("/devices/system/cpu/cpu{cpu}", modalias="cpu:type:x86,ven0000fam0006mod0055:feature:,0081,0085,0099")
SPEC = BootSpec(Machine("toy", 12, 16 << 30, (CPU,)), policy=V6_3)
PACKED = replace(SPEC, modules=ModuleConfig(compression="zst"), userland=Userland(kmod=30))


@pytest.mark.parametrize(
    ("name", "spec", "expected"),
    [
        ("newer-kernel", SPEC, replace(SPEC, policy=V6_5)),
        ("request-once", SPEC, replace(SPEC, userland=Userland(one_request_per_modalias=True))),
        ("libkmod-lock", SPEC, replace(SPEC, userland=Userland(locks_modules=True))),
        ("workers", SPEC, replace(SPEC, userland=Userland(udev_workers=16))),
        ("workers:3", SPEC, replace(SPEC, userland=Userland(udev_workers=3))),
        ("workers:41", SPEC, SPEC),
        ("builtin:kvm, nvme-core", SPEC, replace(SPEC, modules=ModuleConfig(builtin=frozenset({"kvm", "nvme_core"})))),
        ("blacklist:kvm", SPEC, replace(SPEC, modules=ModuleConfig(blacklist=frozenset({"kvm"})))),
        ("merge:crypto_simd", SPEC, replace(SPEC, modules=ModuleConfig(merged=(("cryptd", "crypto_simd"),)))),
        ("merge:cryptd", SPEC, SPEC),
        ("files:xz", SPEC, replace(SPEC, modules=ModuleConfig(compression="xz"))),
        ("files:plain", SPEC, SPEC),
        ("files:plain", PACKED, replace(PACKED, modules=ModuleConfig(compression=""))),
        ("kernel-decompresses", SPEC, SPEC),
        ("kernel-decompresses", PACKED, replace(PACKED, userland=Userland(kmod=30, reads_decompression=True))),
        ("libkmod-decompresses", PACKED, PACKED),
        ("newer-kernel+workers:3", SPEC, replace(SPEC, policy=V6_5, userland=Userland(udev_workers=3))),
    ],
)
def test_a_remedy_changes_what_it_says_and_nothing_else(name: str, spec: BootSpec, expected: BootSpec) -> None:
    made = applied(remedy_named(name), spec)
    assert made == expected
    assert applied(remedy_named(name), made) == made, "twice is once"


def test_each_half_of_a_newer_kernel_can_be_had_alone() -> None:
    early, shared = (applied(remedy_named(name), SPEC).policy for name in ("early-check", "shared-results"))
    assert (early.early_check, early.share_in_flight) == (True, False)
    assert (shared.early_check, shared.share_in_flight) == (False, True)
    newer = replace(SPEC, policy=V6_4)
    assert applied(remedy_named("early-check"), newer) == newer


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("prayer", RemedyError, "'prayer'"),
        ("newer-kernel:6.9", RemedyError, "'newer-kernel:6.9'"),
        ("workers:0", RemedyError, "'workers:0'"),
        ("workers:many", RemedyError, "'workers:many'"),
        ("workers:9999", Exception, "9999"),
        ("files:rar", RemedyError, "'files:rar'"),
        ("builtin", RemedyError, "'builtin'"),
        ("builtin:a/b", BadModuleName, "'a/b'"),
        ("merge:kvm,nvme", RemedyError, "'merge:kvm,nvme'"),
        ("merge:no_such_module", UnknownModule, "no_such_module"),
        ("newer-kernel+", RemedyError, "''"),
    ],
)
def test_what_is_no_remedy_is_named(name: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        applied(remedy_named(name), replace(SPEC, machine=SPEC.machine.with_cpus(4096), userland=Userland()))


def test_the_usual_ones_fit_the_boot() -> None:
    plain = {each.name for each in usual_remedies(SPEC, "kvm")}
    packed = {each.name for each in usual_remedies(PACKED, "")}
    # A blacklist keeps aliases away, not users: what the alias leads to is what has to be on it.
    assert {"builtin:kvm", "blacklist:kvm,kvm_intel", "merge:kvm", "files:zst+libkmod-decompresses"} <= plain
    assert {"files:plain", "files:xz", "kernel-decompresses", "libkmod-decompresses"} <= packed
    assert not any(name.startswith(("builtin", "blacklist")) for name in packed)
    for each in (*usual_remedies(SPEC, "kvm"), *usual_remedies(PACKED, "")):
        assert each.sentence
        assert isinstance(applied(each, SPEC), BootSpec)


def test_remedies_keep_what_they_promise() -> None:
    base = simulate_boot(SPEC, 1)
    assert base.duplicates > 0
    assert simulate_boot(applied(remedy_named("request-once"), SPEC), 1).duplicates == 0
    assert simulate_boot(applied(remedy_named("libkmod-lock"), SPEC), 1).duplicates == 0
    without = simulate_boot(applied(remedy_named("blacklist:kvm_intel"), SPEC), 1)
    assert set(base.loaded) - set(without.loaded) == {"kvm", "kvm_intel", "irqbypass"}
    builtin = simulate_boot(applied(remedy_named("builtin:kvm"), SPEC), 1)
    assert "kvm" not in builtin.loaded
    assert "kvm_intel" in builtin.loaded
