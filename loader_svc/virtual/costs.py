"""What everything takes on a simulated machine: the figures of the cost model, their text, and the bundled ones.

A file of costs is TOML with the names of the fields of ``Costs``, tables ``[link]``, ``[init]`` and ``[async_probe]``
with what linking single modules takes, their init functions and what these leave to others, and a table ``[source]``
that says of each figure where it is from. What it leaves out is as bundled.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any, Final

from loader_svc.virtual import host
from loader_svc.virtual.clock import DEFAULT_SLICE_NS
from modpressure.errors import BadRequest, NotFound

MAX_NS: Final = 10**15
"""Largest figure, some eleven days: more is a slip of the keyboard."""

MAX_QUANTILES: Final = 1001

Duration = int | tuple[int, ...]
"""A time in ns that is always the same, or a distribution: its quantiles at equal distances, from least to greatest.

A draw falls between any two neighbours with equal chance, so ``(a, b)`` is uniform and ``(min, median, max)`` has half
of its draws below the median. Nothing else is needed to follow a measured distribution, and no function of a C library
has a say in it, so a seed gives the same draws everywhere.
"""


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost model: what is not said takes no time. Per-byte figures may be fractions, all others are whole ns.

    The bundled figures (``default_costs``) and where each is from are in ``costs.toml``.
    """

    # --- one system call ---

    syscall_ns: int = 0
    """Entering and leaving the kernel."""

    open_ns: int = 0
    """open(2) and close(2) of a file whose directories are cached."""

    read_cached_ns_per_byte: float = 0
    """Reading a file that the page cache has into kernel memory (``kernel_read_file``)."""

    read_disk_ns_per_byte: float = 0
    """Reading a file that only the disk has, over and above the copy."""

    read_disk_ns: int = 0
    """What a read that goes to the disk waits for, however short it is."""

    first_read_from_disk: bool = False
    """Whether the first read of each file goes to the disk. Not so in an initramfs, which is page cache."""

    copy_user_ns_per_byte: float = 0
    """Copying an image from the caller's memory (init_module)."""

    zstd_ns_per_byte: float = 0
    """Decompressing zstd, per byte that comes out; in the kernel and in libkmod alike."""

    xz_ns_per_byte: float = 0
    """Decompressing xz, per byte that comes out."""

    gzip_ns_per_byte: float = 0
    """Decompressing gzip, per byte that comes out."""

    # --- memory ---

    allocate_ns: int = 0
    """One vmalloc area: looking for a hole, setting it up. Outside of any lock."""

    allocate_lock_ns: int = 0
    """For how long one allocation or release of an area holds the lock that all CPUs share (``vmap_area_lock``)."""

    page_ns: int = 0
    """One page: taking it from its CPU's own list, and mapping it."""

    page_lock_ns: int = 0
    """For how long a page holds the zone's lock, which all CPUs share; the share of one page of a batch."""

    free_page_ns: int = 0
    """Unmapping one page and giving it back."""

    flush_ns: int = 0
    """One flush of the TLBs of all CPUs: the part that does not depend on their number."""

    flush_ns_per_cpu: int = 0
    """One flush of the TLBs of all CPUs: what each CPU adds."""

    # --- making a module of an image ---

    inspect_ns: int = 0
    """The checks between read and layout: ELF headers, modinfo, signature."""

    copy_ns_per_byte: float = 0
    """Clearing the layout's memory and copying the sections there, per byte of the layout."""

    import_ns: int = 0
    """Finding one symbol that the module imports, in the kernel and in the modules that are loaded."""

    symbol_ns: int = 0
    """Going over one entry of the module's own symbol table (sizes, kallsyms)."""

    relocation_ns: int = 0
    """Applying one relocation."""

    link_ns: int = 0
    """All else between the name's place in the list and init: arguments, notifiers, sysfs, alternatives, protection."""

    link: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Linking single modules, by name, in the place of all that the figures above come to for it; no flushes."""

    init_ns: Duration = 0
    """The init function of a module that ``init`` does not have."""

    init: Mapping[str, Duration] = field(default_factory=dict, hash=False)
    """The init functions of single modules, by name."""

    async_probe: Mapping[str, Duration] = field(default_factory=dict, hash=False)
    """What the init functions of single modules leave to be done by others once they have returned, by name. No load
    ends while there is any such work (``async_synchronize_full`` in do_init_module, kernel/module/main.c)."""

    live_tail_ns: int = 0
    """From the moment that a module is live to the wake-up of those who wait: notifiers, uevent, init memory."""

    remove_ns: int = 0
    """Unloading a module: its exit function, sysfs, the wait for RCU."""

    # --- the modules list, and waiting ---

    list_lock_ns: int = 0
    """For how long one look into the modules list holds its mutex, whatever its length."""

    list_lock_ns_per_module: float = 0
    """What each module in the list adds to that: names are compared one after the other."""

    wake_ns: int = 0
    """What it takes who wakes others to wake one of them."""

    wake_latency_ns: int = 0
    """From being woken to running, where a CPU is idle."""

    slice_ns: int = DEFAULT_SLICE_NS
    """How long a CPU stays with one task while others wait for it."""

    host_latency_ns: int = host.DEFAULT_LATENCY_NS
    """Within what time the virtual CPUs that share a core of the host have a turn each."""

    host_slice_ns: int = host.DEFAULT_SLICE_NS
    """What each of them has at least, however many there are."""

    host_tick_ns: int = host.DEFAULT_TICK_NS
    """How often the host looks whether a turn is over."""

    host_wake_ns: int = 0
    """How much less than one that runs a virtual CPU must have had to take its core when it wakes up."""

    # --- userspace ---

    fork_ns: int = 0
    """Forking a udev worker, up to its first instruction."""

    worker_ns: int = 0
    """What a udev worker does before its first event: its own copies of the pages that it writes to, mostly."""

    exec_ns: int = 0
    """Starting a program such as modprobe: fork, exec, linking, and its end."""

    alias_ns: int = 0
    """Looking up one MODALIAS in libkmod's indexes."""

    name_ns: int = 0
    """Looking up one module in libkmod's indexes: its file, dependencies and options."""

    initstate_ns: int = 0
    """One look at /sys/module/NAME/initstate: open, read, close."""

    rules_ns: int = 0
    """One pass of a udev worker over all rules for an event, database entry included."""

    device_rules_ns: int = 0
    """What such a pass takes over and above for a device: its attributes, those of the devices above it, its links."""

    event_ns: int = 0
    """What udev's main loop does for one event: receiving, queueing, handing it on, taking the result."""

    trigger_ns: int = 0
    """What ``udevadm trigger`` does for one device: opening and writing its uevent file."""

    # --- chance ---

    jitter: float = 0
    """Share by which a cost may be more or less, each time anew; 0 to 1."""

    source: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each figure is from, by its name."""

    def __post_init__(self) -> None:
        """Check every figure. BadRequest names one that makes no sense."""
        for name in KINDS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        for table in _BY_MODULE:
            check = _whole if table == "link" else _duration
            values = {each: check(f"{table}.{each}", ns) for each, ns in getattr(self, table).items()}
            object.__setattr__(self, table, values)

    def decompress_ns_per_byte(self, algorithm: str) -> float:
        """Return what a byte that comes out takes; KeyError for an algorithm that there is not."""
        return {"zstd": self.zstd_ns_per_byte, "xz": self.xz_ns_per_byte, "gzip": self.gzip_ns_per_byte}[algorithm]

    def init_duration(self, module: str) -> Duration:
        """Return what the init function of a module takes."""
        return self.init.get(module, self.init_ns)

    def text(self) -> str:
        """Return the file of these costs; ``parse_costs`` makes them of it again."""
        lines = ["# Costs of a simulated machine; ns, or ns per byte. [source] says where each figure is from.", ""]
        lines += [f"{name} = {_toml(getattr(self, name))}" for name in KINDS]
        for table in _BY_MODULE:
            values = getattr(self, table)
            if values or table == "init":
                lines += ["", f"[{table}]", *(f"{_key(name)} = {_toml(ns)}" for name, ns in sorted(values.items()))]
        lines += ["", "[source]", *(f"{_key(name)} = {_quoted(text)}" for name, text in sorted(self.source.items()))]
        return "\n".join(lines) + "\n"


_BY_MODULE: Final = ("link", "init", "async_probe")
_TABLES: Final = (*_BY_MODULE, "source")
KINDS: Final[dict[str, str]] = {each.name: str(each.type) for each in fields(Costs) if each.name not in _TABLES}
"""The figures and their types, in the order of a file."""


@cache
def default_costs() -> Costs:
    """Return the bundled costs: a server of about 2023, bare metal, an initramfs."""
    text = resources.files("loader_svc.virtual").joinpath("costs.toml").read_text(encoding="utf-8")
    return parse_costs(text, NO_COSTS)


def read_costs(path: Path) -> Costs:
    """Return the costs of a file; what it leaves out is as bundled. NotFound, BadRequest."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise NotFound(f"{path} can't be read: {reason}", field="costs") from None
    try:
        return parse_costs(text)
    except BadRequest as error:
        raise BadRequest(f"{path}: {error.sentence}", field="costs") from None


