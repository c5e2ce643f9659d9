import re
from pathlib import Path

import pytest

from modpressure.settings import (
    BadSetting,
    ClientSettings,
    LoaderSettings,
    Settings,
    StatsSettings,
    load_settings,
    parse_settings,
)
from modpressure.settings_sources import default_text, flag, setting_names, variable

DOCS = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place without variables and files of whoever runs the tests; returns the current directory."""
    import os

    for name in list(os.environ):
        if name.startswith("MODPRESSURE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], cls: type[Settings] = LoaderSettings) -> str:
    """Return the one line on standard error with which a command line is refused."""
    with pytest.raises(SystemExit) as raised:
        parse_settings(cls, argv, "prog")
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(" (see prog --help)\n")
    assert err.count("\n") == 1
    return err.removeprefix("prog: ").removesuffix(" (see prog --help)\n")


def test_defaults() -> None:
    stats = load_settings(StatsSettings)
    assert (stats.listen, stats.lease_seconds, stats.grace_seconds, stats.reflection) == (
        "127.0.0.1:50050",
        10,
        10,
        True,
    )
    assert (stats.log_level, stats.log_format) == ("info", "auto")
    assert stats.database.endswith("/modpressure/modpressure.sqlite3")
    loader = load_settings(LoaderSettings)
    assert (loader.listen, loader.stats, loader.tree) == ("127.0.0.1:50051", "127.0.0.1:50050", "catalogue")
    assert (loader.kmod, loader.threads, loader.modprobe_dirs) == (34, 4, [])
    assert loader.image_limit_bytes == 256 * 1024**2
    client = load_settings(ClientSettings)
    assert (client.loaders, client.stats) == (["127.0.0.1:50051"], "127.0.0.1:50050")
    assert (client.timeout_seconds, client.system) == (60, "default")


def test_flag_beats_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch, nothing_set: Path) -> None:
    def threads(*argv: str) -> int:
        return parse_settings(LoaderSettings, argv, "prog").threads

    assert threads() == 4
    (nothing_set / "modpressure.toml").write_text("[loader]\nthreads = 5\nkmod = 30\n[stats]\nlease_seconds = 3\n")
    assert threads() == 5
    monkeypatch.setenv("MODPRESSURE_LOADER_THREADS", "6")
    assert threads() == 6
    assert threads("--threads", "7") == 7
    assert threads("--threads=7") == 7
    assert load_settings(LoaderSettings).kmod == 30
    assert load_settings(StatsSettings).lease_seconds == 3


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODPRESSURE_LOADER_TREE", "")
    assert load_settings(LoaderSettings).tree == "catalogue"


def test_the_first_file_there_is_counts(monkeypatch: pytest.MonkeyPatch, nothing_set: Path, tmp_path: Path) -> None:
    def write(path: Path, threads: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[loader]\nthreads = {threads}\n")
        return path

    write(tmp_path / "config" / "modpressure" / "modpressure.toml", 11)
    assert load_settings(LoaderSettings).threads == 11
    write(nothing_set / "modpressure.toml", 12)
    assert load_settings(LoaderSettings).threads == 12
    monkeypatch.setenv("MODPRESSURE_CONFIG", str(write(tmp_path / "other.toml", 13)))
    assert load_settings(LoaderSettings).threads == 13
    told = write(tmp_path / "told.toml", 14)
    assert load_settings(LoaderSettings, config=told).threads == 14
    assert parse_settings(LoaderSettings, ["--config", str(told)], "prog").threads == 14


def test_lists_are_given_with_commas_or_repeated_or_as_toml_lists(
    monkeypatch: pytest.MonkeyPatch, nothing_set: Path
) -> None:
    def dirs(*argv: str) -> list[str]:
        return parse_settings(LoaderSettings, argv, "prog").modprobe_dirs

    assert dirs("--modprobe-dirs", "/a, /b", "--modprobe-dirs", "/c") == ["/a", "/b", "/c"]
    (nothing_set / "modpressure.toml").write_text('[loader]\nmodprobe_dirs = ["/d", "/e"]\n')
    assert dirs() == ["/d", "/e"]
    monkeypatch.setenv("MODPRESSURE_LOADER_MODPROBE_DIRS", "/f,/g")
    assert dirs() == ["/f", "/g"]


def test_a_switch_can_be_set_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not parse_settings(StatsSettings, ["--no-reflection"], "prog").reflection
    monkeypatch.setenv("MODPRESSURE_STATS_REFLECTION", "false")
    assert not load_settings(StatsSettings).reflection
    assert parse_settings(StatsSettings, ["--reflection"], "prog").reflection


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--threads", "0"], "--threads: '0': input should be greater than or equal to 1"),
        (["--threads", "x"], "--threads: 'x': input should be a valid integer, unable to parse string as an integer"),
        (["--kmod", "31"], "--kmod: '31': input should be 30 or 34"),
        (["--memory-limit", "120%"], "--memory-limit: '120%' is more than there is"),
        (["--memory-limit", "0"], "--memory-limit: '0': it must be more than 0"),
        (["--message-limit", "16383"], "--message-limit: '16383': it must be at least 16384 bytes"),
        (["--image-limit", "50%"], "--image-limit: '50%' is a share, but of what? Give bytes, such as 512MiB"),
        (["--listen", "here"], "--listen: 'here' is not HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051"),
        (["--listen", "::1:5"], "--listen: '::1:5' is not HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051"),
        (["--stats", "a:65536"], "--stats: 'a:65536' is not HOST:PORT with a port of 0 to 65535"),
        (["--stats", "dns:///a"], "--stats: 'dns:///a' is not dns:///HOST:PORT"),
        (["--grace-seconds", "-1"], "--grace-seconds: '-1': input should be greater than or equal to 0"),
        (["--grace-seconds", "inf"], "--grace-seconds: 'inf': input should be a finite number"),
        (["--log-level", "loud"], "--log-level: 'loud': input should be 'debug', 'info', 'warning' or 'error'"),
        (["--threds", "3"], "unrecognized arguments: --threds 3"),
        (["--thread", "3"], "unrecognized arguments: --thread 3"),
        (["stray"], "unrecognized arguments: stray"),
        (["--threads"], "argument --threads: expected one argument"),
        (["--tree", ""], "--tree: '': string should have at least 1 character"),
    ],
)
def test_a_bad_flag_gets_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, argv) == sentence


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MODPRESSURE_STATS_LEASE_SECONDS", "soon")
    sentence = refused(capsys, [], StatsSettings)
    assert sentence.startswith("MODPRESSURE_STATS_LEASE_SECONDS: 'soon': input should be a valid number")
    # A value that a flag overrides is not looked at.
    assert parse_settings(StatsSettings, ["--lease-seconds", "2"], "prog").lease_seconds == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[loader]\nlisen = 1\n", "unknown key 'lisen' in section [loader] of FILE; did you mean 'listen'?"),
        ("[client]\nzzz = 1\n", "unknown key 'zzz' in section [client] of FILE; there are loaders, stats,"),
        ("[loadr]\n", "unknown section 'loadr' in FILE; did you mean 'loader'?"),
        ("loader = 3\n", "'loader' in FILE must be a section, [loader]"),
        ("[loader]\nthreads = 'many'\n", "threads in [loader] of FILE: 'many': input should be a valid integer"),
        ("[loader\n", "the settings file FILE is not TOML: "),
        ("\xff", "the settings file FILE is not TOML: "),
    ],
)
def test_a_bad_file_is_named(text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(text.encode("latin-1"))
    assert refused(capsys, ["--config", str(path)]).startswith(sentence.replace("FILE", str(path)))


def test_a_file_that_is_told_but_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.toml"
    assert refused(capsys, ["--config", str(missing)]) == (
        f"cannot read the settings file {missing}: No such file or directory"
    )


def test_a_mistake_in_another_programs_section_shows_too(nothing_set: Path) -> None:
    (nothing_set / "modpressure.toml").write_text("[stats]\nlisten = '127.0.0.1:1'\nlese_seconds = 3\n")
    with pytest.raises(BadSetting, match="did you mean 'lease_seconds'"):
        load_settings(ClientSettings)


def test_help_and_version_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    for cls in (StatsSettings, LoaderSettings):
        with pytest.raises(SystemExit) as raised:
            parse_settings(cls, ["--help"], "prog")
        assert raised.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for name in setting_names(cls):
            assert flag(name) in text
            assert variable(cls, name) in text
    with pytest.raises(SystemExit) as raised:
        parse_settings(StatsSettings, ["--version"], "prog")
    assert raised.value.code == 0
    assert re.fullmatch(r"prog [0-9][^ ]*\n", capsys.readouterr().out)


def test_a_share_is_of_the_memory_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modpressure.settings.usable_memory_bytes", lambda: 1000)
    assert load_settings(LoaderSettings).memory_limit_bytes == 500
    assert load_settings(LoaderSettings, {"memory_limit": "2G"}).memory_limit_bytes == 2 * 1024**3
    assert load_settings(LoaderSettings, {"memory_limit": "0.01%"}).memory_limit_bytes == 1


def test_a_loaders_name_follows_from_its_port() -> None:
    import os
    import socket

    assert LoaderSettings(name="a").name_at("127.0.0.1:5") == "a"
    assert LoaderSettings().name_at("127.0.0.1:5") == f"{socket.gethostname()}:5"
    assert LoaderSettings().name_at("unix:/run/x") == f"{socket.gethostname()}:{os.getpid()}"
    with pytest.raises(BadSetting, match=r"--name: .*longer than 128 bytes"):
        load_settings(LoaderSettings, {"name": "x" * 129})
    with pytest.raises(BadSetting, match=r"--name: 'n\\x1b\[31m' has characters that can't be printed"):
        load_settings(LoaderSettings, {"name": "n\x1b[31m"})


def table(cls: type[Settings]) -> list[str]:
    """Return the rows that the documentation has to have for a section."""
    rows = ["| Key | Flag | Variable | Default | Meaning |", "|---|---|---|---|---|"]
    for name in setting_names(cls):
        field = cls.model_fields[name]
        cells = (f"`{name}`", f"`{flag(name)}`", f"`{variable(cls, name)}`", default_text(field), field.description)
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


@pytest.mark.parametrize("cls", Settings.sections.values(), ids=list(Settings.sections))
def test_the_documentation_has_the_settings_as_they_are(cls: type[Settings]) -> None:
    _, heading, rest = DOCS.read_text().partition(f"\n## `[{cls.section}]`")
    assert heading, f"docs/settings.md has no section {cls.section}"
    section = rest.partition("\n## ")[0]
    documented = [line for line in section.splitlines() if line.startswith("|")]
    assert documented == table(cls), "docs/settings.md must have:\n" + "\n".join(table(cls))
