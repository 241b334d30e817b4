"""What reading, checking, hashing, writing and syncing cost without a converter: the floor.

    python benchmarks/floor.py [--size GIB] [--repeat N] [--folder DIR]

A file of random float32 weights is copied through one buffer of 512 KiB; each row does one thing
more than the row before it, all of which a conversion does. Nothing is planned, renamed or handed
from thread to thread; only the source is hashed in a thread of its own. `cp` and `cp` with `sync`
of the same file run in the same rounds, and ratios are to the latter.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
from measure import end_in_order, measure, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from weightport.io.behind import WriteBehind

_BLOCK = 1 << 19  # bytes
_INF = 0x7F800000  # the bits of infinity in float32
_NEGATIVE = 0xFF800000
STAGES = (
    "read, write, sync",
    "+ out of the page cache, 8 MiB after 8 MiB",
    "+ NaN and Inf",
    "+ SHA-256 of the output",
    "+ SHA-256 of the source",
)
COPY = "cp + sync"


def convert(source: Path, target: Path, stage: int) -> None:
    """Copy a file as far as a stage of `STAGES` goes."""
    hashing = threading.Thread(target=_hash, args=(source,))
    if stage >= 4:
        hashing.start()
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    numbers = np.frombuffer(buffer, np.int32)
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as written:
        behind = WriteBehind(written.fileno())
        end = 0
        while count := read.readinto(buffer):
            if stage >= 2 and (numbers.max() >= _INF or numbers.view(np.uint32).max() >= _NEGATIVE):
                raise SystemExit("not a number")
            if stage >= 3:
                digest.update(buffer[:count])
            written.write(buffer[:count])
            end += count
            if stage >= 1:
                behind.follow(end)
        if stage >= 4:
            hashing.join()
        os.fsync(written.fileno())


def _hash(source: Path) -> None:
    with source.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def make(path: Path, size: int) -> None:
    """A file of so many bytes of random weights."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(0, size, 1 << 24):
            file.write((random.standard_normal(1 << 22, np.float32) * 0.02).tobytes())
    os.sync()


def main() -> None:
    """Make the file, run the rows in turns, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=4, metavar="GIB")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    parser.add_argument("--folder", type=Path, metavar="DIR")
    parser.add_argument("--stage", type=int, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("files", type=Path, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        convert(*arguments.files, arguments.stage)
        return
    end_in_order()
    with tempfile.TemporaryDirectory(prefix="weightport-floor-", dir=arguments.folder) as place:
        source, target = Path(place, "source"), Path(place, "target")
        make(source, int(arguments.size * (1 << 30)))
        copy = shlex.join(["cp", str(source), str(target)])
        commands = {
            COPY: ["sh", "-c", f"{copy} && sync {shlex.quote(str(target))}"],
            "cp": ["sh", "-c", copy],
        }
        for stage, name in enumerate(STAGES):
            options = ["--stage", str(stage), str(source), str(target)]
            commands[name] = [sys.executable, __file__, *options]
        rounds = []
        for _ in range(arguments.repeat):
            runs = {}
            for name, command in commands.items():
                target.unlink(missing_ok=True)
                runs[name] = measure(command)
            rounds.append(runs)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print(table(f"{arguments.size:g} GiB", rounds))


if __name__ == "__main__":
    main()
