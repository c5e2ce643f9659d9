"""Names of modules and files, aliases, and what is refused as neither."""

import pytest

from loader_svc.trees import BadModuleName
from loader_svc.trees.names import checked_alias, checked_name, compression, module_name, normal_alias


@pytest.mark.parametrize(
    ("path", "name", "packing"),
    [
        ("kernel/sound/snd-hda-intel.ko", "snd_hda_intel", ""),
        ("xfs.ko.xz", "xfs", "xz"),
        ("a/b.ko.gz", "b", "gz"),
        ("a-b/c_d.ko.zst", "c_d", "zst"),
        ("x.ko.bz2", "x", None),
        ("x.o", "x", None),
        (".ko", "", None),
        ("dir/.ko.xz", "", None),
    ],
)
def test_a_file_names_its_module_and_how_it_is_packed(path: str, name: str, packing: str | None) -> None:
    assert module_name(path) == name
    assert compression(path) == packing


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("snd-hda", "snd_hda"),
        ("usb:v[0-9]p-*", "usb:v[0-9]p_*"),
        ("a-[b-c[d]-", "a_[b-c[d]_"),
        ("half[0-9", None),
        ("half]", None),
        ("[]-[]", "[]_[]"),
        ("", ""),
    ],
)
def test_a_dash_is_an_underscore_outside_of_brackets(text: str, normal: str | None) -> None:
    assert normal_alias(text) == normal


@pytest.mark.parametrize(
    "name", ["", "a/b", "/etc/passwd", "..", "../x", "a..b", "x\0y", "x\n", "\x7f", "x" * 256, "é" * 128]
)
def test_what_no_module_could_be_called_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadModuleName) as caught:
        checked_name(name)
    assert caught.value.name == name
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)
    assert len(str(caught.value)) < 500
    with pytest.raises(BadModuleName):
        checked_alias(name)


def test_the_longest_names_pass() -> None:
    assert checked_name("x-" + "x" * 253) == "x_" + "x" * 253
    assert checked_alias("dmi:" + "x" * 4091)
    with pytest.raises(BadModuleName, match="4095 bytes"):
        checked_alias("dmi:" + "x" * 4092)


@pytest.mark.parametrize("alias", ["devname:net/tun", "dmi:bvnA/B..C:pn20\\x", "pci:v*", "acpi:é:\udcff:\ud800"])
def test_an_alias_may_hold_what_a_name_may_not(alias: str) -> None:
    assert checked_alias(alias) == alias


@pytest.mark.parametrize("alias", ["pci:\0", "a:\x1b[2J", "a:b\n"])
def test_control_characters_are_refused_in_aliases_too(alias: str) -> None:
    with pytest.raises(BadModuleName):
        checked_alias(alias)
