"""Everything about one module file in one frozen record: what `modules info` shows, and what planning a load needs."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from loader_svc.image.buffers import Buffer, byte_view
from loader_svc.image.compression import Algorithm, algorithm_of, user_decompress
from loader_svc.image.elf import ElfImage, read_elf
from loader_svc.image.errors import ImageError, ImageProblem, ImageTooLarge
from loader_svc.image.layout import DEBIAN, Layout, LayoutConfig, plan_layout
from loader_svc.image.modinfo import Parameter
from loader_svc.image.signature import strip_signature
from loader_svc.image.symbols import Export, Import

DEFAULT_LIMIT_BYTES = 1 << 28
"""Largest file, and largest image, that is looked into unless told otherwise (256 MiB; real modules stay below 20)."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What a module file is. `problem` says why it would not load; then all that could not be read is empty.

    `name` is the one inside struct module, `info_name` modinfo's `name=` (the same in every file of a real build).
    `file_bytes` is the file as it lies there, `image_bytes` what is left of it unpacked, `signature_bytes` of that
    are not part of the ELF image.
    """

    name: str = ""
    info_name: str = ""
    file_bytes: int = 0
    image_bytes: int = 0
    signature_bytes: int = 0
    compression: Algorithm | None = None
    layout: Layout | None = None
    problem: ImageProblem | None = None
    vermagic: str | None = None
    is_livepatch: bool = False
    this_module_bytes: int = 0
    modinfo: tuple[tuple[str, str], ...] = ()
    license: str | None = None
    depends: tuple[str, ...] = ()
    softdeps: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    import_ns: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    imports: tuple[Import, ...] = ()
    exports: tuple[Export, ...] = ()


def describe(
    source: Path | Buffer,
    *,
    name: str = "",
    config: LayoutConfig = DEBIAN,
    this_module_bytes: int | None = None,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
) -> ImageFacts:
    """Return the facts of a module file, given as a path or as its content (then `name` may tell its file name).

    A broken module is described, too: `problem` is set and nothing raised. OSError if the path cannot be read,
    ImageError EINVAL, check `kread`, if it is no regular file or empty, ImageTooLarge if longer than `limit_bytes`.
    """
    content = _read(source, limit_bytes) if isinstance(source, Path) else byte_view(source)
    file_name = name or (source.name if isinstance(source, Path) else "")
    algorithm = algorithm_of(file_name, content[:6])
    image: Buffer = content
    try:
        if algorithm is not None:
            # Never twice as many bytes at once, as a join would have.
            image = bytearray()
            for chunk in user_decompress(content, algorithm, limit_bytes=limit_bytes):
                image += chunk
    except ImageProblem as problem:
        return ImageFacts(file_bytes=len(content), compression=algorithm, problem=problem)
    length, verdict = strip_signature(image)
    try:
        if verdict.errno:
            raise ImageError(verdict.errno, verdict.check, verdict.value, "malformed signature")
        elf = read_elf(byte_view(image)[:length], this_module_bytes=this_module_bytes)
        return _facts(elf, len(content), len(image), algorithm, config)
    except ImageProblem as problem:
        return ImageFacts(
            file_bytes=len(content),
            image_bytes=len(image),
            signature_bytes=len(image) - length,
            compression=algorithm,
            problem=problem,
        )


def _facts(
    elf: ElfImage, file_bytes: int, image_bytes: int, algorithm: Algorithm | None, config: LayoutConfig
) -> ImageFacts:
    layout: Layout | None = None
    problem: ImageProblem | None = None
    try:
        layout = plan_layout(elf, config)
    except ImageError as error:
        problem = error
    return ImageFacts(
        name=elf.this_module_name,
        info_name=elf.info_name,
        file_bytes=file_bytes,
        image_bytes=image_bytes,
        signature_bytes=image_bytes - elf.image_bytes,
        compression=algorithm,
        layout=layout,
        problem=problem,
        vermagic=elf.vermagic,
        is_livepatch=elf.is_livepatch,
        this_module_bytes=elf.this_module_bytes,
        modinfo=tuple((tag, value) for tag, values in elf.modinfo.tags.items() for value in values),
        license=elf.license,
        depends=elf.depends,
        softdeps=elf.softdeps,
        aliases=elf.aliases,
        import_ns=elf.import_ns,
        parameters=elf.parameters,
        imports=elf.imports,
        exports=elf.exports,
    )


def _read(path: Path, limit_bytes: int) -> memoryview:
    """Read a regular file as finit_module would; a FIFO is opened without waiting for its other end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("EINVAL", "kread", path, "not a regular file")
        if status.st_size <= 0:
            raise ImageError("EINVAL", "kread", path, "the file is empty")
        if status.st_size > limit_bytes:
            raise ImageTooLarge(f"the file {path}", limit_bytes)
        with open(descriptor, "rb", closefd=False) as file:
            return memoryview(file.read(status.st_size))
    finally:
        os.close(descriptor)
