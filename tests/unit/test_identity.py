"""Kernel identities: their text, a Module.symvers, and what a kernel's configuration says."""

import lzma
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modpressure.cli.main import main
from modpressure.errors import BadRequest, NotFound
from modpressure.identity_files import (
    PACKAGED,
    identity_from,
    identity_names,
    load_identity,
    read_symvers,
    save_identity,
)
from modpressure.kernel.identity import ANY, ExportedSymbol, KernelIdentity
from modpressure.kernel.identity_text import IdentityError, identity_of_config, parse_identity, render_identity
from modpressure.kernel.symvers import SymversError, parse_symvers, render_symvers

SYMVERS = """\
0xf7370f56\tsystem_state\tvmlinux\tEXPORT_SYMBOL\t
0xbea5ff1e\tstatic_key\tvmlinux\tEXPORT_SYMBOL_GPL\t
0x00000007\tof_a_module\tfs/minix/minix\tEXPORT_SYMBOL\t
0x179bf30f\tspi_thing\tvmlinux\tEXPORT_SYMBOL_GPL\tSPI_NS
"""


def test_a_symvers_gives_the_kernels_own_symbols_with_version_licence_and_namespace() -> None:
    assert parse_symvers(SYMVERS.splitlines()) == {
        "system_state": ExportedSymbol(0xF7370F56, False, ""),
        "static_key": ExportedSymbol(0xBEA5FF1E, True, ""),
        "spi_thing": ExportedSymbol(0x179BF30F, True, "SPI_NS"),
    }
    assert list(parse_symvers(SYMVERS.splitlines(), where="fs/minix/minix")) == ["of_a_module"]


def test_zeros_for_versions_mean_that_there_are_none() -> None:
    symbols = parse_symvers(["0x00000000\ta\tvmlinux\tEXPORT_SYMBOL\t", "0x00000000\tb\tvmlinux\tEXPORT_SYMBOL_GPL\t"])
    assert symbols == {"a": ExportedSymbol(None), "b": ExportedSymbol(None, True)}


@pytest.mark.parametrize("line", ["no tabs at all", "0xzz\ta\tvmlinux\tEXPORT_SYMBOL\t", "0x1\ta\tvmlinux\tOTHER\t"])
def test_a_line_that_is_none_is_named(line: str) -> None:
    with pytest.raises(SymversError, match="line 1 "):
        parse_symvers([line])


NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)


@given(
    st.builds(
        KernelIdentity,
        name=NAMES,
        release=st.text(max_size=20),
        vermagic=st.none() | st.text(max_size=40),
        kallsyms_all=st.booleans(),
        modversions=st.booleans(),
        module_sig_force=st.booleans(),
        decompressors=st.sampled_from([(), ("xz",), ("gzip", "zstd")]),
        blacklist=st.frozensets(NAMES),
        this_module_bytes=st.none() | st.integers(0, 9999),
        page_bytes=st.sampled_from([4096, 16384]),
    )
)
def test_what_is_written_is_read_back(identity: KernelIdentity) -> None:
    assert parse_identity(render_identity(identity)) == (identity, "")


@given(st.dictionaries(NAMES, st.builds(ExportedSymbol, st.integers(1, 2**32 - 1), st.booleans(), st.just("") | NAMES)))
def test_symbols_are_read_back(symbols: dict[str, ExportedSymbol]) -> None:
    assert parse_symvers(render_symvers(symbols).splitlines()) == symbols


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("release =", "not TOML"),
        ("nonsense = 1", "'nonsense'"),
        ("[config]\nKALLSYMS = 1", "KALLSYMS = 1 is not true or false"),
        ("config = 1", "not a table"),
        ("trust_signatures = 1", "trust_signatures = 1 is not true or false"),
        ("page_bytes = 1000", "1000"),
        ('page_bytes = "x"', "whole number"),
        ("struct_module_bytes = -1", "struct_module_bytes = -1"),
        ('decompressors = ["lzo"]', "'lzo'"),
        ('blacklist = "pcspkr"', "list of texts"),
        ('base = "beos"', "'beos'"),
        ("symvers = 3", "symvers = 3"),
        ("origins = 3", "origins = 3"),
    ],
)
def test_a_bad_text_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(IdentityError, match=said):
        parse_identity(text)


CONFIG = """\
# Linux/x86 6.12.1 Kernel Configuration
CONFIG_MODULES=y
CONFIG_SMP=y
CONFIG_PREEMPT_BUILD=y
CONFIG_MODULE_UNLOAD=y
CONFIG_MODVERSIONS=y
CONFIG_KALLSYMS=y
# CONFIG_KALLSYMS_ALL is not set
CONFIG_STRICT_MODULE_RWX=y
CONFIG_MODULE_COMPRESS=y
CONFIG_MODULE_COMPRESS_ZSTD=y
CONFIG_MODULE_DECOMPRESS=y
"""


