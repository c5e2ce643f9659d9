import ctypes
import ctypes.util
import gzip
import lzma
import random
import struct
import tracemalloc
import zlib

import pytest
import zstandard

from loader_svc.image import (
    ImageError,
    ImageTooLarge,
    algorithm_of,
    declared_image_bytes,
    kernel_decompress,
    kernel_workspace_bytes,
    user_decompress,
)

CONTENT = random.Random(6).randbytes(3000) * 50 + bytes(100_000)
CRC32 = {"check": lzma.CHECK_CRC32, "filters": [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]}


def pack(algorithm, content=CONTENT):
    if algorithm == "gzip":
        return gzip.compress(content, mtime=0)
    if algorithm == "xz":
        return lzma.compress(content, **CRC32)
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(content)


def kernel(source, algorithm, **options):
    return b"".join(kernel_decompress(source, algorithm, **options))


def user(source, algorithm, **options):
    return b"".join(user_decompress(source, algorithm, **options))


def refusal(call, *args, **options):
    with pytest.raises(ImageError) as raised:
        call(*args, **options)
    assert raised.value.errno == "EINVAL"
    return raised.value.check


every = pytest.mark.parametrize("algorithm", ["gzip", "xz", "zstd"])


@every
def test_good_streams_unpack_to_their_content(algorithm):
    packed = pack(algorithm)
    assert kernel(packed, algorithm) == user(packed, algorithm) == CONTENT
    assert kernel(bytearray(packed), algorithm) == CONTENT
    assert declared_image_bytes(packed, algorithm) == len(CONTENT)


@every
def test_chunks_are_at_most_a_mebibyte_and_never_empty(algorithm):
    content = random.Random(1).randbytes(2 << 20) + bytes(3 << 20)
    for decompress in (kernel_decompress, user_decompress):
        sizes = [len(chunk) for chunk in decompress(pack(algorithm, content), algorithm)]
        assert sum(sizes) == len(content)
        assert 0 < min(sizes) <= max(sizes) <= 1 << 20


@every
def test_bytes_after_the_stream_are_ignored_by_the_kernel_and_refused_by_callers(algorithm):
    for tail in (b"x", b"garbage" * 1000, pack(algorithm), pack("gzip")):
        assert kernel(pack(algorithm) + tail, algorithm) == CONTENT
    assert refusal(user, pack(algorithm) + b"garbage", algorithm) == "decompress: magic"


@every
def test_callers_unpack_several_streams_in_a_row(algorithm):
    assert user(pack(algorithm, b"one") + pack(algorithm, b"two") + pack(algorithm), algorithm) == b"onetwo" + CONTENT
    assert kernel(pack(algorithm, b"one") + pack(algorithm, b"two"), algorithm) == b"one"


@every
def test_another_magic_is_refused(algorithm):
    for wrong in (b"", b"\x7fELF", bytes(100), pack("gzip" if algorithm != "gzip" else "xz")):
        assert refusal(kernel, wrong, algorithm) == "decompress: magic"
        assert refusal(user, wrong, algorithm) == "decompress: magic"
        assert declared_image_bytes(wrong, algorithm) is None
        assert kernel_workspace_bytes(wrong, algorithm) == 0


@every
def test_an_empty_image_is_no_error(algorithm):
    assert kernel(pack(algorithm, b""), algorithm) == user(pack(algorithm, b""), algorithm) == b""


@every
def test_callers_refuse_every_cut(algorithm):
    packed = pack(algorithm, CONTENT[:4000])
    for length in range(len(packed)):
        assert refusal(user, packed[:length], algorithm).startswith("decompress: ")


@every
def test_callers_notice_every_damaged_bit(algorithm):
    packed = pack(algorithm, CONTENT[:3000])
    generator = random.Random(11)
    for position in generator.sample(range(10, len(packed)), 200):
        damaged = bytearray(packed)
        damaged[position] ^= 1 << generator.randrange(8)
        try:
            assert user(damaged, algorithm) == CONTENT[:3000]  # a bit that means nothing, in a header
        except ImageError as error:
            assert error.errno == "EINVAL"


