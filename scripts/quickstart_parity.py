"""Compare a converted repo with the framework its weights came from: quickstart_parity.py REPO MADE...

REPO is loaded strictly into the PyTorch runtime. MADE are folders of `make_kerascv.py --outputs`: their inputs are run
once with KerasCV's maths and once as diffusers runs the same weights.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from weightport.runtime.clip import CLIPTextModel
from weightport.runtime.unet import UNet2DConditionModel
from weightport.runtime.vae import AutoencoderKL

MODELS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
FOLDERS = {"decoder": "vae", "image_encoder": "vae"}
LIMIT = 1e-5  # relative L2: float32 programs that do the same stay below 4e-6; two norms swapped give 4e-3


def load(folder: Path, semantics: str) -> torch.nn.Module:
    """The model in a repo's folder, with every key accounted for."""
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = MODELS[folder.name](json.loads((folder / "config.json").read_text()), semantics=semantics)
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, strict=True, assign=True)
    return model.eval()


def channels_first(array: np.ndarray) -> torch.Tensor:
    """Keras's (b, h, w, c) as PyTorch's (b, c, h, w)."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


@torch.no_grad()
def run(component: str, model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What the converted model computes, in Keras's layout and scale."""
    if component == "text_encoder":
        return model(torch.from_numpy(inputs["tokens"]).long()).last_hidden_state.numpy()
    if component == "unet":
        timestep, context = torch.from_numpy(inputs["timestep"]), torch.from_numpy(inputs["context"])
        output = model(channels_first(inputs["latent"]), timestep, context).sample
    elif component == "decoder":
        output = model.decode(channels_first(inputs["latent"]) / model.config.scaling_factor).sample
    else:
        mean = model.encode(channels_first(inputs["image"])).latent_dist.mode()
        output = mean * model.config.scaling_factor
    return output.permute(0, 2, 3, 1).numpy()


def difference(output: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Relative L2 and largest absolute difference."""
    delta = output.astype("f8") - expected
    return float(np.linalg.norm(delta) / np.linalg.norm(expected)), float(np.abs(delta).max())


def main(repo: Path, made: list[Path]) -> int:
    """Print one line per component; returns the exit status."""
    print(f"{'':14} {'KerasCV maths':>23} {'as diffusers runs it':>25}")
    print(f"{'component':14} {'relative L2':>12} {'max abs':>10} {'relative L2':>14} {'max abs':>10}")
    worst = 0.0
    for file in sorted(path for folder in made for path in folder.glob("outputs_*.npz")):
        component = file.stem.removeprefix("outputs_")
        inputs = dict(np.load(file))
        cells = []
        for semantics in ("kerascv", "diffusers"):
            model = load(repo / FOLDERS.get(component, component), semantics)
            cells += difference(run(component, model, inputs), inputs["output"])
        print(f"{component:14} {cells[0]:12.1e} {cells[1]:10.1e} {cells[2]:14.1e} {cells[3]:10.1e}")
        worst = max(worst, cells[0])
    print(f"{'equal' if worst < LIMIT else 'NOT EQUAL'}: worst relative L2 {worst:.1e}, limit {LIMIT:.0e}")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]]))
