"""The real kmod is the judge: every module and a thousand aliases of whole Debian kernels, and made-up trees."""

import itertools
import lzma
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from loader_svc.trees import ModuleTree, UnknownModule, open_tree
from loader_svc.trees.debian import DebianKernel, DebianUnavailable, fetch_debian, kernel_packages
from loader_svc.trees.facts import facts_of
from loader_svc.trees.names import compression

SEED = int(os.environ.get("MODPRESSURE_TEST_SEED", "20230311"))
ALIASES = 1000
MADE_UP_TREES = 60


class Kmod:
    """The tools of the installed kmod."""

    def __init__(self) -> None:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        found = {name: shutil.which(name, path=path) for name in ("modprobe", "depmod")}
        if missing := [name for name, tool in found.items() if tool is None]:
            pytest.skip(f"kmod is missing here: no {' and no '.join(missing)}")
        self._tools = {name: str(tool) for name, tool in found.items()}
        self._env = {name: value for name, value in os.environ.items() if name != "MODPROBE_OPTIONS"}
        self.version = self._run("modprobe", "--version").stdout.splitlines()[0]

    def depmod(self, base: Path, release: str) -> None:
        """Write modules.* of the tree base/lib/modules/release."""
        done = self._run("depmod", "-b", str(base), release)
        assert done.returncode == 0, done.stderr

    def ask(self, root: Path, config: Path, option: str, texts: Sequence[str]) -> list[str]:
        """What modprobe prints for all texts, one after the other."""
        base, release = root.parents[2], root.name
        done = self._run("modprobe", "-a", "-d", str(base), "-S", release, "-C", str(config), option, "--", *texts)
        return done.stdout.split("\n")[:-1]

    def _run(self, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([self._tools[tool], *arguments], capture_output=True, env=self._env, timeout=100)
        output, errors = os.fsdecode(done.stdout), os.fsdecode(done.stderr)  # the bytes as they are, line ends too
        return subprocess.CompletedProcess(done.args, done.returncode, output, errors)


@dataclass
class Judged:
    """One tree, read from its files alone and from the texts of depmod, and who is to judge it."""

    kmod: Kmod
    config: Path
    by_source: dict[str, ModuleTree]

    @property
    def root(self) -> Path:
        return self.by_source["texts"].root

    def show_depends(self, texts: Sequence[str]) -> None:
        """Compare the lines that show what each text loads."""
        self._compare("--show-depends", texts, "show_depends")

    def resolve_alias(self, texts: Sequence[str]) -> None:
        """Compare the names that each text stands for."""
        self._compare("--resolve-alias", texts, "resolve_alias")

    def _compare(self, option: str, texts: Sequence[str], method: str) -> None:
        theirs = self.kmod.ask(self.root, self.config, option, texts)
        for source, tree in self.by_source.items():
            at = 0
            for text in texts:
                try:
                    ours = getattr(tree, method)(text)
                except UnknownModule:
                    ours = []
                if theirs[at : at + len(ours)] != ours:
                    alone = self.kmod.ask(self.root, self.config, option, [text])
                    assert ours == alone, f"{self.root}, from {source}: {option} {text}"
                at += len(ours)
            # Where one answer was too short, kmod's goes on behind it, and the next comparison met that.
            assert at == len(theirs), f"{self.root}, from {source}: {option}: {theirs[at:][:10]}"


def judge(kmod: Kmod, root: Path, config: Path, cache: Path, dirs: Sequence[Path] = ()) -> Judged:
    """Read the tree from its files, let depmod write its texts, read it from these."""
    given = {"cache_dir": cache, "modprobe_dirs": dirs, "kernel_command_line": Path("/proc/cmdline").read_text()}
    from_files = open_tree(root, **given)
    kmod.depmod(root.parents[2], root.name)
    return Judged(kmod, config, {"files": from_files, "texts": open_tree(root, **given)})


@pytest.fixture(scope="module")
def kmod() -> Kmod:
    return Kmod()


@pytest.fixture(scope="module", params=["newest", "newest of another series"])
def debian(request: pytest.FixtureRequest, kmod: Kmod) -> Iterator[tuple[DebianKernel, Judged]]:
    """A whole Debian kernel. The two that apt knows here differ: Debian packs the files of 6.12, not those of 6.1."""
    try:
        packages = kernel_packages()
        if not packages:
            pytest.skip("apt knows no kernel package")
        package = packages[0]
        if request.param != "newest":
            others = [other for other in packages if series(other) != series(package)]
            if not others:
                pytest.skip(f"apt knows kernels of one series only, {series(package)}")
            package = others[0]
        kernel = fetch_debian(package)
    except DebianUnavailable as error:
        pytest.skip(f"no Debian kernel to be had: {error}")
    # Beside the unpacked package, so that the files need not be copied but linked.
    with tempfile.TemporaryDirectory(prefix=".test-", dir=kernel.root.parents[4]) as work:
        root = Path(work) / "lib" / "modules" / kernel.root.name
        shutil.copytree(kernel.root, root, copy_function=os.link)
        config = Path(work) / "modprobe.d"
        config.mkdir()
        judged = judge(kmod, root, config, Path(work) / "cache")
        say(
            request,
            f"{kernel.package} {kernel.version}: {len(judged.by_source['files'].names())} modules, {kmod.version}",
        )
        yield kernel, judged


def say(request: pytest.FixtureRequest, line: str) -> None:
    """Print a line that is seen in a run that passes, too."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        sys.stdout.write(f"\n{line}\n")


def series(package: str) -> str:
    return ".".join(re.findall(r"[0-9]+", package)[:2])


@pytest.mark.timeout(1800)  # a download of 100 MB may be part of it
def test_every_module_of_a_debian_kernel_loads_in_the_order_of_modprobe(debian: tuple[DebianKernel, Judged]) -> None:
    kernel, judged = debian
    names = judged.by_source["files"].names()
    assert len(names) == len({path for path in kernel.root.rglob("*.ko*") if compression(path.name) is not None})
    assert len(names) > 3000
    judged.show_depends(names)


@pytest.mark.timeout(1800)
def test_a_thousand_aliases_of_a_debian_kernel_resolve_as_with_modprobe(debian: tuple[DebianKernel, Judged]) -> None:
    _, judged = debian
    sys.stdout.write(f"seed {SEED}\n")
    chance = random.Random(SEED)
    patterns = [line.split()[1] for line in (judged.root / "modules.alias").read_text().splitlines()[1:]]
    symbols = [line.split()[1] for line in (judged.root / "modules.symbols").read_text().splitlines()[1:]]
    tags = (judged.root / "modules.builtin.modinfo").read_text(errors="surrogateescape").split("\0")
    builtin = [tag.partition("=")[2] for tag in tags if ".alias=" in tag]
    tree = judged.by_source["texts"]
    texts = [instance(chance.choice(patterns), chance) for _ in range(ALIASES)]
    texts += [instance(pattern, chance) for pattern in builtin] + tree.builtin
    texts += chance.sample(symbols, 100) + chance.sample(patterns, 20)  # patterns themselves, too, are texts
    texts += [spoiled(name, chance) for name in chance.sample(tree.names(), 200)]
    texts += ["no_such_module", "pci:none", "symbol:none", "half[a", "half]a", "*", "pci:*", "acpi*:*", "usb:v*"]
    chance.shuffle(texts)
    judged.resolve_alias(texts)
    judged.show_depends(texts)


@pytest.mark.timeout(1800)
def test_the_whole_kernel_has_one_identity_wherever_it_is_and_the_cache_gives_the_same(
    debian: tuple[DebianKernel, Judged],
) -> None:
    kernel, judged = debian
    work = judged.root.parents[2]
    before = judged.by_source["texts"]
    cached = open_tree(judged.root, cache_dir=work / "cache")
    elsewhere = open_tree(kernel.root, cache_dir=work / "cache")
    assert cached.identity == judged.by_source["files"].identity == elsewhere.identity
    assert [cached.show_depends(name) for name in cached.names()] == [
        before.show_depends(name) for name in before.names()
    ]
    assert [cached.aliases(name) for name in cached.names()[:50]] == [
        list(facts_of(str(cached.root / cached.module(name).path), cached.module(name).compression).aliases)
        for name in cached.names()[:50]
    ]


def test_kernel_packages_are_listed_newest_first_as_dpkg_compares_versions() -> None:
    try:
        packages = kernel_packages()
    except DebianUnavailable as error:
        pytest.skip(f"no Debian kernel to be had: {error}")
    if len(packages) < 2:
        pytest.skip(f"apt knows too few kernel packages to compare: {packages}")
    versions = [package.removeprefix("linux-image-") for package in packages]
    for newer, older in itertools.pairwise(versions):
        assert subprocess.run(["dpkg", "--compare-versions", newer, "gt", older], timeout=100).returncode == 0


@pytest.mark.parametrize("number", range(MADE_UP_TREES))
def test_a_made_up_tree_with_configuration_resolves_as_with_modprobe(number: int, kmod: Kmod, tmp_path: Path) -> None:
    sys.stdout.write(f"seed {SEED} + {number}\n")
    chance = random.Random(SEED + number)
    root = tmp_path / "lib" / "modules" / "6.1-test"
    maker = TreeMaker(chance, root)
    maker.make()
    config = tmp_path / "modprobe.d"
    config.mkdir()
    for name in chance.sample(["a.conf", "modules.conf", "z.conf", "m.alias", "modules.softdep.conf"], 3):
        (config / name).write_text("".join(maker.config_line() for _ in range(chance.randrange(1, 12))))
    (config / "ignored.txt").write_text(f"blacklist {maker.names[0]}\nalias other {maker.names[0]}\n")
    judged = judge(kmod, root, config, tmp_path / "cache", [config])
    judged.resolve_alias(maker.texts())
    judged.show_depends(maker.texts())
    judged.show_depends(sorted(judged.by_source["files"].names()))


def test_options_of_the_caller_go_behind_those_of_the_configuration(kmod: Kmod, tmp_path: Path) -> None:
    root = tmp_path / "lib" / "modules" / "6.1-test"
    (root / "kernel").mkdir(parents=True)
    (root / "kernel" / "one.ko").write_bytes(module_image(gives=["one_symbol"]))
    (root / "kernel" / "two.ko").write_bytes(module_image(wants=["one_symbol"]))
    config = tmp_path / "modprobe.d"
    config.mkdir()
    (config / "x.conf").write_text("options two a=1\noptions one c=3\n")
    kmod.depmod(tmp_path, root.name)
    tree = open_tree(root, cache_dir=tmp_path / "cache", modprobe_dirs=[config])
    ours = tree.show_depends("two", "b=2 d")
    base = ["modprobe", "-d", str(tmp_path), "-S", root.name, "-C", str(config), "--show-depends", "two", "b=2", "d"]
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    theirs = subprocess.run(base, capture_output=True, text=True, env={"PATH": path}, timeout=100, check=True)
    assert ours == theirs.stdout.splitlines()
    assert ours[-1].endswith(" a=1 b=2 d")


def instance(pattern: str, chance: random.Random) -> str:
    """A text that the pattern matches, or, now and then, nearly."""
    text = re.sub(r"\[(.)[^\]]*\]", r"\1", pattern)
    text = re.sub(r"\*", lambda _: chance.choice(["", "x", "00000001", "a:b", "-"]), text).replace("?", "z")
    return spoiled(text, chance) if chance.random() < 0.1 else text


def spoiled(text: str, chance: random.Random) -> str:
    """The text with one letter changed, or with the other of "-" and "_"."""
    if chance.random() < 0.5:
        return text.replace("_", "-")
    at = chance.randrange(len(text))
    return text[:at] + chance.choice("aZ0") + text[at + 1 :]


@dataclass
class TreeMaker:
    """Makes small trees and configurations with all that there may be in them."""

    chance: random.Random
    root: Path

    def __post_init__(self) -> None:
        letters = ["net", "snd-hda", "crc32", "xt_mark", "usb-x", "i2c", "a", "ab", "abc", "b-c_d", "zz", "virtio", "é"]
        self.names = [
            f"{name}{self.chance.choice(['', '-core', '_v2'])}" for name in letters[: self.chance.randrange(3, 13)]
        ]
        self.aliases = ["pci:v*d0001sv*", "pci:v0001d*", "usb:v[0-9a]p?*", "char-major-10-2", "of:N*T*Cx,y-z", "plain"]
        self.aliases += [
            "fs-thing",
            "pci:v0001d0001sv*",
            "odd[a-",
            "dev[0-9]-x",
            "*",
            "acpi*:LNX?:*",
            "net-pf-*",
            "p*n",
        ]
        self.builtin = ["core_thing", "other-thing"]

    def make(self) -> None:
        """Write the tree."""
        for place, name in enumerate(self.names):
            wanted = [
                f"sym_{other}" for other in self.chance.sample(range(place), min(place, self.chance.randrange(4)))
            ]
            tags = [f"alias={self.chance.choice(self.aliases)}" for _ in range(self.chance.randrange(4))]
            tags += [f"softdep={self.softdep()}" for _ in range(self.chance.choice([0, 0, 0, 1, 2]))]
            gives = [f"sym_{place}", "shared"] if self.chance.random() < 0.8 else []
            image = module_image(gives, [*wanted, "printk"], ["license=GPL", *tags], crcs=self.chance.random() < 0.5)
            self.write(self.chance.choice(["kernel", "kernel/drivers", "extra", "updates", "."]), name, image)
        # Of two equally good files depmod takes the one that its directory happens to list first: so one is better.
        if self.chance.random() < 0.3 and not list((self.root / "updates").glob(f"{self.names[0]}.ko*")):
            self.write("updates/dkms", self.names[0], module_image(gives=["sym_0"], tags=["alias=from-updates"]))
        if self.chance.random() < 0.7:
            paths = [str(path.relative_to(self.root)) for path in self.root.rglob("*.ko*")]
            listed = self.chance.sample(paths, self.chance.randrange(len(paths) + 1))
            text = "".join(re.sub(r"\.ko.*", ".ko", path) + "\n" for path in listed)
            (self.root / "modules.order").write_text(text if self.chance.random() < 0.9 else text.rstrip())
        (self.root / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in self.builtin) + "0bad\n")
        tags = [
            f"{self.chance.choice(['core_thing', 'other_thing', 'third'])}.alias={alias}\0" for alias in self.aliases
        ]
        self.chance.shuffle(tags)
        (self.root / "modules.builtin.modinfo").write_text("core_thing.license=GPL\0" + "".join(tags * 2))

    def write(self, directory: str, name: str, image: bytes) -> None:
        """Write one module file, packed or not."""
        packing = self.chance.choice(["", "", ".xz", ".zst"])
        packed = {"": image, ".xz": lzma.compress(image, check=lzma.CHECK_CRC32), ".zst": zstandard.compress(image)}
        path = self.root / directory / f"{name}.ko{packing}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed[packing])

    def texts(self) -> list[str]:
        """Names and aliases to ask for, known and unknown."""
        found = [*self.names, *self.builtin, "from-updates", "third", "nobody", "cmd-only", "conf-alias", "x y"]
        found += [instance(alias, random.Random(number)) or "x" for alias in self.aliases for number in range(3)]
        found += [f"symbol:sym_{place}" for place in range(len(self.names))] + [
            "symbol:shared",
            "symbol:",
            "pci:*",
            "p*",
        ]
        return found

    def target(self) -> str:
        """Something that a line may lead to."""
        return self.chance.choice(
            [*self.names, *self.builtin, "nobody", "char-major-10-2", "plain", "fs-thing", "conf-alias"]
        )

    def subject(self) -> str:
        """Something that a line may be about: a name, or a pattern."""
        return self.chance.choice(
            [*self.names, self.names[0][:1] + "*", "?" + self.names[0][1:], "*", "conf-alias", "plain"]
        )

    def softdep(self) -> str:
        """The words of a soft dependency."""
        words = [f"{kind} {self.target()} {self.target()}" for kind in ("pre:", "post:")]
        return self.chance.choice(
            [words[0], words[1], " ".join(words), f"{self.target()} {words[0]}", "pre:", " " + words[0]]
        )

    def config_line(self) -> str:
        """One line of configuration, now and then a bad or an odd one."""
        blank = self.chance.choice([" ", " ", "  ", "\t", " \t", "   "])
        line = blank.join(
            self.chance.choice(
                [
                    [
                        "alias",
                        self.chance.choice(["conf-alias", "conf*", "pci:v*", "fs-[a-z]*", "p[!a]*n", "al\\ias"]),
                        self.target(),
                    ],
                    ["alias", self.chance.choice(["conf-alias", "plain"]), self.target(), "trailing"],
                    ["blacklist", self.target()],
                    ["options", self.subject(), "one=1\ttwo=2"],
                    ["options", self.target(), f"n={self.chance.randrange(9)}"],
                    ["install", self.chance.choice([self.subject(), "cmd-only"]), "/bin/echo $CMDLINE_OPTS \\\n  more"],
                    ["remove", self.chance.choice([self.target(), "cmd-only"]), "/bin/true"],
                    ["softdep", self.subject(), self.softdep()],
                    ["softdep", self.target(), self.softdep()],
                    ["#", "alias", "conf-alias", "nobody"],
                    ["options"],
                    ["alias", "half[a", self.target()],
                    ["nonsense", "x"],
                    ["", "blacklist", self.target()],
                ]
            )
        )
        return line + self.chance.choice(["\n", "\n", "\n", " \n", "\n\n", "\r\n" if "install" not in line else "\n"])


def module_image(
    gives: Sequence[str] = (), wants: Sequence[str] = (), tags: Sequence[str] = (), *, crcs: bool = False
) -> bytes:
    """A small ELF file with what depmod looks for: .modinfo, exported and undefined symbols."""
    strings = b"\0"
    symbols = bytes(24)
    for name, home in [(f"__crc_{name}", 0xFFF1) for name in gives if crcs] + [(name, 0) for name in wants]:
        symbols += struct.pack("<IBBHQQ", len(strings), 0x10, 0, home, 0, 0)
        strings += name.encode() + b"\0"
    contents = {
        "": b"",
        ".modinfo": b"".join(tag.encode() + b"\0" for tag in tags),
        "__ksymtab_strings": b"".join(name.encode() + b"\0" for name in gives),
        ".symtab": symbols,
        ".strtab": strings,
    }
    names = b"\0" + b"".join(name.encode() + b"\0" for name in [*contents, ".shstrtab"] if name)
    contents[".shstrtab"] = names
    image = bytes(64)
    table = b""
    for name, content in contents.items():
        kind = {"": 0, ".symtab": 2, ".strtab": 3, ".shstrtab": 3}.get(name, 1)
        offset = names.index(b"\0" + name.encode() + b"\0") + 1 if name else 0
        table += struct.pack("<IIQQQQIIQQ", offset, kind, 0, 0, len(image), len(content), 0, 0, 1, 0)
        image += content
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\2\1\1",
        1,
        62,
        1,
        0,
        0,
        len(image),
        0,
        64,
        0,
        0,
        64,
        len(contents),
        len(contents) - 1,
    )
    return header + image[64:] + table