# gzip


def test_gzip_trailers_may_be_wrong_or_missing_but_data_not():
    packed = pack("gzip")
    data_end = len(packed) - 8
    assert kernel(packed[:data_end] + b"\xff" * 8, "gzip") == CONTENT
    for length in range(data_end, len(packed)):
        assert kernel(packed[:length], "gzip") == CONTENT
    for length in range(10, data_end, 97):
        assert refusal(kernel, packed[:length], "gzip") == "decompress: gzip end"
    assert refusal(kernel, packed[: data_end - 1], "gzip") == "decompress: gzip end"


def gzip_with(flags, fields):
    deflated = zlib.compressobj(wbits=-15)
    data = deflated.compress(CONTENT) + deflated.flush()
    return (
        b"\x1f\x8b\x08"
        + bytes([flags])
        + bytes(6)
        + fields
        + data
        + struct.pack("<II", zlib.crc32(CONTENT), len(CONTENT))
    )


def test_of_the_optional_fields_in_a_gzip_header_the_kernel_skips_the_name_only():
    assert kernel(gzip_with(8, b"minix.ko\0"), "gzip") == CONTENT
    assert kernel(gzip_with(8, b"x" * 200_000 + b"\0"), "gzip") == CONTENT
    for flags, fields in ((4, b"\x02\0ab"), (16, b"comment\0")):
        assert user(gzip_with(flags, fields), "gzip") == CONTENT
        try:
            assert kernel(gzip_with(flags, fields), "gzip") != CONTENT
        except ImageError as error:
            assert error.errno == "EINVAL"


def test_a_gzip_name_without_end_is_no_header():
    assert refusal(kernel, b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 200_000, "gzip") == "decompress: magic"
    assert refusal(kernel, pack("gzip")[:9], "gzip") == "decompress: magic"
    assert refusal(kernel, pack("gzip")[:10], "gzip") == "decompress: gzip end"


def test_damaged_deflate_data_are_an_error_or_garbage():
    assert refusal(kernel, pack("gzip")[:10] + b"\x07", "gzip") == "decompress: gzip data"  # block type 3
    stored = b"\x01\x04\0\xfb\xff" + b"abcd"
    damaged = b"\x1f\x8b\x08" + bytes(7) + stored.replace(b"b", b"B") + struct.pack("<II", zlib.crc32(b"abcd"), 4)
    assert kernel(damaged, "gzip") == b"aBcd"
    assert refusal(user, damaged, "gzip") == "decompress: gzip data"


# xz


def test_xz_cuts_anywhere_are_errors():
    packed = pack("xz", CONTENT[:4000])
    for length in range(6, len(packed)):
        assert refusal(kernel, packed[:length], "xz") == "decompress: xz end"


def test_xz_damage_anywhere_is_an_error():
    packed = pack("xz", CONTENT[:1000])
    for position in range(6, len(packed)):
        damaged = bytearray(packed)
        damaged[position] ^= 0x10
        assert refusal(kernel, damaged, "xz").startswith("decompress: xz ")


@pytest.mark.parametrize("check", [lzma.CHECK_CRC64, lzma.CHECK_SHA256])
def test_the_kernel_knows_crc32_and_no_check_only(check):
    packed = lzma.compress(CONTENT, check=check)
    assert user(packed, "xz") == CONTENT
    assert refusal(kernel, packed, "xz") == "decompress: xz check"
    assert kernel(lzma.compress(CONTENT, check=lzma.CHECK_NONE), "xz") == CONTENT


