"""The catalogue against the very packages that its facts are from, where they are in the cache."""

import io
import lzma
import os
from pathlib import Path

import platformdirs
import pytest
from elftools.elf.elffile import ELFFile

from loader_svc.catalogue import catalogue_modules
from loader_svc.image import describe


@pytest.fixture(scope="module")
def real():
    """For each module of the catalogue that is a package's own the real file."""
    told = os.environ.get("MODPRESSURE_CACHE_DIR")
    cache = Path(told) if told else platformdirs.user_cache_path("modpressure")
    found = {}
    for facts in catalogue_modules().values():
        package, _, rest = facts.origin.partition(" ")
        if rest.endswith(", adapted") or package == "modelled":
            continue
        for path in cache.glob(f"debian/{package}_{rest}/lib/modules/*/{facts.path}*"):
            found[facts.name] = path
    if not found:
        origins = sorted({facts.origin for facts in catalogue_modules().values() if "," not in facts.origin})
        pytest.skip(f"{origins[0]} is not in the cache (modpressure modules fetch-debian PACKAGE puts it there)")
    return found


def test_layout_names_and_lengths_are_the_real_ones(real):
    """Read by the program's own reader, which had no part in the extraction."""
    wrong = {}
    for name, path in real.items():
        facts, found = catalogue_modules()[name], describe(path)
        differences = {
            what: (said, is_)
            for what, said, is_ in (
                ("layout", facts.layout_bytes, found.layout.unrounded),
                ("image", facts.plain_bytes, found.image_bytes),
                ("xz", facts.xz_bytes, path.stat().st_size if path.suffix == ".xz" else facts.xz_bytes),
                ("imports", {i.name for i in facts.imports}, {i.name for i in found.imports}),
                ("exports", {(e.name, e.crc) for e in facts.exports}, {(e.name, e.crc) for e in found.exports}),
                ("modinfo", without_depends(as_read(facts.info)), without_depends(found.modinfo)),
            )
            if said != is_
        }
        if differences:
            wrong[name] = differences
    assert len(real) > 100
    assert wrong == {}


def test_section_tables_are_the_real_ones(real):
    wrong = {}
    for name, path in list(real.items())[::7]:
        image = path.read_bytes()
        image = lzma.decompress(image) if path.suffix == ".xz" else image
        sections = [section.name for section in ELFFile(io.BytesIO(image)).iter_sections()][1:]
        expected = []
        for section in catalogue_modules()[name].sections:
            expected += [section.name, f".rela{section.name}"][: 1 + bool(section.relocations)]
        if sections != expected:
            wrong[name] = (sections, expected)
    assert wrong == {}


def as_read(info):
    """The facts hold bytes as latin-1; the reader takes them for UTF-8 and escapes what isn't."""
    return [(key, value.encode("latin-1").decode("utf-8", "backslashreplace")) for key, value in info]


def without_depends(info):
    """What ``.modinfo`` says but for dependencies, which are those of the catalogue."""
    return sorted((key, value) for key, value in info if key != "depends")
