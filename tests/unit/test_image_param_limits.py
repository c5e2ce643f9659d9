"""How many elements an array parameter takes, and bytes a string, read out of small images."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader_svc.checks.parameters import parameters_failure
from loader_svc.image import ImageError, ImageTooLarge, read_elf
from loader_svc.image.param_limits import MAX_LIMIT, PARAM_BYTES
from loader_svc.steps import Failure

ALLOC, RELA = 2, 4
NAMES = ("many", "one", "number")


Image = Callable[..., bytes]


@pytest.fixture
def image(make_module: Callable[..., Any], make_section: Callable[..., Any]) -> Image:
    """A function that returns a module with two arrays and a number."""

    def make(
        *,
        limits: tuple[int, int] = (32, 1),
        ops: str = "param_array_ops",
        cut: bool = False,
        kind: str = "array of int",
    ) -> bytes:
        types = (f"many:{kind}", "one:array of charp", "number:int")
        builder = make_module(tags=[("parmtype", text) for text in types])
        # What __param leads to: the names, 16 bytes each, then struct kparam_array: the limit, the size of an element.
        data = b"".join(name.encode().ljust(16, b"\0") for name in NAMES)
        data += b"".join(struct.pack("<II24x", limit, 4) for limit in limits)
        home = builder.add(make_section(".rodata.param", data[:-32] if cut else data, ALLOC))
        table = builder.add(make_section("__param", bytes(PARAM_BYTES * len(NAMES)), ALLOC))
        here = len(builder.symbols) + 1
        array_ops, int_ops = here + 1, here + 2
        builder.symbols += [("home", home, 1), (ops, 0, 1), ("param_ops_int", 0, 1)]
        relocations = []
        for slot, name in enumerate(NAMES):
            base = slot * PARAM_BYTES
            relocations += [
                (base, here, 16 * slot),
                (base + 16, int_ops if name == "number" else array_ops, 0),
                (base + 32, here, 48 + 32 * slot),
            ]
        rela = b"".join(struct.pack("<QIIq", offset, 1, symbol, addend) for offset, symbol, addend in relocations)
        builder.add(make_section(".rela__param", rela, type=RELA, info=table))
        return bytes(builder.bytes())

    return make


def limits_of(data: bytes) -> dict[str, int | None]:
    elf = read_elf(data)
    return {parameter.name: parameter.most for parameter in elf.parameters}


def test_the_limit_is_in_the_description_of_the_array(image: Image) -> None:
    assert limits_of(image()) == {"many": 32, "one": 1, "number": None}


@pytest.mark.parametrize("limits", [(0, 1), (MAX_LIMIT + 1, 1), (0xFFFFFFFF, 1)])
def test_a_limit_that_makes_no_sense_is_none(image: Image, limits: tuple[int, int]) -> None:
    assert limits_of(image(limits=limits)) == {"many": None, "one": 1, "number": None}


def test_what_is_no_array_of_the_kernels_own_has_none(image: Image) -> None:
    assert set(limits_of(image(ops="my_own_ops")).values()) == {None}


def test_a_description_that_is_cut_off_has_none(image: Image) -> None:
    assert limits_of(image(cut=True))["one"] is None


def test_the_limit_of_a_string_is_in_its_description(image: Image) -> None:
    data = image(ops="param_ops_string", kind="string", limits=(16, 1))
    assert limits_of(data)["many"] == 16
    parameters = read_elf(data).parameters
    assert parameters_failure("many=fifteen_of_them", parameters) is None
    assert parameters_failure("many=sixteen_of_them_", parameters) == Failure(
        "ENOSPC", "parameters", "many=sixteen_of_them_"
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_image_is_too_broken(image: Image, data: st.DataObject) -> None:
    broken = bytearray(image())
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError, ImageTooLarge):
        limits_of(bytes(broken))


def test_every_array_of_real_modules_has_a_limit(golden_modules: list[Path]) -> None:
    found = [p for path in golden_modules for p in read_elf(path.read_bytes()).parameters if "array of" in p.type]
    assert found
    assert all(parameter.most for parameter in found), found
