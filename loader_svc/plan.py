"""What a file comes to when it is loaded, found out once for each version of the file and remembered.

Reading the headers and placing the sections of one image takes milliseconds in Python, where the kernel takes
microseconds; a storm loads one file thousands of times. So the verdict and the placement are kept for each version of a
file (device, inode, size, times of change), while every call still reads, decompresses and copies the bytes for real.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from loader_svc.checks.caller import file_failure
from loader_svc.checks.early import early_failure, signature_failure
from loader_svc.checks.linkage import Linkage
from loader_svc.image import (
    Algorithm,
    ImageError,
    ImageTooLarge,
    Layout,
    LayoutConfig,
    kernel_decompress,
    plan_layout,
    read_elf,
    strip_signature,
    user_decompress,
)
from loader_svc.memory import page_round
from loader_svc.steps import Failure
from modpressure.errors import OverLimit
from modpressure.kernel.identity import ANY, KernelIdentity
from modpressure.kernel.outcome import MODULE_INIT_IGNORE_MODVERSIONS, MODULE_INIT_IGNORE_VERMAGIC

MAX_PLANS = 8192
"""Plans that are remembered; the oldest goes first."""


class FileVersion(NamedTuple):
    """What tells one version of a file from another."""

    device: int
    inode: int
    size_bytes: int
    changed_ns: int
    status_changed_ns: int
    """Unlike the time of change nobody can set this one back (st_ctime of inode(7))."""

    @classmethod
    def of(cls, fd: int) -> FileVersion:
        """Return the version that an open file has now."""
        status = os.fstat(fd)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


Stage = Literal["read", "decompress", "check", "layout"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one version of a file, as far as the file alone decides it."""

    version: FileVersion
    is_packed: bool
    """Whether it is decompressed, by the kernel or by the caller."""

    unpacked_bytes: int = 0
    """Length after decompression, as far as that comes; of the file itself where it is plain."""

    image_bytes: int = 0
    """The same without a signature: the length that the kernel counts. 0 if it can't be decompressed."""

    module: str = ""
    """The module's name as struct module has it; empty where it can't be read."""

    layout: Layout | None = None
    linkage: Linkage | None = None
    """What it needs once its name is in the list; there whenever the layout is."""

    failed_stage: Stage | None = None
    failure: Failure | None = None

    def failure_at(self, stage: Stage) -> Failure | None:
        """Return why the file fails at a stage, or None if it passes that."""
        return self.failure if self.failed_stage == stage else None

    @property
    def layout_bytes(self) -> int:
        """Sum of the seven sizes of the layout, 0 if there is none."""
        return self.layout.total_bytes if self.layout else 0

    @property
    def peak_bytes(self) -> int:
        """Most memory that a call on it can hold: file, image and layout, each in whole pages."""
        unpacked_bytes = self.unpacked_bytes if self.is_packed else 0
        return page_round(self.version.size_bytes) + page_round(unpacked_bytes) + self.layout_bytes


