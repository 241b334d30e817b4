#!/usr/bin/env python3
"""How `weightport inspect` grows with the number of names, reader by reader: CPU seconds and memory
of a process of its own, for files of 1,000 to 100,000 tiny tensors. Where growth is linear, the
last column ends constant.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.synthetic import write_many_tensors
from tests.support.tf_bundle_writer import write_bundle

SIZES = (1_000, 10_000, 100_000)
CHILD = """
import re, sys, time
from pathlib import Path
from weightport.api import inspect
from weightport.errors import ConversionError
begin = time.process_time()
try:
    inspect(sys.argv[1])
except ConversionError as error:
    print(error, file=sys.stderr)
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) / 1000
print(time.process_time() - begin, peak)
"""


def pickle(path: Path, count: int) -> None:
    """A file of `torch.save`, whose tensors share a storage."""
    storage = torch.zeros(count)
    torch.save({f"block.{i}x.weight": storage[i : i + 1] for i in range(count)}, path)


def hdf5(path: Path, count: int) -> None:
    """Keras weights, one layer for each tensor."""
    with h5py.File(path, "w") as file:
        for i in range(count):
            file.create_dataset(f"layers/x{i}/vars/0", data=np.zeros(1, "f4"))


def one_group(path: Path, count: int) -> None:
    """The same with all tensors in one group."""
    with h5py.File(path, "w") as file:
        group = file.create_group("layers")
        for i in range(count):
            group.create_dataset(f"x{i}", data=np.zeros(1, "f4"))


def bundle(path: Path, count: int) -> None:
    """A TensorFlow checkpoint without an object graph."""
    tensors = {f"block/{i}x/weight": np.zeros(1, "f4") for i in range(count)}
    write_bundle(path.with_suffix(""), tensors, None, checksums=False)


READERS: dict[str, Callable[[Path, int], None]] = {
    "m.safetensors": write_many_tensors,
    "m.ckpt": pickle,
    "m.weights.h5": hdf5,
    "g.weights.h5": one_group,
    "m.index": bundle,
}


def main() -> None:
    """Print a line for each reader and size."""
    print(f"{'reader':15} {'names':>7} {'CPU s':>7} {'MB':>6} {'us a name':>10}")
    for name, write in READERS.items():
        for count in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / name
                write(path, count)
                ran = subprocess.run(
                    [sys.executable, "-c", CHILD, str(path)],
                    capture_output=True,
                    text=True,
                    check=True,
                )
            print(ran.stderr.strip()[-200:], file=sys.stderr)
            seconds, peak = map(float, ran.stdout.split())
            each = 1e6 * seconds / count
            print(f"{name:15} {count:7} {seconds:7.2f} {peak:6.0f} {each:10.1f}", flush=True)


if __name__ == "__main__":
    main()