def test_a_configuration_gives_switches_and_vermagic() -> None:
    identity = identity_of_config(CONFIG.splitlines(), release="6.12.1-x")
    assert identity.vermagic == "6.12.1-x SMP preempt mod_unload modversions "
    assert identity.decompressors == ("zstd",)
    assert (identity.kallsyms, identity.kallsyms_all, identity.module_force_load) == (True, False, False)
    without = identity_of_config(CONFIG.replace("CONFIG_MODULE_DECOMPRESS=y\n", "").splitlines())
    assert (without.decompressors, without.vermagic) == ((), "SMP preempt mod_unload modversions ")


@pytest.mark.parametrize("text", ["", "nothing of the kind\n", "CONFIG_SMP=y\n"])
def test_what_is_no_configuration_with_modules_is_refused(text: str) -> None:
    with pytest.raises(IdentityError):
        identity_of_config(text.splitlines())


def test_an_identity_made_from_files_is_saved_and_loaded(tmp_path: Path) -> None:
    config, symvers = tmp_path / "config-6.12.1-x", tmp_path / "Module.symvers.xz"
    config.write_text(CONFIG)
    symvers.write_bytes(lzma.compress(SYMVERS.encode()))
    identity = identity_from(config, symvers, blacklist=frozenset({"pcspkr"}))
    assert identity.release == "6.12.1-x"
    assert identity.symbols is not None
    assert len(identity.symbols) == 3
    save_identity(identity, tmp_path / "mine.toml")
    assert load_identity(str(tmp_path / "mine.toml")) == identity
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "Module.symvers.xz", "config-6.12.1-x", "mine.symvers", "mine.toml",
    ]  # fmt: skip


def test_where_nothing_can_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    identity = replace(ANY, symbols={"printk": ExportedSymbol(1)})
    (tmp_path / "taken").mkdir()
    for path, said in ((tmp_path / "taken", "is a directory"), (tmp_path / "none" / "mine.toml", "No such file")):
        with pytest.raises(BadRequest, match=said) as caught:
            save_identity(identity, path)
        assert str(path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_identity_never_overwrites_its_own_symbols(tmp_path: Path) -> None:
    identity = replace(ANY, symbols={"printk": ExportedSymbol(1)})
    save_identity(identity, tmp_path / "mine.symvers")
    assert load_identity(str(tmp_path / "mine.symvers")).symbols == identity.symbols


def test_what_a_kernel_is_configured_with_stands_under_its_own_names() -> None:
    text = 'release = "1"\norigins = ["a 1"]\nsignatures_enforced = true\n[config]\nMODVERSIONS = false\nHZ = "250"\n'
    identity, _ = parse_identity(text)
    assert (identity.release, identity.module_sig_force, identity.modversions) == ("1", True, False)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="debian-99"):
        load_identity("debian-99")
    with pytest.raises(NotFound, match=r"absent\.xz"):
        read_symvers(tmp_path / "absent.xz")
    broken = tmp_path / "broken.xz"
    broken.write_bytes(b"no xz")
    with pytest.raises(BadRequest, match=r"broken\.xz"):
        read_symvers(broken)


def test_the_built_in_ones_load_and_decompressors_are_chosen_as_a_kernel_would() -> None:
    for name in identity_names():
        assert load_identity(name).name == name
    for name in PACKAGED:
        identity = load_identity(name)
        assert identity.symbols is not None
        assert identity.symbols["module_layout"].crc
        assert identity.this_module_bytes
    # 6.1 is built without MODULE_DECOMPRESS: libkmod unpacks and calls init_module.
    assert load_identity("debian-12").decompressor_for("xz") is None
    assert load_identity("debian-13").decompressor_for("zstd") == "xz"
    assert ANY.decompressor_for("zstd") == "zstd"
    assert replace(ANY, decompressors=("zstd",)).decompressor_for(None) == "zstd"


@pytest.mark.parametrize("name", ["any", *PACKAGED])
def test_what_is_shown_of_a_built_in_one_is_all_of_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["identity", "show", name]) == 0
    text = capsys.readouterr().out
    (tmp_path / "shown.toml").write_text(text)
    assert load_identity(str(tmp_path / "shown.toml")) == load_identity(name)
    (tmp_path / "changed.toml").write_text(text.replace("MODVERSIONS = true", "MODVERSIONS = false"))
    assert load_identity(str(tmp_path / "changed.toml")) == replace(load_identity(name), modversions=False)


def test_a_text_may_start_from_a_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "debian-12"\nblacklist = ["pcspkr"]\n')
    mine = load_identity(str(tmp_path / "mine.toml"))
    assert mine == replace(load_identity("debian-12"), blacklist=frozenset({"pcspkr"}))
    (tmp_path / "mine.toml").write_text('base = "debian-99"\n')
    with pytest.raises(BadRequest, match=r"'debian-99'; there are any, debian-12, debian-13, measured-6\.12"):
        load_identity(str(tmp_path / "mine.toml"))


def test_symbols_are_not_read_before_they_are_asked_for() -> None:
    """They would cost every start some time."""
    asked = (
        "import sys; opened = []\n"
        "sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == 'open' else None)\n"
        "from modpressure.identity_files import identity_names, load_identity\n"
        "for name in ('any', 'debian-12'):\n"
        "    identity_names(), load_identity(name)\n"
        "    print(sum(path.endswith('.symvers') for path in opened))\n"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]