def test_the_kernel_knows_lzma2_alone_or_after_one_bcj_filter():
    lzma2 = CRC32["filters"][0]
    x86, delta = {"id": lzma.FILTER_X86}, {"id": lzma.FILTER_DELTA, "dist": 4}
    ia64 = {"id": lzma.FILTER_IA64}
    for filters, right in (
        ([x86, lzma2], True),
        ([delta, lzma2], False),
        ([x86, x86, lzma2], False),
        ([ia64, lzma2], False),
    ):
        packed = lzma.compress(CONTENT, check=lzma.CHECK_CRC32, filters=filters)
        assert user(packed, "xz") == CONTENT
        if right:
            assert kernel(packed, "xz") == CONTENT
        else:
            assert refusal(kernel, packed, "xz") == "decompress: xz filter"
    offset = {"id": lzma.FILTER_X86, "start_offset": 4096}
    packed = lzma.compress(CONTENT, check=lzma.CHECK_CRC32, filters=[offset, lzma2])
    assert refusal(kernel, packed, "xz") == "decompress: xz filter"


def with_dictionary(packed, bits):
    """Return an xz file of one block with another dictionary size in its header, CRC corrected."""
    damaged = bytearray(packed)
    size = (damaged[12] + 1) * 4
    at = damaged.index(b"\x21\x01", 12) + 2
    damaged[at] = bits
    damaged[12 + size - 4 : 12 + size] = struct.pack("<I", zlib.crc32(damaged[12 : 12 + size - 4]))
    return bytes(damaged)


def test_xz_dictionaries_have_limits():
    packed = pack("xz")
    assert kernel_workspace_bytes(packed, "xz") == 1 << 20
    assert refusal(kernel, with_dictionary(packed, 40), "xz") == "decompress: xz dictionary"
    with pytest.raises(ImageTooLarge, match="dictionary of the xz stream"):
        kernel(with_dictionary(packed, 38), "xz", limit_bytes=1 << 27)
    assert kernel_workspace_bytes(with_dictionary(packed, 37), "xz") == 3 << 29
    assert kernel(with_dictionary(packed, 28), "xz", limit_bytes=len(CONTENT)) == CONTENT  # 64 MiB, as xz -9


def test_xz_padding_is_a_multiple_of_four():
    assert user(pack("xz") + bytes(8) + pack("xz", b"more") + bytes(4), "xz") == CONTENT + b"more"
    assert refusal(user, pack("xz") + bytes(3), "xz") == "decompress: magic"


def test_a_damaged_xz_index_declares_nothing():
    packed = pack("xz")
    for tail in (b"x", bytes(12), packed[-12:], b"\xff" * 20 + packed[-12:]):
        assert declared_image_bytes(packed + tail, "xz") is None
    for length in range(len(packed)):
        assert declared_image_bytes(packed[:length], "xz") is None


