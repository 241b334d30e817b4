"""What every flavour does to a weight, against the forward of LyCORIS' own modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from weightport.adapters.alphas import Alphas
from weightport.adapters.change import changes_weight, row_blocks, weight_change
from weightport.adapters.modules import Model, Module, decode
from weightport.mappings.families import families

from ..support.lycoris_files import Case, cases, effective_weight, layer_of, module_of, state_of

CASES = list(cases())
NAME = "lora_unet_conv_in"


def decoded(state: dict[str, Tensor], layer: Any) -> Module[Tensor]:
    """The one module in a state dict, of a model that is one layer."""
    shapes = {"conv_in.weight": tuple(layer.weight.shape), "conv_in.bias": tuple(layer.bias.shape)}
    config = families()["sd1"].components["unet"].config
    models = {"unet": Model(shapes, config, frozenset({"conv_in.weight"}))}
    found = decode(state, "sd1", models, Alphas(), lambda one: one.item())
    assert found.fits, (found.unmatched, found.flaws)
    (module,) = found.modules.values()
    return module


def changed(module: Module[Tensor], layer: Any, strength: float) -> Any:
    """The weight after the change, in float64."""
    arrays = {role: tensor.numpy() for role, tensor in module.tensors.items()}
    weight = layer.weight.detach().numpy()
    if not changes_weight(module):
        return weight
    change = weight_change(module, arrays, weight, strength)
    matrix = weight.reshape(len(weight), -1).astype(np.float64)
    rows = [matrix[which] + change(matrix[which], which) for which in row_blocks(*matrix.shape)]
    return np.concatenate(rows).reshape(weight.shape)


@pytest.mark.parametrize(
    ("case", "strength"),
    [(case, m) for case in CASES for m in (1.0, 0.7) if m == 1 or not case.is_decomposed],
    ids=lambda value: getattr(value, "label", value),
)
def test_the_weight_is_that_of_lycoris(case: Case, strength: float) -> None:
    layer = layer_of(case)
    before = layer_of(case)
    module = module_of(case, layer, strength, NAME)
    weight, _ = effective_weight(layer)
    ours = changed(decoded(state_of(module, NAME), before), before, strength)
    theirs = weight.numpy()
    assert np.abs(theirs - before.weight.detach().numpy()).max() > 1e-3
    assert np.linalg.norm(ours - theirs) <= 2e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("case", [case for case in CASES if case.is_decomposed], ids=str)
def test_dora_at_other_strengths_lies_between(case: Case) -> None:
    """Of its three readings the one that gives the base at strength 0."""
    layer = layer_of(case)
    module = decoded(state_of(module_of(case, layer, 1, NAME), NAME), layer_of(case))
    base = layer_of(case).weight.detach().numpy()
    whole = changed(module, layer_of(case), 1.0)
    half = changed(module, layer_of(case), 0.5)
    assert np.abs(half - (base + whole) / 2).max() <= 1e-14


@pytest.mark.parametrize(("alpha", "bound"), [(0.0, 0.0), (0.005, 0.08), (10.0, 160.0)])
def test_kohya_bounds_rotations_even_at_0(alpha: float, bound: float) -> None:
    """kohya's networks.oft: ||Q|| is clamped to alpha * out, and 0 leaves no rotation."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 16)
    blocks = torch.randn(4, 4, 4) * 0.2
    Q = blocks.double() - blocks.double().transpose(1, 2)
    norm = Q.norm()
    Q = Q * ((norm.clamp(max=bound) + 1e-8) / (norm + 1e-8))
    R = (torch.eye(4) + Q) @ (torch.eye(4) - Q).inverse()
    W = layer.weight.detach().double().view(4, 4, 12)
    theirs = torch.einsum("knm,kni->kmi", R, W).reshape(16, 12)
    state = {
        "oft_unet_conv_in.oft_blocks": blocks,
        "oft_unet_conv_in.alpha": torch.tensor(alpha, dtype=torch.float64),
    }
    ours = changed(decoded(state, layer), layer, 1.0)
    assert np.abs(ours - theirs.numpy()).max() <= 1e-12


def test_old_glora_files_have_left_factors_under_the_right_ones_names() -> None:
    case = next(case for case in CASES if case.label == "glora-linear")
    layer = layer_of(case)
    state = state_of(module_of(case, layer, 1, NAME), NAME)
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    old = {
        ".".join(swapped.get(word, word) for word in key.split(".")): tensor
        for key, tensor in state.items()
    }
    before = layer_of(case)
    new = changed(decoded(state, before), before, 1.0)
    assert np.array_equal(changed(decoded(old, before), before, 1.0), new)


def test_input_channels_that_a_module_lacks_stay() -> None:
    """An inpainting model's first layer has 9 of them, most adapters 4."""
    wide = torch.nn.Conv2d(9, 16, 3)
    narrow = torch.nn.Conv2d(4, 16, 3)
    state = {
        f"{NAME}.lora_down.weight": torch.randn(2, 4, 3, 3),
        f"{NAME}.lora_up.weight": torch.randn(16, 2, 1, 1),
    }
    change = changed(decoded(state, wide), wide, 1.0) - wide.weight.detach().numpy()
    expected = changed(decoded(state, narrow), narrow, 1.0) - narrow.weight.detach().numpy()
    assert np.abs(change[:, :4] - expected).max() <= 1e-6
    assert not change[:, 4:].any()
