"""Load a Keras file into the real KerasCV model and write down every weight; runs in a Keras environment.

    python load_keras.py WEIGHTS COMPONENT VERSION SIZE OUT.npz
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import kerascv_models as models

weights, component, version, size, out = sys.argv[1:]
with models.narrow(version, size == "small"):
    model = models.build(component, version)
    model.load_weights(weights)
    np.savez(out, **models.truth(model))
