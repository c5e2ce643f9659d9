"""Show the whole path once: both services, four loaders, a storm of 100 workers, two reports; ``make demo`` runs it.

Everything runs on free ports and ends with the demo, unless ``--keep`` asks for more time to look around.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

ROOT: Final = Path(__file__).resolve().parent.parent
MODPRESSURE: Final = Path(sys.executable).parent / "modpressure"

WANTED_MODULES: Final = ("xfs", "ext4", "e1000e", "btrfs", "kvm", "usbcore", "snd", "virtio_net")
"""Modules that most systems load at boot or on a mount, and that differ in size."""

STORM_MODULES: Final = 3
STOP_SECONDS: Final = 30.0


class DemoFailed(Exception):
    """The demo can't go on; the sentence says why."""


@contextlib.contextmanager
def services(loaders: int, tree: str | None) -> Iterator[dict[str, Any]]:
    """Run ``modpressure up`` and give the addresses that it prints once all are well; stop it at the end."""
    command = [str(MODPRESSURE), "up", "--json", "--quiet", "--port", "0", "--loaders", str(loaders)]
    if tree:
        command += ["--tree", tree]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        try:
            assert up.stdout is not None
            ready = up.stdout.readline()
            if not ready:
                raise DemoFailed("the services did not start, see above")
            yield json.loads(ready)
            if up.poll() is not None:
                raise DemoFailed("the services ended early, see above")
        finally:
            up.terminate()
            try:
                up.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                up.kill()


def modpressure(*arguments: str, show: bool = True) -> str:
    """Run the command line; return its output, or print command and output if ``show``."""
    if show:
        print(f"\n$ modpressure {shlex.join(arguments)}", flush=True)
    done = subprocess.run([MODPRESSURE, *arguments], stdout=None if show else subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise DemoFailed(f"modpressure {arguments[0]} failed with exit code {done.returncode}")
    return done.stdout or ""


def choose_modules(loader: str) -> list[str]:
    """Return modules of the loader's tree for the storm: known ones if it has them, else its largest."""
    modules = json.loads(modpressure("modules", "list", "--loaders", loader, "--json", show=False))["modules"]
    sizes = {module["name"]: module["file_bytes"] for module in modules if not module.get("builtin")}
    known = [name for name in WANTED_MODULES if name in sizes]
    return (known or sorted(sizes, key=lambda name: -sizes[name]))[:STORM_MODULES]


def call_grpcurl(stats: str) -> None:
    """Ask for the report as any gRPC client may, where grpcurl is at hand."""
    grpcurl = shutil.which("grpcurl", path=f"{ROOT / '.tools' / 'bin'}") or shutil.which("grpcurl")
    arguments = ["-plaintext", stats, "modpressure.v1.StatsService/GetStats"]
    if grpcurl is None:
        print("\n(grpcurl is not here; make grpcurl builds it)")
        return
    print(f"\n$ grpcurl {shlex.join(arguments)} | head -n 6")
    answer = subprocess.run([grpcurl, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        raise DemoFailed(f"grpcurl failed with exit code {answer.returncode}")
    print("\n".join(answer.stdout.splitlines()[:6]))


def show(options: argparse.Namespace) -> None:
    """Run the demo as the options say. DemoFailed if a step does."""
    tree = ["--tree", options.tree] if options.tree else []
    print(f"$ modpressure up {shlex.join(['--loaders', str(options.loaders), *tree])}", flush=True)
    with services(options.loaders, options.tree) as running:
        stats, loaders = running["stats"], running["loaders"]
        print(f"stats_svc on {stats}, {len(loaders)} loader_svc on {', '.join(loaders)}", flush=True)
        modules = choose_modules(loaders[0])
        modpressure(
            *("storm", "--workers", str(options.workers), "--module", ",".join(modules)),
            *("--loaders", ",".join(loaders)),
        )
        modpressure("report", "--stats", stats)
        modpressure("report", "--format", "mainline", "--stats", stats)
        call_grpcurl(stats)
        if options.keep:
            print("\nAll of it runs until Ctrl-C.", flush=True)
            signal.pause()
    print("\nAll of it has been stopped. To go on, in one terminal:")
    print(f"  .venv/bin/modpressure up {shlex.join(['--loaders', str(options.loaders), *tree])}")
    print("and in another, with stats_svc on port 50050 and the loaders on the next ones:")
    print("  grpcurl -plaintext localhost:50050 modpressure.v1.StatsService/GetReport | jq -r .text")
    print(f"  .venv/bin/modpressure load {modules[0]}")


def exit_on_signal(number: int, frame: object) -> NoReturn:
    """Leave through all ``finally``, so that nothing is left running."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(description="Both services, four loaders, a storm, two reports.")
    parser.add_argument("--tree", help="a module tree such as /lib/modules/RELEASE (default: the bundled catalogue)")
    parser.add_argument("--loaders", type=int, default=4, help="number of loaders (default: 4)")
    parser.add_argument("--workers", type=int, default=100, help="workers of the storm (default: 100)")
    parser.add_argument("--keep", action="store_true", help="keep the services running at the end, until Ctrl-C")
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        show(parser.parse_args(arguments))
    except DemoFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
