"""Mutations of real modules: a kernel's errno or a clear refusal each, nothing else, whatever was damaged."""

import contextlib
import gzip
import lzma
import struct

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader_svc.image import (
    ImageFacts,
    ImageProblem,
    LayoutConfig,
    declared_image_bytes,
    describe,
    kernel_decompress,
    kernel_workspace_bytes,
    plan_layout,
    read_elf,
    strip_signature,
    user_decompress,
)

LIMIT_BYTES = 1 << 25
# Derandomized: the same examples on every machine; the number is what a few seconds allow.
mutations = settings(
    max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
HEADER_FIELDS = [("<H", at) for at in (16, 18, 58, 60, 62)] + [("<Q", 40)]
SECTION_FIELDS = [
    ("<I", 0),
    ("<I", 4),
    ("<Q", 8),
    ("<Q", 16),
    ("<Q", 24),
    ("<Q", 32),
    ("<I", 40),
    ("<I", 44),
    ("<Q", 48),
]
SYMBOL_FIELDS = [("<I", 0), ("<B", 4), ("<H", 6), ("<Q", 8)]
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]),
    st.integers(0, 200_000),
    st.integers(0, (1 << 64) - 1),
)
KINDS = st.sampled_from(["header", "section", "symbol", "bit", "text"])


@pytest.fixture(scope="session")
def seeds(golden_modules):
    """A few small real modules: plain, with exports, per-CPU data, a livepatch."""
    chosen = [path for path in golden_modules if path.parent.name == "extra"]
    chosen += sorted(golden_modules, key=lambda path: path.stat().st_size)[:4]
    return [path.read_bytes() for path in chosen]


def mutate(image, changes):
    """Return an image with some fields overwritten; positions and values are taken modulo what there is."""
    damaged = bytearray(image)
    table = int.from_bytes(image[40:48], "little")
    sections = int.from_bytes(image[60:62], "little")
    symbols = next(
        int.from_bytes(image[at + 24 : at + 32], "little")
        for at in range(table, table + 64 * sections, 64)
        if image[at + 4] == 2
    )
    for kind, where, value in changes:
        if kind == "header":
            form, at = HEADER_FIELDS[where % len(HEADER_FIELDS)]
        elif kind == "section":
            form, at = SECTION_FIELDS[where % len(SECTION_FIELDS)]
            at += table + 64 * (where // len(SECTION_FIELDS) % sections)
        elif kind == "symbol":
            form, at = SYMBOL_FIELDS[where % len(SYMBOL_FIELDS)]
            at += symbols + 24 * (where // len(SYMBOL_FIELDS) % 20)
        elif kind == "bit":
            damaged[where % len(damaged)] ^= 1 << value % 8
            continue
        else:
            at = where % len(damaged)
            damaged[at : at + 8] = struct.pack("<Q", value)[: len(damaged) - at]
            continue
        size = struct.calcsize(form)
        struct.pack_into(form, damaged, at, value % (1 << 8 * size))
    return bytes(damaged)


def read_all(image, config):
    """Do everything that is ever done to an image; what it returns has to hold together."""
    length, _ = strip_signature(image)
    elf = read_elf(memoryview(image)[:length])
    for fact in ("info_name", "this_module_name", "vermagic", "license", "depends", "aliases", "softdeps", "import_ns",
                 "parameters", "versions", "imports", "exports", "is_livepatch"):  # fmt: skip
        with contextlib.suppress(ImageProblem):
            repr(getattr(elf, fact)).encode()
    layout = plan_layout(elf, config)
    assert len(layout.rounded) == 7
    assert layout.total_bytes == sum(layout.rounded) == layout.core_bytes + layout.init_bytes
    for placement in layout.placements:
        if not placement.is_nobits and placement.size_bytes:
            assert placement.source_offset_bytes + placement.size_bytes <= length
            end = placement.destination_offset_bytes + placement.size_bytes
            assert end <= layout.rounded[placement.memory_type]


@mutations
@given(data=st.data())
def test_mutated_modules_are_read_or_refused(seeds, data):
    image = data.draw(st.sampled_from(seeds))
    changes = data.draw(st.lists(st.tuples(KINDS, st.integers(0, 1 << 20), NUMBERS), min_size=1, max_size=6))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(image))))
    config = LayoutConfig(*data.draw(st.tuples(*[st.booleans()] * 5)))
    damaged = mutate(image, changes)[:cut]
    try:
        read_all(damaged, config)
    except ImageProblem as problem:
        assert 0 < len(str(problem)) < 400
        str(problem).encode()
    assert isinstance(describe(damaged, limit_bytes=LIMIT_BYTES), ImageFacts)


@mutations
@given(data=st.data())
def test_spliced_modules_are_read_or_refused(seeds, data):
    first, second = (data.draw(st.sampled_from(seeds)) for _ in range(2))
    at, other = (data.draw(st.integers(0, len(image))) for image in (first, second))
    assert isinstance(describe(first[:at] + second[other:], limit_bytes=LIMIT_BYTES), ImageFacts)


PACKERS = {
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32, preset=0),
    "zstd": lambda data: zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data),
}


@mutations
@given(data=st.data())
def test_mutated_streams_unpack_or_are_refused(seeds, data):
    algorithm = data.draw(st.sampled_from(sorted(PACKERS)))
    packed = PACKERS[algorithm](data.draw(st.sampled_from(seeds)))
    if data.draw(st.booleans()):
        packed = PACKERS[data.draw(st.sampled_from(sorted(PACKERS)))](packed)
    damaged = bytearray(packed)
    for at, bit in data.draw(st.lists(st.tuples(st.integers(0, len(packed) - 1), st.integers(0, 7)), max_size=6)):
        # Most damage near the start, where the headers are.
        damaged[at % 32 if bit % 2 else at] ^= 1 << bit
    damaged = bytes(damaged[: data.draw(st.one_of(st.none(), st.integers(0, len(packed))))])
    for decompress in (kernel_decompress, user_decompress):
        image = b""
        with contextlib.suppress(ImageProblem):
            image = b"".join(decompress(damaged, algorithm, limit_bytes=LIMIT_BYTES))
        assert len(image) <= LIMIT_BYTES
    declared = declared_image_bytes(damaged, algorithm)
    assert declared is None or declared >= 0
    assert kernel_workspace_bytes(damaged, algorithm) >= 0
    assert isinstance(describe(damaged, name=f"x.ko.{algorithm}", limit_bytes=LIMIT_BYTES), ImageFacts)