def parse_costs(text: str, base: Costs | None = None) -> Costs:
    """Return the costs that a text describes, over ``base``, the bundled ones if None. BadRequest names the value."""
    base = default_costs() if base is None else base
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadRequest(f"the costs are not TOML: {error}", field="costs") from None
    values: dict[str, Any] = {}
    for name, value in document.items():
        if name in _TABLES:
            if not isinstance(value, dict):
                raise BadRequest(f"{name} = {value!r} is not a table", field=name)
            values[name] = {**getattr(base, name), **value}
        elif name in KINDS:
            values[name] = value
        else:
            raise BadRequest(f"there is no cost {name!r}; there are {', '.join([*KINDS, *_TABLES])}", field=name)
    for name, value in values.get("source", {}).items():
        if not isinstance(value, str):
            raise BadRequest(f"source.{name} = {value!r} is not a text", field="source")
    return replace(base, **values)


def draw(duration: Duration, dice: Random) -> int:
    """Return a time from a distribution, in ns."""
    if isinstance(duration, int):
        return duration
    place = dice.random() * (len(duration) - 1)
    below = int(place)
    low, high = duration[below], duration[below + 1]
    return low + int((high - low) * (place - below))


def _checked(name: str, value: Any) -> Any:
    kind = KINDS[name]
    if kind == "bool":
        if not isinstance(value, bool):
            raise BadRequest(f"{name} = {value!r} is not true or false", field=name)
        return value
    if kind == "Duration":
        return _duration(name, value)
    if isinstance(value, bool) or not isinstance(value, int | float if kind == "float" else int):
        raise BadRequest(f"{name} = {value!r} is not a{' whole' * (kind == 'int')} number", field=name)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRequest(f"{name} = {value} is not a finite number", field=name)
    least, most = int(name.endswith(("slice_ns", "tick_ns"))), 1 if name == "jitter" else MAX_NS
    if not least <= value <= most:
        raise BadRequest(f"{name} = {value} is out of bounds: {least} to {most}", field=name)
    return value


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_NS:
        raise BadRequest(f"{name} = {value!r} is not a whole number of ns from 0 to {MAX_NS}", field=name)
    return value


def _duration(name: str, value: Any) -> Duration:
    if isinstance(value, int) and not isinstance(value, bool):
        quantiles: tuple[Any, ...] = (value,)
    elif isinstance(value, list | tuple) and 2 <= len(value) <= MAX_QUANTILES:
        quantiles = tuple(value)
    else:
        raise BadRequest(
            f"{name} = {value!r} is neither whole ns nor a list of 2 to {MAX_QUANTILES} quantiles", field=name
        )
    for each in quantiles:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each <= MAX_NS:
            raise BadRequest(f"{name}: {each!r} is not a whole number of ns from 0 to {MAX_NS}", field=name)
    if list(quantiles) != sorted(quantiles):
        raise BadRequest(f"{name} = {list(quantiles)} has quantiles that do not ascend", field=name)
    return quantiles[0] if isinstance(value, int) else quantiles


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(list(value)) if isinstance(value, tuple) else repr(value)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _quoted(name)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for two: TOML has no pairs of surrogates, and wants DEL escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


NO_COSTS: Final = Costs()
"""Everything takes no time."""
