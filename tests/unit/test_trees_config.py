"""What modprobe.d files say. The integration tests hold the same reading against the real modprobe."""

import os
from pathlib import Path

import pytest

from loader_svc.trees.config import ModprobeConfig, Pair, Softdep, read_config


def config_of(tmp_path: Path, text: str) -> ModprobeConfig:
    (tmp_path / "x.conf").write_text(text)
    return read_config([tmp_path])


def test_every_directive_is_read(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        "alias char-major-1-* one-two\n"
        "blacklist snd-pcsp\n"
        "options snd-hda\tmodel=auto\tindex=1\n"
        "install a-b /bin/true --x\n"
        "remove a-b /bin/false\n"
        "softdep uhci-hcd pre: ehci-hcd x post: y\n",
    )
    assert config.aliases == [Pair("char_major_1_*", "one_two")]
    assert config.blacklist == ["snd_pcsp"]
    assert config.options == [Pair("snd_hda", "model=auto index=1")]
    assert config.install == [Pair("a_b", "/bin/true --x")]
    assert config.remove == [Pair("a_b", "/bin/false")]
    assert config.softdeps == [Softdep("uhci_hcd", ("ehci-hcd", "x"), ("y",))]
    assert config.warnings == []


def test_a_line_goes_on_behind_a_backslash_and_other_backslashes_vanish(tmp_path: Path) -> None:
    config = config_of(tmp_path, "install a one \\\n  two\noptions \\b c=\\\\d\n")
    assert config.install == [Pair("a", "one   two")]
    assert config.options == [Pair("b", "c=\\d")]


def test_bad_lines_are_passed_over_with_a_warning_that_names_them(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        "# a comment\n\n  \nalias one\noptions x\nnonsense y\nblacklist\nalias b[ x\n # none\nblacklist good\n",
    )
    assert config.blacklist == ["good"]
    assert config.aliases == config.options == []
    file = tmp_path / "x.conf"
    assert config.warnings == [
        f"{file} line {number}: ignoring bad line starting with '{word}'"
        for number, word in [(4, "alias"), (5, "options"), (6, "nonsense"), (7, "blacklist"), (8, "alias"), (9, "#")]
    ]


def test_files_are_read_by_name_the_first_place_wins_and_the_trees_own_softdeps_take_part(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        place.mkdir()
        for name in ("b.conf", "z.alias"):
            (place / name).write_text(f"blacklist {place.name}-{name[0]}\nsoftdep {name[0]} pre: {place.name}\n")
    (second / "a.conf").write_text("blacklist a\n")
    for name in ("no.txt", ".hidden.conf", ".conf"):
        (first / name).write_text("blacklist never\n")
    (first / "dir.conf").mkdir()
    config = read_config([first, tmp_path / "not-there", second], ["softdep m pre: n", "bad"])
    assert config.blacklist == ["a", "first_b", "first_z"]
    assert [softdep.module for softdep in config.softdeps] == ["b", "m", "z"]
    assert config.warnings == ["modules.softdep: ignoring bad line starting with 'bad'"]


def test_a_place_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "anything"
    path.write_text("blacklist x")
    assert read_config([path]).blacklist == ["x"]


@pytest.mark.parametrize(
    ("line", "options", "blacklist"),
    [
        ("ro quiet snd-hda.model=auto usbcore.quirks", [("snd_hda", "model=auto"), ("usbcore", "quirks")], []),
        ('a.b="c d" e', [("a", 'b="c d"')], []),
        ('"a.b=c d"', [("a", 'b="c d"')], []),
        ("modprobe.blacklist=a-b,c x.y.z=1 =v .w", [("", "w")], ["a-b", "c"]),
        ("root=/dev/sda1 initcall.x=1.2=3", [("initcall", "x=1.2=3")], []),
        ('open="a.b=c', [], []),
        ("", [], []),
    ],
)
def test_the_kernel_command_line_gives_options_and_blacklists(
    line: str, options: list[tuple[str, str]], blacklist: list[str]
) -> None:
    config = read_config([], kernel_command_line=line)
    assert config.options == options
    assert config.blacklist == blacklist


def test_bytes_that_are_no_text_and_pipes_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "x.conf").write_bytes(b"\xff\xfe\0alias\nblacklist a\0b\noptions \xff y=1")
    os.mkfifo(tmp_path / "pipe.conf")
    config = read_config([tmp_path])
    assert config.blacklist == ["a"]
    assert config.options == [Pair("\udcff", "y=1")]