def test_an_xz_file_that_says_it_is_too_large_is_refused_before_any_of_it_is_unpacked():
    packed = bytearray(pack("xz"))
    packed[len(packed) // 2] ^= 0xFF
    for unpack in (kernel, user):
        assert refusal(unpack, bytes(packed), "xz", limit_bytes=len(CONTENT)) == "decompress: xz data"
        with pytest.raises(ImageTooLarge):
            unpack(bytes(packed), "xz", limit_bytes=len(CONTENT) - 1)
    # What an index with a wrong checksum says is nothing to go by.
    packed[-16] ^= 0xFF
    assert refusal(kernel, bytes(packed), "xz", limit_bytes=len(CONTENT) - 1) == "decompress: xz data"


# zstd


class Buffer(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


@pytest.fixture(scope="module")
def in_pages():
    """A function that unpacks page by page in the kernel's own loop around libzstd; None where that sees an error."""
    name = ctypes.util.find_library("zstd")
    if name is None:
        pytest.skip("no shared library libzstd on this machine")
    libzstd = ctypes.CDLL(name)
    libzstd.ZSTD_createDStream.restype = ctypes.c_void_p
    libzstd.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    libzstd.ZSTD_decompressStream.argtypes = [ctypes.c_void_p, ctypes.POINTER(Buffer), ctypes.POINTER(Buffer)]
    libzstd.ZSTD_decompressStream.restype = ctypes.c_size_t
    libzstd.ZSTD_isError.argtypes = [ctypes.c_size_t]

    def unpack(packed):
        packed, page = bytes(packed), ctypes.create_string_buffer(4096)
        source = Buffer(ctypes.cast(packed, ctypes.c_void_p), len(packed), 0)
        stream = libzstd.ZSTD_createDStream()
        image = b""
        try:
            while True:
                output = Buffer(ctypes.cast(page, ctypes.c_void_p), 4096, 0)
                rest = libzstd.ZSTD_decompressStream(stream, output, source)
                if libzstd.ZSTD_isError(rest):
                    return None
                image += page.raw[: output.pos]
                if output.pos < 4096 or rest == 0:
                    return image
        finally:
            libzstd.ZSTD_freeDStream(stream)

    return unpack


def test_a_cut_zstd_stream_yields_its_whole_blocks(in_pages):
    content = random.Random(3).randbytes(300_000).hex().encode()[:300_000]
    packed = pack("zstd", content)
    block = 1 << 17
    seen = set()
    for length in [*range(18, len(packed), 1009), *range(len(packed) - 8, len(packed))]:
        image = kernel(packed[:length], "zstd")
        assert image == content[: len(image)]
        assert len(image) in (0, block, 2 * block, len(content))
        assert image == in_pages(packed[:length])
        seen.add(len(image))
    assert seen == {0, block, 2 * block, len(content)}
    assert refusal(user, packed[:-1], "zstd") == "decompress: zstd end"


def test_of_an_incompressible_zstd_block_every_byte_counts(in_pages):
    content = random.Random(3).randbytes(200_000)
    packed = pack("zstd", content)
    for length in range(18, len(packed), 10_007):
        image = kernel(packed[:length], "zstd")
        assert image == in_pages(packed[:length]) == content[: len(image)]
        assert len(packed) - length - 32 < len(content) - len(image) < len(packed) - length + 32


def test_a_zstd_header_must_be_whole():
    packed = pack("zstd")
    for length in (4, 5):
        assert refusal(kernel, packed[:length], "zstd") == "decompress: zstd header"


def test_a_wrong_zstd_checksum_is_an_error():
    packed = bytearray(pack("zstd"))
    packed[-1] ^= 1
    assert refusal(kernel, packed, "zstd") == "decompress: zstd data"
    assert refusal(user, packed, "zstd") == "decompress: zstd data"


def test_damaged_zstd_data_end_as_page_by_page(in_pages):
    packed = pack("zstd", CONTENT)
    generator = random.Random(4)
    errors = 0
    for _ in range(300):
        damaged = bytearray(packed)
        damaged[generator.randrange(18, len(packed))] ^= 1 << generator.randrange(8)
        expected = in_pages(damaged)
        if expected is None:
            errors += 1
            assert refusal(kernel, damaged, "zstd") == "decompress: zstd data"
        else:
            assert kernel(damaged, "zstd") == expected
    assert errors > 100


def zstd_frame(*, window=None, content_bytes=None, blocks=b"", checksum=b""):
    """Build a frame: a window descriptor byte, or a content size in a single segment."""
    descriptor = (4 if checksum else 0) | (0 if window is not None else 0xE0)
    header = bytes([window]) if window is not None else struct.pack("<Q", content_bytes)
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + header + blocks + checksum


def rle(size, *, last=False):
    return (int(last) | 1 << 1 | size << 3).to_bytes(3, "little") + b"\0"


def test_zstd_windows_have_limits():
    good = zstd_frame(window=(27 - 10) << 3, blocks=rle(5000, last=True))  # 128 MiB
    assert kernel(good, "zstd") == bytes(5000)
    assert kernel_workspace_bytes(good, "zstd") > 1 << 27
    assert (
        refusal(kernel, zstd_frame(window=(28 - 10) << 3, blocks=rle(5000, last=True)), "zstd")
        == "decompress: zstd window"
    )
    assert (
        refusal(kernel, zstd_frame(window=(41 - 10) << 3, blocks=rle(5000, last=True)), "zstd")
        == "decompress: zstd header"
    )
    assert refusal(kernel, zstd_frame(content_bytes=1 << 30, blocks=rle(9)), "zstd") == "decompress: zstd window"


def test_content_of_a_page_needs_no_zstd_window():
    """A decoder unpacks it straight into the page, if the whole frame is there."""
    header = b"\x28\xb5\x2f\xfd\x80" + bytes([(29 - 10) << 3])  # 512 MiB, and a content size of four bytes
    small = header + struct.pack("<I", 4096) + rle(4096, last=True)
    assert kernel(small, "zstd") == bytes(4096)
    assert refusal(kernel, small[:-1], "zstd") == "decompress: zstd window"
    large = header + struct.pack("<I", 4097) + rle(4097, last=True)
    assert refusal(kernel, large, "zstd") == "decompress: zstd window"


def test_a_zstd_window_that_no_memory_holds_is_no_memory():
    with pytest.raises(ImageError) as raised:
        kernel(zstd_frame(content_bytes=1 << 50, blocks=rle(9)), "zstd")
    assert (raised.value.errno, raised.value.check) == ("ENOMEM", "decompress: zstd window")
    assert refusal(kernel, zstd_frame(content_bytes=(1 << 64) - 2**20), "zstd") == "decompress: zstd window"


def test_skippable_frames_are_skipped_by_callers_and_no_magic_to_the_kernel():
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
    assert user(pack("zstd") + skippable + pack("zstd", b"x"), "zstd") == CONTENT + b"x"
    assert refusal(kernel, skippable + pack("zstd"), "zstd") == "decompress: magic"
    assert refusal(user, pack("zstd") + skippable[:-1], "zstd") == "decompress: zstd end"


# Limits


def bombs():
    """Return small files that hold much more: (algorithm, file, image bytes)."""
    deflate = zlib.compressobj(9, wbits=31)
    zeros = bytes(1 << 20)
    gz = b"".join(deflate.compress(zeros) for _ in range(64)) + deflate.flush()
    xz = lzma.compress(bytes(64 << 20), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, preset=0)
    gibibyte = zstd_frame(window=(17 - 10) << 3, blocks=rle(1 << 17) * 8191 + rle(1 << 17, last=True))
    return [("gzip", gz, 64 << 20), ("xz", xz, 64 << 20), ("zstd", gibibyte, 1 << 30)]


def test_small_files_that_hold_much_are_refused_at_the_limit_with_little_memory():
    limit = 8 << 20
    for algorithm, packed, image_bytes in bombs():
        assert len(packed) * 500 < image_bytes
        for decompress in (kernel_decompress, user_decompress):
            yielded = 0
            tracemalloc.start()
            with pytest.raises(ImageTooLarge, match=f"the decompressed image exceeds the limit of {limit} bytes"):
                for chunk in decompress(packed, algorithm, limit_bytes=limit):
                    yielded += len(chunk)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert yielded <= limit
            assert peak < 4 << 20


def test_an_image_of_just_the_limit_is_no_excess():
    for algorithm in ("gzip", "xz", "zstd"):
        assert kernel(pack(algorithm), algorithm, limit_bytes=len(CONTENT)) == CONTENT
        with pytest.raises(ImageTooLarge):
            kernel(pack(algorithm), algorithm, limit_bytes=len(CONTENT) - 1)


def test_the_algorithm_is_told_by_content_first_and_name_second():
    assert algorithm_of("x.ko", pack("xz")) == "xz"
    assert algorithm_of("x.ko.gz", pack("zstd")[:6]) == "zstd"
    assert algorithm_of("x.ko.zst", b"\x7fELF") == "zstd"
    assert algorithm_of("dir.gz/x.ko", b"\x7fELF\2\1") is None
    assert algorithm_of("x.ko.xz") == "xz"
    assert algorithm_of("", pack("gzip")) == "gzip"