class Plans:
    """Makes plans and remembers them. For use from several threads."""

    def __init__(self, image_limit_bytes: int, identity: KernelIdentity = ANY) -> None:
        """``image_limit_bytes`` is the longest file, decompressed image or layout that is taken on.

        ``identity`` is the kernel that the files are to be loaded into.
        """
        self.image_limit_bytes = image_limit_bytes
        self.identity = identity
        self._plans: OrderedDict[tuple[FileVersion, Algorithm | None, bool, int], Plan] = OrderedDict()
        # One at a time: making a plan takes memory that no budget counts, at most a file and its image.
        self._making = threading.Lock()

    def of(self, fd: int, path: str, algorithm: Algorithm | None, *, by_kernel: bool, flags: int) -> Plan:
        """Return the plan of an open file.

        ``path`` is for messages; ``algorithm`` is None for what is not decompressed; ``by_kernel`` says who does it;
        ``flags`` are the call's. OverLimit if the file, its image or its layout is longer than the limit.
        """
        ignored = flags & (MODULE_INIT_IGNORE_MODVERSIONS | MODULE_INIT_IGNORE_VERMAGIC)
        key = (FileVersion.of(fd), algorithm, by_kernel, ignored)
        plan = self._plans.get(key)
        if plan is None:
            with self._making:
                plan = self._plans.get(key) or self._make(fd, path, key[0], algorithm, by_kernel, ignored)
                self._plans[key] = plan
                if len(self._plans) > MAX_PLANS:
                    self._plans.popitem(last=False)
        if plan.layout_bytes > self.image_limit_bytes:
            raise OverLimit(
                f"{path} would take {plan.layout_bytes} bytes when laid out, the image limit is "
                f"{self.image_limit_bytes} bytes"
            )
        return plan

    def forget(self, version: FileVersion) -> None:
        """Forget what was found out about a version of a file: its content turned out to be another."""
        with self._making:
            for key in [key for key in self._plans if key[0] == version]:
                del self._plans[key]

    def _make(
        self, fd: int, path: str, version: FileVersion, algorithm: Algorithm | None, by_kernel: bool, ignored: int
    ) -> Plan:
        size_bytes = version.size_bytes
        plan = Plan(version, is_packed=algorithm is not None)
        is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        failure = file_failure(is_regular=is_regular, size_bytes=size_bytes, path=path)
        if failure:
            return _failing(plan, "read", failure)
        if size_bytes > self.image_limit_bytes:
            raise OverLimit(f"{path} has {size_bytes} bytes, the image limit is {self.image_limit_bytes} bytes")
        image = bytearray(size_bytes)
        if os.preadv(fd, [image], 0) != size_bytes:
            return _failing(plan, "read", Failure("EIO", "kread: short read", path))
        if algorithm is not None:
            decompress = kernel_decompress if by_kernel else user_decompress
            file, image = image, bytearray()
            try:
                for chunk in decompress(file, algorithm, limit_bytes=self.image_limit_bytes):
                    image += chunk
            except ImageError as error:
                plan = replace(plan, unpacked_bytes=len(image))
                return _failing(plan, "decompress", failure_of(error))
            except ImageTooLarge as error:
                raise OverLimit(
                    f"{path} decompresses to more than the image limit of {self.image_limit_bytes} bytes"
                ) from error
        try:
            return self._inspect(plan, image, ignored)
        except ImageTooLarge as error:
            raise OverLimit(f"{path}: {error}") from error

    def _inspect(self, plan: Plan, image: bytearray, ignored: int) -> Plan:
        identity = self.identity
        with memoryview(image) as whole:
            image_bytes, failure = len(image), None
            if identity.module_sig:
                image_bytes, signature = strip_signature(whole, mangled=bool(ignored))
                failure = signature_failure(signature, identity)
            plan = replace(plan, unpacked_bytes=len(image), image_bytes=image_bytes)
            if failure:
                return _failing(plan, "check", failure)
            with whole[:image_bytes] as view:
                try:
                    elf = read_elf(view, this_module_bytes=identity.this_module_bytes)
                except ImageError as error:
                    return _failing(plan, "check", failure_of(error))
                try:
                    plan = replace(plan, module=elf.this_module_name)
                    failure = early_failure(elf, identity, ignored)
                    if failure:
                        return _failing(plan, "check", failure)
                    layout = plan_layout(elf, layout_config(identity, ignored))
                    return replace(plan, layout=layout, linkage=Linkage.of(elf, layout, identity, ignored))
                except ImageError as error:
                    return _failing(plan, "layout", failure_of(error))
                finally:
                    elf.release()


def layout_config(identity: KernelIdentity, flags: int) -> LayoutConfig:
    """Return what of a kernel, and of a call's flags, changes a layout."""
    return LayoutConfig(
        kallsyms=identity.kallsyms,
        kallsyms_all=identity.kallsyms_all,
        module_unload=identity.module_unload,
        ignore_modversions=bool(flags & MODULE_INIT_IGNORE_MODVERSIONS),
        strict_rwx=identity.strict_module_rwx,
        page_bytes=identity.page_bytes,
    )


def _failing(plan: Plan, stage: Stage, failure: Failure) -> Plan:
    return replace(plan, failed_stage=stage, failure=failure)


def failure_of(error: ImageError) -> Failure:
    """Return the kernel's verdict on an image as a step's failure."""
    return Failure(error.errno, error.check, error.value)
