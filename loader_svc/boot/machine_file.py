"""Descriptions of machines as TOML: read with every key checked, and written.

A device whose path has ``{cpu}`` in it stands for one of each CPU: ``cpus`` alone says how large the machine is.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

from loader_svc.boot.device import Device
from loader_svc.boot.machine import Machine, MachineError, ModuleInit
from modpressure.errors import NotFound

_TOP: Final[dict[str, type]] = {
    "name": str,
    "description": str,
    "cpus": int,
    "host_cpus": int,
    "memory_bytes": int,
    "file_factor": float,
    "builtin": list,
    "initramfs": list,
    "subsystems": list,
    "file_bytes": dict,
    "needs": dict,
    "autoload": dict,
    "costs": dict,
    "init": dict,
    "device": list,
}
_DEVICE: Final[dict[str, type]] = {
    "path": str,
    "modalias": str,
    "device_id": str,
    "node": str,
    "driver": str,
    "born": bool,
    "born_of": str,
    "dies_with": str,
}
_INIT: Final[dict[str, type]] = {"errno": str, "duration_ns": int, "asleep": bool}
_NEEDED: Final = ("name", "cpus", "memory_bytes", "device")
_WORDS: Final[dict[type, str]] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}
_DIRECTORY: Final = "machines"


def bundled_machines() -> dict[str, Machine]:
    """Return the machines that come with modpressure, by name."""
    directory = resources.files("loader_svc.boot").joinpath(_DIRECTORY)
    files = sorted((each for each in directory.iterdir() if each.name.endswith(".toml")), key=lambda each: each.name)
    machines = (parse_machine(each.read_text(encoding="utf-8")) for each in files)
    return {machine.name: machine for machine in machines}


def machine_of(text: str) -> Machine:
    """Return the bundled machine of a name, or the one that a file describes. MachineError, NotFound."""
    if text.endswith(".toml") or "/" in text:
        return read_machine(Path(text))
    machines = bundled_machines()
    if text not in machines:
        raise NotFound(
            f"there is no machine {text!r}; there are {', '.join(machines)}, or a .toml file", field="machine"
        )
    return machines[text]


def read_machine(path: Path) -> Machine:
    """Read a description. NotFound if there is no such file, MachineError names what makes no sense in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFound(f"{path} can't be read: {error.strerror}", field="machine") from None
    except UnicodeDecodeError:
        raise MachineError(f"{path} is not UTF-8", field="machine") from None
    try:
        return parse_machine(text)
    except MachineError as error:
        raise MachineError(f"{path}: {error.sentence}", field=error.field) from None


