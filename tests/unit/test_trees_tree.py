"""Small trees, opened: what is listed, in which order it loads, and what is refused."""

import gzip
import lzma
import os
import random
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from loader_svc.trees import (
    BadModuleName,
    LoadStep,
    ModuleRef,
    ModuleTree,
    OutsideTree,
    TreeError,
    TreeNotFound,
    UnknownModule,
    UnreadableModule,
    open_tree,
)
from modpressure.errors import BadRequest, Forbidden, NotFound

Writer = Callable[..., None]
Opener = Callable[..., ModuleTree]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "6.1-test"
    path.mkdir()
    return path


@pytest.fixture
def write(root: Path, make_module: Callable, make_section: type) -> Writer:
    """A function that writes the module file `path` into the tree."""
    pack = {".ko": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}

    def write_module(
        path: str, gives: tuple[str, ...] = (), wants: tuple[str, ...] = (), tags: tuple[tuple[str, str], ...] = ()
    ) -> None:
        words = b"".join(name.encode() + b"\0" for name in gives)
        builder = make_module("tiny", make_section("__ksymtab_strings", words), tags=tags)
        builder.symbols += [(name, 0, 1) for name in wants]
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(pack[(root / path).suffix](builder.bytes()))

    return write_module


@pytest.fixture
def opened(root: Path, tmp_path: Path) -> Opener:
    """A function that opens the tree as it is, with the text of one configuration file."""

    def open_it(config: str = "") -> ModuleTree:
        (tmp_path / "modprobe.conf").write_text(config)
        return open_tree(root, cache_dir=tmp_path / "cache", modprobe_dirs=[tmp_path / "modprobe.conf"])

    return open_it


@pytest.fixture
def chain(write: Writer) -> None:
    """Three modules: top needs middle, middle needs low-one; each has an alias."""
    write("kernel/low-one.ko", gives=("low",), tags=(("alias", "dev:low-*"), ("alias", "net-pf-1")))
    write("kernel/middle.ko.xz", ("middle",), ("low",), (("alias", "dev:*"),))
    write("kernel/top.ko.zst", (), ("middle", "middle2"), (("alias", "dev:low-[0-9]"), ("softdep", "pre: extra")))
    write("kernel/extra.ko.gz", ("middle2",))


def test_a_directory_of_module_files_is_a_tree(chain: None, opened: Opener, root: Path) -> None:
    tree = opened()
    assert (tree.root, tree.release) == (root, "6.1-test")
    assert sorted(tree.names()) == ["extra", "low_one", "middle", "top"]
    entry = tree.module("low-one")
    assert (entry.name, entry.path, entry.compression) == ("low_one", "kernel/low-one.ko", "")
    assert entry.size_bytes == (root / entry.path).stat().st_size
    assert [tree.module(name).compression for name in ("middle", "top", "extra")] == ["xz", "zst", "gz"]
    assert tree.aliases("low_one") == ["dev:low-*", "net-pf-1"]
    assert tree.depends("middle") == ["low_one"]
    assert set(tree.depends("top")) == {"middle", "extra", "low_one"}
    assert tree.depends("top").index("middle") < tree.depends("top").index("low_one")
    assert tree.softdeps("top") == (("extra",), ())
    assert tree.softdeps("middle") == ((), ())


def test_dependencies_come_first_and_repeats_stay(chain: None, opened: Opener, root: Path) -> None:
    tree = opened("options top a=1\ninstall middle /bin/true\nsoftdep middle post: nobody\nalias short top\n")
    steps = tree.load_order("top", "b=2")
    assert [(step.module, step.required) for step in steps if step.module != "extra"] == [
        ("low_one", True),
        ("middle", True),
        ("top", True),
    ]
    assert [step.module for step in steps].count("extra") == 2
    assert steps[-1] == LoadStep("insmod", "top", "kernel/top.ko.zst", "a=1 b=2")
    assert LoadStep("install", "middle", "kernel/middle.ko.xz", "", "/bin/true") in steps
    lines = tree.show_depends("short")
    assert lines[-1] == f"insmod {root}/kernel/top.ko.zst a=1 "
    assert "install /bin/true " in lines
    assert tree.lookup("short") == [ModuleRef("top", "short")]


def test_a_softdep_that_nothing_needs_may_fail(write: Writer, opened: Opener) -> None:
    write("a.ko", tags=(("softdep", "pre: b post: nobody"),))
    write("b.ko", wants=("c_symbol",))
    write("c.ko", gives=("c_symbol",))
    assert [(step.module, step.required) for step in opened().load_order("a")] == [
        ("c", False),
        ("b", False),
        ("a", True),
    ]


