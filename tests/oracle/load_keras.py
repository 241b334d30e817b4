"""Load Keras files into the real KerasCV models and write down every weight; runs in a Keras
environment.

    python load_keras.py JOBS.json

JOBS is a list of {"component", "version", "files"}, where "files" is a list of pairs (weights,
out.npz). The models are narrow. Weights are random before each load, so that none can be right by
chance or from the load before.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import kerascv_models as models

for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    with models.narrow(job["version"]):
        model = models.build(job["component"], job["version"])
    for seed, (weights, out) in enumerate(job["files"]):
        models.randomise(model, job["component"], 1000 + seed)
        model.load_weights(weights)
        np.savez(out, **models.truth(model))
