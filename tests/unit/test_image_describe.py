import gzip
import os
import tracemalloc

import pytest

from loader_svc.image import ImageError, ImageTooLarge, describe


def test_a_compressed_module_is_described_like_the_plain_one(make_module, tmp_path):
    image = make_module("tiny", tags=[("alias", "pci:*"), ("vermagic", "6.12")]).bytes()
    plain, packed = tmp_path / "tiny.ko", tmp_path / "tiny.ko.gz"
    plain.write_bytes(image)
    packed.write_bytes(gzip.compress(image))
    one, other = describe(plain), describe(packed)
    assert (one.compression, other.compression) == (None, "gzip")
    assert (one.file_bytes, other.file_bytes) == (len(image), packed.stat().st_size)
    for field in ("name", "image_bytes", "layout", "imports", "aliases", "vermagic", "modinfo", "problem"):
        assert getattr(one, field) == getattr(other, field)
    assert one.layout.total_bytes > 0
    assert ("alias", "pci:*") in one.modinfo


def test_a_broken_module_is_described_with_what_is_wrong(make_module):
    image = make_module("tiny").bytes()
    facts = describe(image[:-1])
    assert isinstance(facts.problem, ImageError)
    assert (facts.problem.check, facts.layout, facts.image_bytes) == ("elf: e_shoff", None, len(image) - 1)
    facts = describe(b"\xfd7zXZ\x00 no", name="x.ko")
    assert (facts.compression, facts.problem.errno, facts.image_bytes) == ("xz", "EINVAL", 0)
    facts = describe(b"text", name="x.ko.zst")
    assert (facts.compression, facts.problem.check) == ("zstd", "decompress: magic")


def test_a_module_that_cannot_be_laid_out_keeps_its_other_facts(make_module, make_section):
    facts = describe(make_module("tiny", make_section(".wx", b"x", 5)).bytes())
    assert (facts.name, facts.layout, facts.problem.check) == ("tiny", None, "wx")


def test_what_is_no_module_file_is_refused_at_the_read(tmp_path):
    fifo, empty, large = tmp_path / "fifo", tmp_path / "empty.ko", tmp_path / "large.ko"
    os.mkfifo(fifo)
    empty.touch()
    with large.open("wb") as file:
        file.truncate(1 << 40)
    for path, said in ((fifo, "not a regular file"), (tmp_path, "not a regular file"), (empty, "empty")):
        with pytest.raises(ImageError, match=said) as raised:
            describe(path)
        assert (raised.value.errno, raised.value.check) == ("EINVAL", "kread")
        assert str(path) in str(raised.value)
    with pytest.raises(ImageTooLarge, match=r"large\.ko exceeds the limit of 268435456 bytes"):
        describe(large)
    with pytest.raises(FileNotFoundError):
        describe(tmp_path / "absent.ko")


def test_a_small_file_that_unpacks_beyond_the_limit_is_a_problem_not_a_memory_hog():
    facts = describe(gzip.compress(bytes(1 << 24), 1), limit_bytes=1 << 20)
    assert isinstance(facts.problem, ImageTooLarge)
    assert "1048576" in str(facts.problem)


def test_a_packed_module_takes_the_memory_of_its_image_once():
    packed = gzip.compress(bytes(32 << 20))
    tracemalloc.start()
    try:
        describe(packed, name="m.ko.gz", limit_bytes=64 << 20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What a growing area has to spare is an eighth.
    assert peak_bytes < 40 << 20