def parse_machine(text: str) -> Machine:
    """Return the machine that a text describes. MachineError names the first key or value that makes no sense."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise MachineError(f"the description is not TOML: {error}", field="machine") from None
    _check(document, _TOP, "")
    for name in _NEEDED:
        if name not in document:
            raise MachineError(f"the description lacks {name!r}", field=name)
    inits = document.get("init", {})
    sizes = document.get("file_bytes", {})
    for module, size_bytes in sizes.items():
        if type(size_bytes) is not int or size_bytes < 1:
            raise MachineError(f"file_bytes.{module} {size_bytes!r} is not a number of bytes", field="file_bytes")
    return Machine(
        name=document["name"],
        cpus=document["cpus"],
        memory_bytes=document["memory_bytes"],
        devices=tuple(_devices(document["device"])),
        subsystems=_texts("subsystems", document.get("subsystems", [])),
        inits=tuple(_init(module, values) for module, values in inits.items()),
        host_cpus=document.get("host_cpus"),
        file_factor=float(document.get("file_factor", 1.0)),
        file_bytes=tuple(sizes.items()),
        builtin=_texts("builtin", document.get("builtin", [])),
        needs=_names_of("needs", document),
        autoload=_names_of("autoload", document),
        initramfs=_texts("initramfs", document.get("initramfs", [])),
        costs=tuple(document.get("costs", {}).items()),
        description=document.get("description", ""),
    )


def machine_text(machine: Machine, heading: Iterable[str] = ()) -> str:
    """Return the file of a machine, below lines of comment; ``parse_machine`` makes an equal one of it."""
    lines = [f"# {line}".rstrip() for line in heading]
    lines.append(f"name = {_quoted(machine.name)}")
    if machine.description:
        lines.append(f"description = {_quoted(machine.description)}")
    lines.append(f"cpus = {machine.cpus}")
    if machine.host_cpus is not None:
        lines.append(f"host_cpus = {machine.host_cpus}")
    lines.append(f"memory_bytes = {machine.memory_bytes}")
    if machine.file_factor != 1:
        lines.append(f"file_factor = {machine.file_factor!r}")
    if machine.builtin:
        lines.append(f"builtin = {_array(machine.builtin)}")
    if machine.initramfs:
        lines.append(f"initramfs = {_array(machine.initramfs)}")
    if machine.subsystems:
        lines += ["subsystems = [", *(f"    {_quoted(path)}," for path in machine.subsystems), "]"]
    if machine.costs:
        lines += ["", "[costs]", *(f"{name} = {_cost(value)}" for name, value in machine.costs)]
    if machine.file_bytes:
        lines += ["", "[file_bytes]", *(f"{_quoted(name)} = {size}" for name, size in machine.file_bytes)]
    for table, entries in (("needs", machine.needs), ("autoload", machine.autoload)):
        if entries:
            lines += ["", f"[{table}]", *(f"{_quoted(name)} = {_array(names)}" for name, names in entries)]
    for init in machine.inits:
        lines += ["", f"[init.{_quoted(init.module)}]"]
        if init.errno:
            lines.append(f"errno = {_quoted(init.errno)}")
        if init.duration_ns is not None:
            lines.append(f"duration_ns = {init.duration_ns}")
        if init.is_asleep:
            lines.append("asleep = true")
    for device in machine.devices:
        lines += ["", "[[device]]", f"path = {_quoted(device.path)}"]
        texts = ("modalias", "device_id", "node", "driver", "born_of", "dies_with")
        lines += [f"{name} = {_quoted(getattr(device, name))}" for name in texts if getattr(device, name)]
        if device.is_born:
            lines.append("born = true")
    return "\n".join(lines) + "\n"


def _devices(tables: list[Any]) -> Iterable[Device]:
    paths = set()
    for number, table in enumerate(tables, 1):
        where = f"device {number}"
        if not isinstance(table, dict):
            raise MachineError(f"{where} is {table!r}, not a table", field="device")
        _check(table, _DEVICE, f"{where}: ")
        path = table.get("path", "").removeprefix("/sys")
        if not path.startswith("/") or path.endswith("/") or "//" in path or "/../" in path + "/":
            raise MachineError(f"{where}: {table.get('path', '')!r} is no path below /sys", field="path")
        if path in paths:
            raise MachineError(f"{where}: {path} is there twice", field="path")
        paths.add(path)
        yield Device(
            path,
            modalias=table.get("modalias", ""),
            device_id=table.get("device_id", ""),
            node=table.get("node", ""),
            driver=table.get("driver", ""),
            born_of=table.get("born_of", ""),
            is_born=table.get("born", bool(table.get("born_of"))),
            dies_with=table.get("dies_with", ""),
        )


def _init(module: str, values: Any) -> ModuleInit:
    if not isinstance(values, dict):
        raise MachineError(f"init.{module} is {values!r}, not a table", field="init")
    _check(values, _INIT, f"init.{module}: ")
    return ModuleInit(module, values.get("errno", ""), values.get("duration_ns"), values.get("asleep", False))


def _check(table: Mapping[str, Any], keys: Mapping[str, type], where: str) -> None:
    """Refuse keys that there are not, values of another type, and numbers that are none."""
    for key, value in table.items():
        kind = keys.get(key)
        if kind is None:
            raise MachineError(f"{where}there is no key {key!r}; there are {', '.join(keys)}", field=key)
        is_right = type(value) in (int, float) if kind is float else type(value) is kind
        if not is_right:
            raise MachineError(f"{where}{key} {value!r} is not {_WORDS[kind]}", field=key)
        if isinstance(value, float) and not math.isfinite(value):
            raise MachineError(f"{where}{key} {value} is not a finite number", field=key)


def _names_of(table: str, document: Mapping[str, Any]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return a table whose values are lists of names."""
    return tuple((module, _texts(f"{table}.{module}", names)) for module, names in document.get(table, {}).items())


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise MachineError(f"{name} {values!r} is not a list", field=name)
    for value in values:
        if not isinstance(value, str) or not value:
            raise MachineError(f"{name} has {value!r}, which is no text", field=name)
    return tuple(values)


def _cost(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _quoted(text: str) -> str:
    """Return a TOML string: JSON's escapes are TOML's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _array(texts: Iterable[str]) -> str:
    return "[" + ", ".join(_quoted(text) for text in texts) + "]"
