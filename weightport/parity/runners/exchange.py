"""What the runners share: they read a job, write arrays, and report.

They print a line for each check that is done.
"""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

MISSING = 3  # exit status: the framework is not installed
REFUSED = 4  # it does not take the file
Arrays = dict[str, np.ndarray[Any, Any]]
Outputs = Sequence[np.ndarray[Any, Any]]


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
    """End the process in one line if what is imported inside is not installed."""
    try:
        yield
    except ImportError as error:
        print(f"{package} is not installed for {sys.executable} ({error})", file=sys.stderr)
        sys.exit(MISSING)


def refuse(why: str) -> NoReturn:
    """End the process: the framework itself does not take what it was given."""
    print(" ".join(why.split())[:500], file=sys.stderr)
    sys.exit(REFUSED)


def save(path: str, arrays: Arrays) -> None:
    """Write arrays by name."""
    # numpy 1 would store allow_pickle as one more array
    np.savez(path, **arrays)  # type: ignore[arg-type]


def serve(
    run: Callable[[Mapping[str, Any], Arrays], tuple[Outputs, Arrays]], versions: Mapping[str, str]
) -> None:
    """Do the job that the command line names.

    Args:
        run: takes a check and its inputs, and returns the outputs and, by module, the activations
            asked for.
        versions: of the framework's packages, for the report.
    """
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    seconds = {}
    for check in job["checks"]:
        with np.load(check["inputs"]) as arrays:
            inputs = dict(arrays)
        begin = time.perf_counter()
        outputs, layers = run(check, inputs)
        seconds[check["name"]] = round(time.perf_counter() - begin, 2)
        save(check["outputs"], {f"output {i}": array for i, array in enumerate(outputs)})
        if layers:
            save(check["layers"], layers)
        print(f"done {check['name']}", flush=True)
    report = {
        "versions": {"python": platform.python_version(), **versions},
        "seconds": seconds,
        "peak_rss": peak_memory(),
    }
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