def test_one_modalias_gives_all_modules_in_order_with_repeats(write: Writer, opened: Opener, root: Path) -> None:
    write("b.ko", tags=(("alias", "dev:*"), ("alias", "dev:x*"), ("alias", "broken[")))
    write("a.ko", tags=(("alias", "dev:?y"),))
    (root / "modules.order").write_text("b.ko\na.ko\n")
    tree = opened("blacklist b\n")
    assert tree.lookup("dev:xy") == [ModuleRef("b", "dev:xy")] * 2 + [ModuleRef("a", "dev:xy")]
    assert tree.resolve_alias("dev:xy") == ["b", "b", "a"]
    assert [step.module for step in tree.load_order("dev:xy")] == ["a"]  # what is blacklisted is not for aliases
    assert [step.module for step in tree.load_order("b")] == ["b"]
    assert tree.is_blacklisted("b")
    assert not tree.is_blacklisted("a")
    assert tree.load_order("dev:") == []
    assert tree.lookup("broken[") == tree.lookup("nothing:of") == []


def test_symbols_and_what_is_built_in_are_found(chain: None, opened: Opener, root: Path) -> None:
    (root / "modules.builtin").write_text("kernel/core-thing.ko\n#x\n0y.ko\n")
    (root / "modules.builtin.modinfo").write_text("core_thing.license=GPL\0core_thing.alias=core:*\0bad\0.alias=x\0")
    tree = opened()
    assert tree.resolve_alias("symbol:middle") == ["middle"]
    assert tree.builtin == ["core_thing"]
    assert tree.is_builtin("core-thing")
    assert tree.show_depends("core-thing") == tree.show_depends("core:1") == ["builtin core_thing"]
    with pytest.raises(UnknownModule, match="built into the kernel"):
        tree.module("core-thing")


def test_with_modules_dep_the_texts_say_what_there_is(chain: None, opened: Opener, root: Path) -> None:
    (root / "modules.dep").write_text(
        "kernel/top.ko.zst: kernel/low-one.ko\n"
        "no line\n"
        ": kernel/top.ko.zst\n"
        "kernel/middle.ko.xz: kernel/low-one.ko kernel/gone.ko\n"
        "kernel/low-one.ko:\n"
        "kernel/gone.ko:\n"
        "elsewhere/top.ko:\n"
    )
    (root / "modules.alias").write_text(
        "# x\nalias a b top\nalias z:* low_one\nalias\nalias x\nalias broken[ top\n\xff\n"
    )
    (root / "modules.symbols").write_text("alias symbol:sym top\nalias nosym top\n")
    (root / "modules.softdep").write_text("softdep low_one post: gone\nrubbish\n")
    tree = opened()
    assert tree.names() == ["top", "middle", "low_one", "gone"]
    assert tree.depends("top") == ["low_one"]
    assert tree.depends("middle") == []  # as libkmod, which drops the line if a file of it is missing
    assert tree.module("gone").size_bytes is None
    assert tree.resolve_alias("z:1") == ["low_one"]
    assert tree.resolve_alias("symbol:sym") == ["top"]
    assert tree.lookup("nosym") == []
    assert [step.module for step in tree.load_order("top")] == ["low_one", "gone", "top"]
    with pytest.raises(UnknownModule):
        tree.module("extra")
    with pytest.raises(UnreadableModule, match="gone"):
        tree.open_file("gone")


def test_of_several_files_of_a_name_the_one_in_updates_counts(write: Writer, opened: Opener, root: Path) -> None:
    write("kernel/a-b.ko", tags=(("alias", "old"),))
    write("updates/dkms/a_b.ko.xz", tags=(("alias", "new"),))
    write("kernel/c.ko.zst")
    write("kernel/c.ko")
    (root / "build").mkdir()
    write("build/d.ko")
    tree = opened()
    assert sorted(tree.names()) == ["a_b", "c"]
    assert tree.module("a_b").path == "updates/dkms/a_b.ko.xz"
    assert tree.aliases("a-b") == ["new"]
    assert tree.module("c").path == "kernel/c.ko"


def test_cycles_of_all_kinds_end(write: Writer, opened: Opener) -> None:
    write("a.ko", ("a",), ("b",), (("softdep", "pre: c post: a"),))
    write("b.ko", ("b",), ("a", "b"), (("softdep", "pre: a"),))
    write("c.ko", ("c",), ("c",), (("softdep", "pre: loop:1"), ("alias", "loop:*")))
    tree = opened("alias one two\nalias two one\n")
    for name in tree.names():
        assert tree.load_order(name)[-1].kind == "insmod"
        assert name not in tree.depends(name)
    assert tree.load_order("one") == []


