"""Whoever does the jobs: a pool of processes here, or a Dask cluster. Both are executors of
`concurrent.futures`."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from ..errors import ConversionError, printable

JOB_MEMORY = 512_000_000
"""Bytes that a job may take: some four times what the largest conversions were seen to."""

PARITY_MEMORY = 16_000_000_000
"""The same where a source framework runs a whole model."""

_CGROUP = Path("/sys/fs/cgroup")
_PRELOADED = ["weightport.batch.run"]
_PATIENCE = 20  # seconds for a scheduler to answer


class Workers(Protocol):
    """Whoever does the jobs.

    Attributes:
        room: how many jobs it is given at a time.
        retries: how often it tries a job again by itself.
    """

    room: int
    retries: int

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a function called."""

    def renew(self) -> None:
        """Go on after a process has died."""

    def stop(self) -> None:
        """End what is running, without a trace."""


# --- processes here -------------------------------------------------------------------------------


class Processes:
    """A pool of processes, started by one that has imported all they need.

    `fork` alone would copy locks that other threads hold.
    """

    retries = 0

    def __init__(self, count: int) -> None:
        self.room = count
        methods = multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        if "forkserver" in methods:
            self._context.set_forkserver_preload(_PRELOADED)
        self._strangers: set[BaseProcess] = set()
        self._executor = self._started()

    def _started(self) -> Executor:
        self._strangers = {*multiprocessing.active_children()}
        return ProcessPoolExecutor(self.room, self._context, _begin)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a function called in one of them."""
        return self._executor.submit(_call, function, *arguments)

    def renew(self) -> None:
        """Start others, now that one has died."""
        self.stop()
        self._executor = self._started()

    def stop(self) -> None:
        """Tell all to end; each clears away what it has begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        mine = {*multiprocessing.active_children()} - self._strangers
        for process in mine:
            process.terminate()
        for process in mine:
            process.join()

    def close(self) -> None:
        """End them when they have nothing left to do."""
        self._executor.shutdown()


def _begin() -> None:
    """How a process begins: who started it decides when it ends; it shows no bars of its own."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing disturbs the clearing away
    raise SystemExit(128 + signum)


def _end_with_parent() -> None:
    """Not outlive the process that the results are for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; told to end, end, where the executor would wait for the next call."""
    try:
        return function(*arguments)
    except SystemExit:
        os._exit(128 + signal.SIGTERM)


@contextmanager
def processes(count: int) -> Iterator[Processes]:
    """So many processes here; whatever happens, none is left behind."""
    workers = Processes(count)
    try:
        yield workers
        workers.close()
    except BaseException:
        workers.stop()
        raise


def fitting(job_memory: int) -> int:
    """As many processes as there are cores and memory for; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, _free_memory() // job_memory))


def _free_memory() -> int:
    """Bytes that processes here may still take."""
    free = 1 << 62
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):  # a container's; "max" is no number
        limit = int((_CGROUP / "memory.max").read_text(encoding="utf-8"))
        free = min(free, limit - int((_CGROUP / "memory.current").read_text(encoding="utf-8")))
    return free


# --- Dask -----------------------------------------------------------------------------------------


class Dask:
    """The workers of a Dask cluster."""

    room = 1000  # jobs that the scheduler has to distribute

    def __init__(self, client: Any, memory: int | None, retries: int) -> None:
        self._client = client
        self.retries = retries
        resources = {"memory": memory} if memory is not None else None
        self._executor = client.get_executor(pure=False, retries=retries, resources=resources)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a function called on one of them."""
        return self._executor.submit(function, *arguments)  # type: ignore[no-any-return]

    def renew(self) -> None:
        """The scheduler does."""

    def stop(self) -> None:
        """Take back what has not begun; what has is finished by the workers."""
        self._executor.shutdown(wait=False)


@contextmanager
def dask(address: str, count: int, memory: int | None, retries: int) -> Iterator[Dask]:
    """The workers of a cluster.

    Args:
        address: of its scheduler, or `local` for a cluster of processes here.
        count: of processes of a local one.
        memory: bytes of the resource `memory` that a job takes of a worker's.
        retries: of the scheduler.

    Raises:
        ConversionError: Dask is not installed, or the scheduler does not answer.
    """
    try:
        import distributed
    except ImportError:
        raise ConversionError('--dask needs Dask; run `pip install "weightport[dask]"`') from None
    library: Any = distributed
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if address == "local":
        resources = {"memory": memory or JOB_MEMORY}
        cluster = library.LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
            resources=resources,
        )
        with cluster, library.Client(cluster) as client:
            yield Dask(client, memory, retries)
        return
    try:
        connected = library.Client(address, timeout=_PATIENCE)
    except (OSError, ValueError, TypeError) as error:
        raise ConversionError(
            f"--dask {printable(address)}: no scheduler answers there ({printable(error)})"
        ) from None
    with connected as client:
        if memory is not None:
            _check_memory(client, memory, address)
        yield Dask(client, memory, retries)


def _check_memory(client: Any, memory: int, address: str) -> None:
    """Refuse to wait for ever for a worker that has so much."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    most = max((one.get("resources", {}).get("memory", 0) for one in workers), default=0)
    if most < memory:
        raise ConversionError(
            f"--memory {memory}: no worker of {printable(address)} has so much; start them with"
            f' `dask worker --resources "memory={memory}"`'
        )
