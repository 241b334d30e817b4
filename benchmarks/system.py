"""What is asked of the operating system around a measured command: sources out of the page cache,
a small page cache, an end at the first weight that is written."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from measure import Command, Run

_CGROUPS = Path("/sys/fs/cgroup")
_NAME = "weightport-bench"
_HEADER = 1 << 20  # bytes; no header is longer


def drop_from_cache(source: Path) -> None:
    """Take a file, or the files of a folder, out of the page cache."""
    for path in _files(source):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bring_into_cache(source: Path) -> None:
    """Have a file, or the files of a folder, in the page cache."""
    for path in _files(source):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def _files(source: Path) -> list[Path]:
    paths = [source] if source.is_file() else source.rglob("*")
    return [path for path in paths if path.is_file()]


@contextlib.contextmanager
def limited(command: Command, nbytes: int) -> Iterator[Command]:
    """The command in a control group that has so many bytes for memory and page cache.

    Raises:
        OSError: this process may not make one.
    """
    group = _group()
    group.mkdir()
    try:
        limit = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
        (group / limit).write_text(str(nbytes), encoding="ascii")
        entering = f"echo $$ > {shlex.quote(str(group / 'cgroup.procs'))} && exec " + '"$@"'
        yield ["sh", "-c", entering, "sh", *command]
    finally:
        group.rmdir()


def free_memory() -> int:
    """Bytes that a program may take without another giving up any; on Linux."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def can_limit() -> bool:
    """Whether `limited` works here."""
    try:
        with limited(["true"], 1 << 28) as command:
            subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _group() -> Path:
    """A control group below the one of this process (version 1), or beside all (version 2)."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return _CGROUPS / "memory" / path.lstrip("/") / _NAME
    return _CGROUPS / _NAME


def until_first_weight(command: Command, outputs: Path) -> Run:
    """Run a command until a file of weights holds more than a header, then end it.

    Returns what it took until then; `wall` and `cpu` only.

    Raises:
        SystemExit: it ended before.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if _has_weights(outputs):
                return Run(time.perf_counter() - start, _cpu(process.pid), 0, 0)
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    raise SystemExit(f"{shlex.join(command)}: wrote no weights")


def _has_weights(outputs: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_size > _HEADER for path in outputs.rglob("*.safetensors"))
    return False


def _cpu(pid: int) -> float:
    """Seconds of user and system time of all threads; the scheduler's own account."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
