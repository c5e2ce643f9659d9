"""A tree is indexed once, and again as soon as anything in it changes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loader_svc.trees import ModuleTree, open_tree
from loader_svc.trees.cache import MAX_FILES, IndexCache
from loader_svc.trees.index import TreeIndex
from loader_svc.trees.scan import scan_tree


@pytest.fixture
def root(tmp_path: Path, make_module: Callable) -> Path:
    path = tmp_path / "tree" / "6.1-test"
    (path / "kernel").mkdir(parents=True)
    for name in ("a", "b"):
        image = make_module(name, tags=[("alias", f"dev:{name}")]).bytes()
        (path / "kernel" / f"{name}.ko").write_bytes(image)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(cache: Path) -> list[Path]:
    return sorted((cache / "trees").iterdir())


def contents(tree: ModuleTree) -> list[tuple[str, list[str], list[str]]]:
    return [(name, tree.aliases(name), tree.show_depends(name)) for name in tree.names()]


def test_the_second_opening_reads_no_module(root: Path, cache: Path) -> None:
    first = open_tree(root, cache_dir=cache)
    (file,) = files(cache)
    image = (root / "kernel/a.ko").read_bytes()
    stamp = (root / "kernel/a.ko").stat()
    # Other contents that nothing but reading them could tell.
    (root / "kernel/a.ko").write_bytes(image.replace(b"dev:a", b"DEV:A"))
    os.utime(root / "kernel/a.ko", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = open_tree(root, cache_dir=cache)
    assert contents(again) == contents(first)
    assert files(cache) == [file]
    file.unlink()
    assert open_tree(root, cache_dir=cache).aliases("a") == ["DEV:A"]


def test_every_change_of_the_tree_is_seen(root: Path, cache: Path) -> None:
    def touch() -> None:
        os.utime(root / "kernel/a.ko", ns=(0, 12345))

    def grow() -> None:
        path = root / "kernel/b.ko"
        stamp = path.stat()
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    def order() -> None:
        (root / "modules.order").write_text("kernel/b.ko\nkernel/a.ko\n")

    def add() -> None:
        (root / "kernel/c.ko").write_bytes(b"")

    def link() -> None:
        (root / "kernel/out.ko").symlink_to("/etc/hostname")

    def rename() -> None:
        (root / "kernel").rename(root / "other")

    def texts() -> None:
        (root / "modules.dep").write_text("other/a.ko:\n")

    def builtin() -> None:
        (root / "modules.builtin").write_text("core.ko\n")

    open_tree(root, cache_dir=cache)
    for count, change in enumerate((touch, grow, order, add, link, rename, texts, builtin), 2):
        change()
        open_tree(root, cache_dir=cache)
        assert len(files(cache)) == count, change.__name__
    assert open_tree(root, cache_dir=cache).names() == ["a"]


def test_a_copy_with_the_same_times_shares_the_index_and_the_identity(root: Path, cache: Path, tmp_path: Path) -> None:
    first = open_tree(root, cache_dir=cache)
    copy = tmp_path / "elsewhere"
    os.symlink(root.parent, copy)
    again = open_tree(copy / root.name, cache_dir=cache)
    assert len(files(cache)) == 1
    assert again.identity == first.identity
    assert again.show_depends("a") == [f"insmod {copy / root.name}/kernel/a.ko "]


def test_the_identity_is_of_paths_and_lengths_only(root: Path, cache: Path) -> None:
    first = open_tree(root, cache_dir=cache).identity
    os.utime(root / "kernel/a.ko", ns=(0, 0))
    (root / "modules.order").write_text("kernel/a.ko\n")
    (root / "README").write_text("not a module")
    assert open_tree(root, cache_dir=cache).identity == first
    (root / "kernel/a.ko").write_bytes(b"shorter")
    second = open_tree(root, cache_dir=cache).identity
    assert second != first
    (root / "kernel/a.ko").rename(root / "kernel/aa.ko")
    assert open_tree(root, cache_dir=cache).identity not in (first, second)


def test_configuration_is_read_anew_each_time(root: Path, cache: Path, tmp_path: Path) -> None:
    config = tmp_path / "x.conf"
    for word in ("one", "two"):
        config.write_text(f"options a {word}\n")
        tree = open_tree(root, cache_dir=cache, modprobe_dirs=[config])
        assert tree.load_order("a")[0].options == f"{word} "
    assert len(files(cache)) == 1


def test_damaged_and_foreign_files_are_replaced(root: Path, cache: Path) -> None:
    good = contents(open_tree(root, cache_dir=cache))
    (file,) = files(cache)
    whole = file.read_bytes()
    header, _, body = whole.partition(b"\n")
    for damaged in (
        b"",
        b"\x80\x04\x95cos\nsystem\n",
        whole[:-1],
        whole.replace(b"kernel/a", b"kernel/x"),
        header + b"\n" + b"[" * 200_000,
        header.replace(b"index 1", b"index 0") + b"\n" + body,
        body,
    ):
        file.write_bytes(damaged)
        assert contents(open_tree(root, cache_dir=cache)) == good
        assert file.read_bytes() == whole
    file.unlink()
    file.mkdir()
    assert contents(open_tree(root, cache_dir=cache)) == good


@pytest.mark.parametrize(
    "change",
    [
        {"paths": "kernel"},
        {"paths": [1, 2]},
        {"sizes_bytes": [1]},
        {"sizes_bytes": [True, False]},
        {"depends": [[0], [7]]},
        {"depends": [[-1], []]},
        {"depends": [["0"], []]},
        {"alias_modules": []},
        {"unknown": []},
        {"outside": None},
    ],
)
def test_an_index_that_does_not_fit_together_is_not_taken_even_with_a_right_checksum(
    root: Path, cache: Path, change: dict[str, object]
) -> None:
    open_tree(root, cache_dir=cache)
    (file,) = files(cache)
    fingerprint = file.stem
    fields = {**json.loads(file.read_bytes().partition(b"\n")[2]), **change}
    body = json.dumps(fields).encode()
    checksum = hashlib.sha256(body).hexdigest().encode()
    header = file.read_bytes().partition(b"\n")[0].rpartition(b" ")[0]
    file.write_bytes(header + b" " + checksum + b"\n" + body)
    assert IndexCache(cache).load(fingerprint) is None


def test_where_nothing_can_be_kept_the_tree_opens_all_the_same(root: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    assert sorted(open_tree(root, cache_dir=nowhere).names()) == ["a", "b"]


def test_the_default_is_the_users_cache_directory(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_tree(root)
    assert len(files(tmp_path / "xdg" / "modpressure")) == 1


def test_only_so_many_indexes_are_kept_and_no_half_ones(cache: Path) -> None:
    kept = IndexCache(cache)
    for number in range(MAX_FILES + 5):
        kept.store(f"{number:064x}", TreeIndex())
        os.utime(cache / "trees" / f"{number:064x}.index", ns=(number, number))
    assert len(files(cache)) == MAX_FILES
    assert kept.load(f"{MAX_FILES + 4:064x}") == TreeIndex()
    assert kept.load(f"{0:064x}") is None
    assert all(path.suffix == ".index" for path in files(cache))


def test_a_scan_tells_what_it_found(root: Path) -> None:
    (root / "modules.order").write_text("x\n")
    (root / "kernel/out.ko").symlink_to("/etc/hostname")
    scan = scan_tree(root)
    assert sorted(scan.files) == ["kernel/a.ko", "kernel/b.ko"]
    assert scan.outside == ["kernel/out.ko"]
    assert scan.texts == {"modules.order": b"x\n"}
