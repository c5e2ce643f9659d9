"""The checks between the ELF validity and the duplicate check, and the signature policy before them.

Sources, all in kernel/module/ of Linux 6.12: ``module_sig_check`` in signing.c; ``early_mod_check``, ``blacklisted``,
``check_modinfo``, ``check_modinfo_livepatch`` in main.c; ``check_modstruct_version``, ``same_magic`` in version.c.
"""

from __future__ import annotations

from loader_svc.checks.versions import Versions
from loader_svc.image import ElfImage, SignatureVerdict
from loader_svc.steps import Failure
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import MODULE_INIT_IGNORE_VERMAGIC


def signature_failure(verdict: SignatureVerdict, identity: KernelIdentity) -> Failure | None:
    """Return why a signature, or none, keeps a module out; for kernels with MODULE_SIG=y."""
    if verdict.errno:
        return Failure(verdict.errno, verdict.check, verdict.value)
    is_trusted = verdict.kind == "unknown key" and identity.trust_signatures
    if identity.module_sig_force and not is_trusted:
        return Failure("EKEYREJECTED", "signature: required", verdict.kind)
    return None


def early_failure(elf: ElfImage, identity: KernelIdentity, flags: int) -> Failure | None:
    """Return the first of these checks that a valid image does not pass; None if it passes all."""
    versions = Versions.of(elf, identity, flags)
    return (
        blacklist_failure(elf, identity)
        or modversions_failure(versions, identity)
        or vermagic_failure(elf, identity, versions, flags)
        or livepatch_failure(elf, identity)
    )


def blacklist_failure(elf: ElfImage, identity: KernelIdentity) -> Failure | None:
    """Look modinfo's name up in ``module_blacklist=``."""
    return Failure("EPERM", "blacklist", elf.info_name) if elf.info_name in identity.blacklist else None


def modversions_failure(versions: Versions, identity: KernelIdentity) -> Failure | None:
    """Compare the version of ``module_layout``, which stands for that of struct module."""
    if not identity.modversions:
        return None
    own = (identity.symbols or {}).get("module_layout")
    if own is None and identity.symbols is not None:
        return None
    # Without symbols the kernel's own version is not known and any will do, but there has to be one.
    failure = versions.failure("module_layout", own.crc if own else versions.of_layout)
    return failure and Failure("ENOEXEC", "modversions", failure.value)


def vermagic_failure(elf: ElfImage, identity: KernelIdentity, versions: Versions, flags: int) -> Failure | None:
    """Compare vermagic as a text: all of it, or, where the symbols have versions, all but the release."""
    magic = None if flags & MODULE_INIT_IGNORE_VERMAGIC else elf.vermagic
    if magic is None:
        return None if identity.module_force_load else Failure("ENOEXEC", "vermagic", "none")
    expected = identity.vermagic
    if expected is None:
        return None
    own = magic
    if versions.has_table or not identity.release:
        own = _without_release(magic)
        expected = _without_release(expected) if identity.release else f" {expected}"
    return None if own == expected else Failure("ENOEXEC", "vermagic", magic)


def _without_release(magic: str) -> str:
    """Return what follows the first word, the blank before it included."""
    _, blank, rest = magic.partition(" ")
    return blank + rest


def livepatch_failure(elf: ElfImage, identity: KernelIdentity) -> Failure | None:
    """Refuse a module that patches the kernel, in one that can't be patched."""
    if elf.is_livepatch and not identity.livepatch:
        return Failure("ENOEXEC", "livepatch", elf.modinfo.get("livepatch") or "")
    return None
