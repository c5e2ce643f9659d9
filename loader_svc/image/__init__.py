"""Module images: reading, unpacking and laying out a `.ko` as the kernel does, without any of the kernel.

Everything here is synchronous and pure: buffers in, facts out, `ImageProblem` where the kernel or a limit says no.

- `elf`: which images are well-formed, in the kernel's own order of checks;
- `signature`: the trailer of signed modules;
- `layout`: the seven memory sizes and where every section goes;
- `compression`: the kernel's three decompressors, and the caller's;
- `describe`: all of the above about one file.
"""

from loader_svc.image.compression import (
    Algorithm,
    algorithm_of,
    declared_image_bytes,
    kernel_decompress,
    kernel_workspace_bytes,
    user_decompress,
)
from loader_svc.image.describe import ImageFacts, describe
from loader_svc.image.elf import ElfImage, SectionHeader, read_elf
from loader_svc.image.errors import ImageError, ImageProblem, ImageTooLarge
from loader_svc.image.layout import Layout, LayoutConfig, MemoryType, Placement, plan_layout
from loader_svc.image.signature import SignatureVerdict, strip_signature

__all__ = [
    "Algorithm",
    "ElfImage",
    "ImageError",
    "ImageFacts",
    "ImageProblem",
    "ImageTooLarge",
    "Layout",
    "LayoutConfig",
    "MemoryType",
    "Placement",
    "SectionHeader",
    "SignatureVerdict",
    "algorithm_of",
    "declared_image_bytes",
    "describe",
    "kernel_decompress",
    "kernel_workspace_bytes",
    "plan_layout",
    "read_elf",
    "strip_signature",
    "user_decompress",
]
