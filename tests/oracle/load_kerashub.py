"""Load files into real models of keras-hub and write down a digest of every weight; runs in a Keras
environment.

    python load_kerashub.py JOBS.json FOLDER

JOBS is a list of {"model", "files"}: `backbone`, `diffuser`, `vae`, `clip_l` or `clip_g`, and names
-> paths. FOLDER gets a JSON object of digests for each file, under its name. Weights are random
before each load, so that none can be right by chance or from the load before.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import make_kerashub as make
import numpy as np
from digests import digest


def main(jobs: Path, folder: Path) -> None:
    """Load each file, and write down what the model then holds."""
    backbone = make.build("sd35_medium", "float32")
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        model = backbone if job["model"] == "backbone" else getattr(backbone, job["model"])
        for seed, (name, path) in enumerate(job["files"].items()):
            make.randomise(model, 1000 + seed)
            model.load_weights(path)
            found = {weight.path: digest(np.asarray(weight)) for weight in model.weights}
            (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
