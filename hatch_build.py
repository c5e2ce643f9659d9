"""Build what git does not hold: the gRPC stubs, and the packed catalogue of module facts.

Runs inside every build (wheel, sdist and editable install) as hatchling's custom hook, and by hand as
``python hatch_build.py`` after a change of a ``.proto`` file or of the catalogue's facts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run by hand without the build backend
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parent
PROTO_ROOT = ROOT / "protos"


def build_stubs(root: Path = ROOT) -> list[Path]:
    """Generate ``modpressure/v1/*_pb2*.py`` and their ``.pyi`` files; return the proto files read."""
    from grpc_tools import protoc

    protos = sorted(PROTO_ROOT.rglob("*.proto"))
    # The plug-ins of mypy-protobuf are scripts; an isolated build has them beside its interpreter, not on PATH.
    scripts = Path(sys.executable).parent
    plugins = [
        f"--plugin={name}={path}"
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
        if (path := scripts / name).exists()
    ]
    import importlib.resources

    well_known = importlib.resources.files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"-I{PROTO_ROOT}",
        f"-I{well_known}",
        *plugins,
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        f"--mypy_out=quiet:{root}",
        f"--mypy_grpc_out=quiet:{root}",
        *map(str, protos),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed on the files under protos/, see its message above")
    package = root / "modpressure" / "v1"
    (package / "__init__.py").write_text('"""Stubs of the gRPC contract, built from protos/modpressure/v1."""\n')
    return protos


def pack_catalogue(root: Path = ROOT) -> Path:
    """Pack the texts under ``loader_svc/catalogue/facts`` into the one file that is installed; return it.

    The same texts give the same bytes: the kernel's comes first, the modules' follow by name.
    """
    import lzma

    folder = root / "loader_svc" / "catalogue"
    facts = [folder / "facts" / "kernel.txt"]
    facts += sorted(path for path in (folder / "facts").glob("*.txt") if path != facts[0])
    text = "".join(path.read_text(encoding="ascii") for path in facts)
    packed = folder / "catalogue.txt.xz"
    part = packed.with_suffix(".part")
    part.write_bytes(lzma.compress(text.encode("ascii"), preset=9))
    part.replace(packed)
    return packed


class StubsBuildHook(BuildHookInterface):  # type: ignore[misc,valid-type]
    """Hatchling's hook: build before files are collected."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the generated files in place."""
        build_stubs()
        pack_catalogue()


if __name__ == "__main__":
    sys.stdout.write("".join(f"{path.relative_to(ROOT)}\n" for path in (*build_stubs(), pack_catalogue())))
