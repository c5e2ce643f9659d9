"""Where settings come from: flags, environment, file; and what is said of a value that makes no sense.

pydantic-settings reads the environment, checks and converts. Its own command line reader is left out: it takes JSON and
"null" in values, and its errors name neither the flag nor the source. The flags here are made from the same fields.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import platformdirs
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from modpressure import __version__
from modpressure.errors import BadRequest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

FILE_NAME = "modpressure.toml"
CONFIG_VARIABLE = "MODPRESSURE_CONFIG"


class BadSetting(BadRequest):
    """A setting's value makes no sense; the sentence names the flag, variable or key, and the value."""


class Settings(BaseSettings):
    """A section: what one program can be told. Built by ``load_settings`` or ``parse_settings``.

    Called directly it takes the given values and defaults alone.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_ignore_empty=True)

    section: ClassVar[str] = ""
    """Its name in the file and in the names of its variables; empty for a base of sections."""

    program: ClassVar[str] = ""
    """What it belongs to, for its ``--help``."""

    sections: ClassVar[dict[str, type[Settings]]] = {}
    """All sections by name, in the order in which they are defined."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if cls.section:
            cls.sections[cls.section] = cls

    def check(self) -> None:
        """Return if the settings go together. BadSetting if a program that has them must not start."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the values as given: ``load_settings`` has put the sources together, and knows which said what."""
        return (init_settings,)


S = TypeVar("S", bound=Settings)


def setting_names(cls: type[Settings]) -> list[str]:
    """Return the names of the settings of ``cls``: its own, then those that it has from its base."""
    own = [name for name in cls.model_fields if name in cls.__annotations__]
    return own + [name for name in cls.model_fields if name not in own]


def flag(name: str) -> str:
    """Return the flag of the setting ``name``."""
    return "--" + name.replace("_", "-")


def variable(cls: type[Settings], name: str) -> str:
    """Return the environment variable of the setting ``name`` of ``cls``."""
    return f"{cls.model_config.get('env_prefix', '')}{name}".upper()


def default_text(field: FieldInfo) -> str:
    """Return the default of a setting for people."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "default_text" in extra:
        return str(extra["default_text"])
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def help_text(cls: type[Settings], name: str) -> str:
    """Return what a flag's help says: what it means, its variable, its default."""
    field = cls.model_fields[name]
    return f"{field.description} [{variable(cls, name)}; default: {default_text(field)}]"


def load_settings(cls: type[S], flags: Mapping[str, Any] | None = None, config: Path | None = None) -> S:
    """Return the settings of one section.

    ``flags`` has the values that were given on the command line, by setting name; ``config`` is the file given there.
    BadSetting with a sentence that names the flag, variable or key and the value if one makes no sense.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    path = _config_path(config)
    in_file = _section(cls, path) if path else {}
    in_environment = EnvSettingsSource(cls)()
    origins = {name: f"{name} in [{cls.section}] of {path}" for name in in_file}
    origins |= {name: variable(cls, name) for name in in_environment}
    origins |= {name: flag(name) for name in given}
    try:
        return cls(**{**in_file, **in_environment, **given})
    except ValidationError as error:
        raise BadSetting(_sentence(error.errors(include_url=False)[0], origins)) from None


def parse_settings(cls: type[S], argv: Sequence[str], prog: str) -> S:
    """Return the settings that the command line ``argv``, the environment and the file say.

    For a service's ``main``: prints and exits 0 on ``--help`` and ``--version``; one sentence on stderr and exit 2 on
    an unknown flag or key, a value that makes no sense, or values that ``check`` refuses together.
    """
    parser = _Parser(
        prog=prog,
        description=cls.program,
        epilog=f"A setting is a flag, a variable or a key in [{cls.section}] of the file; the first of these wins.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"Settings file. [{CONFIG_VARIABLE}; default: {FILE_NAME} in the current directory or in"
        " the user's configuration directory]",
    )
    for name in setting_names(cls):
        field = cls.model_fields[name]
        text = help_text(cls, name).replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
        else:
            several: dict[str, Any] = {"action": "append"} if isinstance(field.default, list) else {}
            parser.add_argument(flag(name), metavar=name.rpartition("_")[2].upper(), help=text, **several)
    given = vars(parser.parse_args(list(argv)))
    try:
        settings = load_settings(cls, given, given.pop("config", None))
        settings.check()
        return settings
    except BadSetting as error:
        parser.error(error.sentence)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line, without the usage."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)


def _config_path(config: Path | None) -> Path | None:
    if config is None and (text := os.environ.get(CONFIG_VARIABLE)):
        config = Path(text)
    if config is not None:
        return config
    candidates = (Path(FILE_NAME), platformdirs.user_config_path("modpressure") / FILE_NAME)
    return next((path for path in candidates if path.is_file()), None)


def _section(cls: type[Settings], path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise BadSetting(f"cannot read the settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSetting(f"the settings file {path} is not TOML: {error}") from None
    names = Settings.sections
    # Each program checks the whole file, so that a mistake shows wherever it is made first.
    for section, values in content.items():
        if section not in names:
            raise BadSetting(f"unknown section {section!r} in {path}{_hint(section, names)}")
        if not isinstance(values, dict):
            raise BadSetting(f"{section!r} in {path} must be a section, [{section}]")
        for key in values:
            if key not in names[section].model_fields:
                hint = _hint(key, names[section].model_fields)
                raise BadSetting(f"unknown key {key!r} in section [{section}] of {path}{hint}")
    found: dict[str, Any] = content.get(cls.section, {})
    return found


def _hint(word: str, words: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(words)}"


def _sentence(error: ErrorDetails, origins: Mapping[str, str]) -> str:
    name = str(error["loc"][0])
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if repr(shown) in message:  # our own checks name the value themselves
        return f"{origins[name]}: {message}"
    return f"{origins[name]}: {shown!r}: {message[0].lower()}{message[1:]}"
