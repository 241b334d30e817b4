#!/usr/bin/env python3
"""Read damaged copies of every kind of file, of weights and beside them: `scripts/fuzz.py [COUNT]`.

Prints how many of each kind were read, and every answer that is not one line with the file's name.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.fuzzing import KINDS, faults, weight_kinds


def main(count: int, seed: int) -> int:
    """Read `count` files of each kind; 1 if an answer was wrong."""
    warnings.simplefilter("ignore")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = (*KINDS, *weight_kinds(Path(folder)))
    for kind in kinds:
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = faults(kind, Path(folder), count, seed)
        seconds = time.process_time() - begin
        print(f"{kind.name:26} {count} read, {len(found)} wrong, {seconds:.1f} CPU s", flush=True)
        for one in found[:20]:
            print("   ", one)
        wrong += len(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:3]]
    sys.exit(main(*numbers, *(20_000, 0)[len(numbers) :]))