def test_a_chain_of_softdeps_longer_than_pythons_stack_is_followed(opened: Opener, root: Path) -> None:
    count = 3000
    for number in range(count):
        (root / f"m{number}.ko").write_bytes(b"")
    tree = opened("".join(f"softdep m{number} pre: m{number + 1}\n" for number in range(count - 1)))
    assert [step.module for step in tree.load_order("m0")] == [f"m{number}" for number in reversed(range(count))]


def test_files_that_are_no_modules_are_listed_without_facts(write: Writer, opened: Opener, root: Path) -> None:
    write("good.ko", wants=("x",))
    for name, content in {"empty": b"", "text": b"hello", "half": (root / "good.ko").read_bytes()[:-300]}.items():
        (root / f"{name}.ko").write_bytes(content)
    (root / "packed.ko.xz").write_bytes(b"not packed")
    tree = opened()
    assert sorted(tree.names()) == ["empty", "good", "half", "packed", "text"]
    for name in ("empty", "text", "half", "packed"):
        assert (tree.aliases(name), tree.depends(name), tree.softdeps(name)) == ([], [], ((), ()))
        assert [step.module for step in tree.load_order(name)] == [name]


def test_texts_of_random_bytes_never_raise(chain: None, opened: Opener, root: Path) -> None:
    seed = 5
    chance = random.Random(seed)
    words = [
        b"alias ",
        b"kernel/top.ko.zst",
        b":",
        b" ",
        b"\n",
        b"\0",
        b"softdep ",
        b"symbol:",
        b"[",
        b"*",
        b"top",
        b".alias=",
    ]
    for number in range(60):
        for name in ("dep", "alias", "symbols", "softdep", "builtin", "builtin.modinfo", "order"):
            text = b"".join(chance.choice([*words, chance.randbytes(3)]) for _ in range(60))
            (root / f"modules.{name}").write_bytes(text)
        if number % 2:
            (root / "modules.dep").unlink()
        tree = opened()
        for text in ("top", "symbol:top", "alias", "a:b"):
            tree.lookup(text)
            assert isinstance(tree.names(), list), f"seed {seed}"


def test_an_open_file_is_the_modules_own_read_only_and_not_inherited(chain: None, opened: Opener, root: Path) -> None:
    fd = opened().open_file("low-one")
    with open(fd, "rb") as file:
        assert not os.get_inheritable(fd)
        assert file.read() == (root / "kernel/low-one.ko").read_bytes()
        with pytest.raises(OSError):
            os.write(fd, b"x")


def test_links_within_the_tree_are_followed(write: Writer, opened: Opener, root: Path) -> None:
    write("extra/real.ko")
    (root / "kernel").mkdir()
    (root / "kernel" / "relative.ko").symlink_to("../extra/../extra/real.ko")
    (root / "kernel" / "absolute.ko").symlink_to(root / "extra" / "real.ko")
    (root / "linked").symlink_to("extra")
    (root / "via.ko").symlink_to("linked/real.ko")
    (root / "loop").symlink_to(".")
    (root / "dangling.ko").symlink_to("nowhere.ko")
    (root / "self.ko").symlink_to("self.ko")
    tree = opened()
    assert sorted(tree.names()) == ["absolute", "real", "relative", "via"]
    for name in tree.names():
        with open(tree.open_file(name), "rb") as file:
            assert file.read() == (root / "extra" / "real.ko").read_bytes()


@pytest.mark.parametrize("with_texts", [False, True])
def test_a_link_out_of_the_tree_is_not_listed_and_never_opened(
    write: Writer, opened: Opener, root: Path, tmp_path: Path, with_texts: bool
) -> None:
    write("real.ko")
    (tmp_path / "secret.ko").write_bytes(b"secret")
    (root / "out.ko").symlink_to("../secret.ko")
    (root / "far-out.ko.xz").symlink_to(tmp_path / "secret.ko")
    (root / "dots.ko").symlink_to("../6.1-test/../secret.ko")
    (root / "dir").symlink_to("..")
    if with_texts:
        lines = [
            "real.ko:",
            "out.ko:",
            "far-out.ko.xz:",
            "dots.ko:",
            f"{tmp_path}/absolute.ko:",
            "../up.ko:",
            "dir/secret.ko:",
        ]
        (root / "modules.dep").write_text("\n".join(lines) + "\n")
    tree = opened()
    assert tree.names() == ["real"]
    for name in ["out", "far_out", "dots", *(["absolute", "up", "secret"] if with_texts else [])]:
        for ask in (tree.module, tree.open_file, tree.load_order, tree.resolve_alias, tree.depends):
            with pytest.raises(OutsideTree, match="leads out of the module tree") as caught:
                ask(name)
            assert isinstance(caught.value, Forbidden)
        with pytest.raises(OutsideTree):
            tree.module(name.replace("_", "-"))


