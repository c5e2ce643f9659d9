"""Where points are simulated: here, in processes, or on a dask cluster, all as a `concurrent.futures.Executor`."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

from loader_svc.sweep.extra import needed
from loader_svc.sweep.version import simulation_version
from modpressure.errors import BadRequest, NotNow, Unavailable

PATIENCE_SECONDS: Final = 5
"""How long a dask scheduler has to answer."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Here(Executor):
    """Does at once what it is given, in the thread that gives it."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Return a future that is done."""
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Simulate in ``count`` processes; in this one if that is 1. They end when this process does, however it ends.

    For a main thread: meanwhile SIGTERM raises SystemExit with status 143, so that their end is one in order.
    """
    if count == 1:
        yield Here()
        return
    before_signal = signal.signal(signal.SIGTERM, _terminated)
    try:
        with _pool(count) as pool:
            yield pool
    finally:
        signal.signal(signal.SIGTERM, before_signal)


def _terminated(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _pool(count: int) -> Iterator[Executor]:
    # Not "fork": a progress bar has threads. The server of "forkserver" imports what is needed only once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loader_svc.sweep.run"])
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_prepare)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        # Waits for the pool's own thread: left to the interpreter's end, that would wake it by a pipe which the thread
        # may be closing just then, and show a traceback (CPython before 3.12).
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _prepare() -> None:
    """Prepare a process of the pool: leave Ctrl-C to the parent, and end when that has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)


@contextmanager
def dask_cluster(address: str) -> Iterator[tuple[Executor, int]]:
    """Simulate on the workers of a dask scheduler, such as ``tcp://head:8786``; tells how many points at a time, too.

    BadRequest if the address is none, Unavailable if no scheduler answers there within a few seconds or it has no
    workers, NotNow if one of those has another version of this program.
    """
    with needed("distributed"):
        import distributed
        from distributed.comm.addressing import get_address_host_port
    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)
    try:
        get_address_host_port(address)
    except Exception as error:
        raise BadRequest(f"--dask {address!r} is no address of a dask scheduler: {error}") from None

    class Client(distributed.Client):
        def __del__(self) -> None:
            """Do nothing: one that could not connect would wait, and then complain."""

    try:
        client: Any = Client(address, timeout=PATIENCE_SECONDS, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError):
        raise Unavailable(f"no dask scheduler answers at {address!r}") from None
    except Exception:  # whatever it is that the answer was taken for
        raise Unavailable(f"what answers at {address!r} is no dask scheduler of this version") from None
    with client:
        _check_workers(client, address)
        with client.get_executor() as executor:
            yield executor, sum(client.nthreads().values())


def _check_workers(client: Any, address: str) -> None:
    """Make sure that there are workers, and that each simulates what this process would."""
    try:
        versions: dict[str, Any] = client.run(simulation_version, on_error="return")
    except (OSError, TimeoutError):
        raise Unavailable(f"the dask scheduler at {address!r} does not reach its workers") from None
    if not versions:
        raise Unavailable(f"the dask scheduler at {address!r} has no workers")
    for worker, version in versions.items():
        if version != simulation_version():
            has = f"modpressure {version}" if isinstance(version, str) else "no modpressure that it can import"
            raise NotNow(f"the dask worker {worker} has {has}, this is {simulation_version()}")
