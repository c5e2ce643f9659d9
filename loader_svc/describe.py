"""One module of a tree, described for people: what ``modules info`` shows."""

from __future__ import annotations

import os

from loader_svc.image import ImageError, ImageTooLarge, Layout, MemoryType, describe
from loader_svc.trees import ModuleTree
from modpressure.v1 import loader_service_pb2 as pb


def describe_module(tree: ModuleTree, text: str, limit_bytes: int) -> pb.Module:
    """Return what is known of the module that a name or alias stands for, its file read up to ``limit_bytes``.

    NotFound, BadRequest, Forbidden as the tree has it. A file that can't be loaded is described all the same.
    """
    entry = tree.module(tree.resolve_alias(text)[-1])
    softdeps = tree.softdeps(entry.name)
    module = pb.Module(
        name=entry.name,
        file=entry.path,
        compression=entry.compression,
        file_bytes=entry.size_bytes or 0,
        depends=tree.depends(entry.name),
        softdeps_pre=softdeps.pre,
        softdeps_post=softdeps.post,
        aliases=tree.aliases(entry.name),
        load_order=tree.show_depends(entry.name),
    )
    fd = tree.open_file(entry.name)
    try:
        if os.fstat(fd).st_size > limit_bytes:
            raise ImageTooLarge(entry.path, limit_bytes)
        with os.fdopen(fd, "rb", closefd=False) as file:
            facts = describe(file.read(), name=entry.path, limit_bytes=limit_bytes)
    except (ImageError, ImageTooLarge) as problem:
        module.problem = str(problem)
        return module
    finally:
        os.close(fd)
    module.image_bytes = facts.image_bytes
    module.license = facts.license or ""
    module.vermagic = facts.vermagic or ""
    module.description = next((value for key, value in facts.modinfo if key == "description"), "")
    module.parameters.extend(f"{p.name}:{p.description}" if p.description else p.name for p in facts.parameters)
    if facts.problem is not None:
        module.problem = str(facts.problem)
    if facts.layout is not None:
        module.layout.CopyFrom(_layout(facts.layout))
    return module


def _layout(layout: Layout) -> pb.Layout:
    sizes = {f"{memory_type.name.lower()}_bytes": layout.rounded[memory_type] for memory_type in MemoryType}
    return pb.Layout(total_bytes=layout.total_bytes, **sizes)
