"""Convert the same narrow sources with two trees and compare every byte that they write.

    python tests/support/compare_outputs.py REVISION

REVISION is the commit before; the other tree is this checkout, uncommitted changes included. The sources are made once:
every family, every layout, both directions. Of `conversion.json` the version of weightport may differ and, with
`--table-names`, the names and hashes of tables. Exit status 1 if anything else does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Case(NamedTuple):
    """One conversion.

    Attributes:
        name: of the output, below the folder of the tree that wrote it.
        sources: paths in the folder of sources.
        output: the file or folder to write.
        options: further arguments of `weightport.convert`.
    """

    name: str
    sources: tuple[str, ...]
    output: str
    options: dict[str, Any]


_KERAS_PARTS = ("text_encoder", "unet", "decoder", "image_encoder")
_KERAS_SD1 = tuple(f"keras-sd1/model.{part}.weights.h5" for part in _KERAS_PARTS)
_KERAS_SD2 = tuple(f"keras-sd2/model.{part}.h5" for part in _KERAS_PARTS)
CASES = (
    Case("kerascv-sd1", _KERAS_SD1, "repo", {}),
    Case("kerascv-sd2-legacy", _KERAS_SD2, "repo", {"family": "sd2", "dtype": "float16"}),
    Case("ldm-sd1", ("sd1.safetensors",), "repo", {}),
    Case("ldm-sd1-ckpt-ema", ("sd1.ckpt",), "repo", {"ema": True, "variant": "ema"}),
    Case("ldm-sd2", ("sd2.safetensors",), "repo", {"prediction_type": "v_prediction"}),
    Case("ldm-sdxl", ("sdxl.safetensors",), "repo", {"max_shard_size": "20MB"}),
    Case("ldm-sdxl-refiner", ("sdxl_refiner.safetensors",), "repo", {"dtype": "bfloat16"}),
    Case("ldm-upscaler", ("upscaler.safetensors",), "repo", {"prediction_type": "v_prediction"}),
    Case("repo-sd2-to-repo", ("repo-sd2",), "repo", {"image_size": 256}),
    Case("repo-controlnet", ("controlnet-sd1",), "repo", {}),
    Case("repo-sd1-to-kerascv", ("repo-sd1",), "model.weights.h5", {"to": "kerascv"}),
    Case("repo-sd2-to-kerascv-legacy", ("repo-sd2",), "model.h5", {"to": "kerascv"}),
    Case("repo-sd1-to-ldm", ("repo-sd1",), "model.safetensors", {"to": "ldm"}),
    Case("repo-sdxl-to-ldm", ("repo-sdxl",), "model.safetensors", {"to": "ldm"}),
    Case("repo-controlnet-to-ldm", ("controlnet-sd1",), "model.safetensors", {"to": "ldm"}),
)


def make_sources(folder: Path) -> None:
    """Write every source: repos, KerasCV's files, original checkpoints and a pickle with a moving average."""
    import torch
    from safetensors.torch import load_file

    sys.path.insert(0, str(ROOT))
    from tests.support import synthetic

    for family in ("sd1", "sd2", "sdxl", "sdxl_refiner", "upscaler"):
        repo = synthetic.write_repo(folder / f"repo-{family}", family)
        synthetic.write_original(repo, folder / f"{family}.safetensors")
    synthetic.write_controlnet(folder / "controlnet-sd1", "sd1")
    synthetic.write_keras(folder / "repo-sd1", folder / "keras-sd1", ".weights.h5")
    synthetic.write_keras(folder / "repo-sd2", folder / "keras-sd2", ".h5")

    state = load_file(folder / "sd1.safetensors")
    unet = [key for key in state if key.startswith("model.diffusion_model.")]
    averages = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": state[key] * 0.5 for key in unet
    }
    torch.save({"global_step": 1000, "state_dict": state | averages}, folder / "sd1.ckpt")


def convert_all(sources: Path, outputs: Path) -> None:
    """Convert every source with the weightport that this process imports."""
    import weightport

    print("converting with", Path(weightport.__file__).parent)
    os.chdir(sources)  # reports name the sources as they were given
    for case in CASES:
        (outputs / case.name).mkdir(parents=True)
        weightport.convert(list(case.sources), outputs / case.name / case.output, **case.options)


def run_in(tree: Path, sources: Path, outputs: Path) -> None:
    """Run `convert_all` in a process of its own, which imports weightport from a tree."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--convert",
        str(sources),
        str(outputs),
    ]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)


def differences(before: Path, after: Path, table_names: bool) -> list[str]:
    """What differs between two folders of outputs, one line a file."""
    files = {
        folder: {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
        for folder in (before, after)
    }
    found = [f"{path}: only in one of them" for path in sorted(files[before] ^ files[after])]
    for path in sorted(files[before] & files[after]):
        if path.name == "conversion.json":
            same = _report(before / path, table_names) == _report(after / path, table_names)
        else:
            same = (before / path).read_bytes() == (after / path).read_bytes()
        if not same:
            found.append(f"{path}: differs")
    print(f"{len(files[before] & files[after])} files compared, {len(found)} differ")
    return found


def _report(path: Path, table_names: bool) -> dict[str, Any]:
    """A `conversion.json` less what may differ."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    report.pop("weightport_version")
    if table_names:
        report.pop("tables", None)
    return report


def compare(revision: str, table_names: bool) -> list[str]:
    """Convert with the tree of a revision and with this one; what differs."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", place / "tree", revision],
            cwd=ROOT,
            check=True,
        )
        try:
            (place / "sources").mkdir()
            make_sources(place / "sources")
            run_in(place / "tree", place / "sources", place / "before")
            run_in(ROOT, place / "sources", place / "after")
            return differences(place / "before", place / "after", table_names)
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", place / "tree"], cwd=ROOT, check=True
            )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?", default="HEAD")
    parser.add_argument(
        "--table-names", action="store_true", help="names and hashes of tables may differ"
    )
    parser.add_argument("--convert", nargs=2, type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        convert_all(*arguments.convert)
        return 0
    found = compare(arguments.revision, arguments.table_names)
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
