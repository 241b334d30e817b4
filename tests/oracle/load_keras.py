"""Load Keras files into the real KerasCV models and write down a digest of every weight; runs in a
Keras environment.

    python load_keras.py JOBS.json FOLDER

JOBS is a list of {"component", "version", "files"}, where "files" is a list of paths. FOLDER gets
for each, under its name and the version, a JSON object of digests by structural path. The models
are narrow. Weights are random before each load, so that none can be right by chance or from the
load before.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import kerascv_models as models
from digests import digest


def main(jobs: Path, folder: Path) -> None:
    """Load each file, and write down what the model then holds."""
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        with models.narrow(job["version"]):
            model = models.build(job["component"], job["version"])
        for seed, path in enumerate(job["files"]):
            models.randomise(model, job["component"], 1000 + seed)
            model.load_weights(path)
            found = {name: digest(array) for name, array in models.truth(model).items()}
            out = folder / f"{job['version']}.{Path(path).name}.json"
            out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