def test_a_link_out_of_the_tree_does_not_hide_a_module_of_the_same_name(
    write: Writer, opened: Opener, root: Path
) -> None:
    write("kernel/a.ko")
    (root / "updates").mkdir()
    (root / "updates" / "a.ko").symlink_to("/etc/hostname")
    assert opened().module("a").path == "kernel/a.ko"


def test_a_file_swapped_for_something_else_is_not_opened(
    write: Writer, opened: Opener, root: Path, tmp_path: Path
) -> None:
    names = ("link", "pipe", "directory", "socket", "gone")
    for name in names:
        write(f"sub/{name}.ko")
    write("moved/inner.ko")
    tree = opened()
    for name in names:
        (root / "sub" / f"{name}.ko").unlink()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "inner.ko").write_bytes(b"secret")
    (root / "sub" / "link.ko").symlink_to(tmp_path / "secret" / "inner.ko")
    os.mkfifo(root / "sub" / "pipe.ko")
    (root / "sub" / "directory.ko").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(root / "sub" / "socket.ko"))
    (root / "moved" / "inner.ko").unlink()
    (root / "moved").rmdir()
    (root / "moved").symlink_to(tmp_path / "secret")
    for name in ("link", "inner"):
        with pytest.raises(OutsideTree):
            tree.open_file(name)
    for name in ("pipe", "directory", "socket", "gone"):
        with pytest.raises(UnreadableModule, match=f"sub/{name}.ko"):
            tree.open_file(name)


def test_pipes_sockets_and_directories_named_as_modules_are_passed_over(
    write: Writer, opened: Opener, root: Path
) -> None:
    write("real.ko")
    os.mkfifo(root / "pipe.ko")
    os.mkfifo(root / "modules.dep")
    (root / "directory.ko").mkdir()
    write("directory.ko/inner.ko.gz")
    assert sorted(opened().names()) == ["inner", "real"]


@pytest.mark.parametrize("name", ["../x", "a/b", "a\0b", "x\n", "y" * 300, ""])
def test_names_that_no_module_has_are_refused_by_every_question(chain: None, opened: Opener, name: str) -> None:
    tree = opened()
    for ask in (
        tree.module,
        tree.open_file,
        tree.load_order,
        tree.resolve_alias,
        tree.lookup,
        tree.depends,
        tree.is_builtin,
    ):
        with pytest.raises(BadModuleName) as caught:
            ask(name)
        assert isinstance(caught.value, BadRequest)


def test_an_unknown_module_is_named(chain: None, opened: Opener) -> None:
    tree = opened()
    for ask in (tree.module, tree.open_file, tree.load_order, tree.resolve_alias, tree.show_depends):
        with pytest.raises(
            UnknownModule, match=r"'no-such' is not a module or alias in the module tree 6\.1-test"
        ) as caught:
            ask("no-such")
        assert isinstance(caught.value, NotFound)
    assert tree.lookup("no-such") == []


def test_roots_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, words in (
        (tmp_path / "missing", "no directory"),
        (file, "not a directory"),
        (file / "below", "can't be looked into"),
        (loop, "can't be looked into"),
        (tmp_path / ("x" * 300), "can't be looked into"),
    ):
        with pytest.raises(TreeNotFound, match=words) as caught:
            open_tree(path, cache_dir=tmp_path)
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, TreeError)


def test_a_root_file_system_means_its_only_release(write: Writer, root: Path, tmp_path: Path) -> None:
    write("kernel/a.ko")
    modules = tmp_path / "fs" / "lib" / "modules"
    modules.mkdir(parents=True)
    root.rename(modules / "6.1")
    tree = open_tree(tmp_path / "fs", cache_dir=tmp_path / "cache")
    assert (tree.release, tree.names(), tree.root) == ("6.1", ["a"], modules / "6.1")
    (modules / "6.2").mkdir()
    with pytest.raises(TreeNotFound, match=r"2 releases, name one: 6\.1, 6\.2"):
        open_tree(tmp_path / "fs", cache_dir=tmp_path / "cache")
    assert open_tree(modules / "6.2", cache_dir=tmp_path / "cache").names() == []


def test_the_golden_tree_says_the_same_with_and_without_its_texts(shared_dir: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_dir / "data" / "golden" / "boots" / "modroot.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = (tmp_path / "lib" / "modules").iterdir()
    from_texts = open_tree(root, cache_dir=tmp_path / "cache")
    (root / "modules.dep").unlink()
    from_files = open_tree(root, cache_dir=tmp_path / "cache")
    assert len(from_files.names()) == 418
    assert from_files.names() == from_texts.names()
    assert from_files.identity == from_texts.identity
    for name in from_files.names():
        assert from_files.show_depends(name) == from_texts.show_depends(name)
        assert from_files.aliases(name) == from_texts.aliases(name)
        assert from_files.softdeps(name) == from_texts.softdeps(name)
