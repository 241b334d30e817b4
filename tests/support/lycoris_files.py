"""Adapters made by LyCORIS' own modules, with random weights, and what their forward computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A kind of module.

    Attributes:
        layer: the layer that it changes: `linear`, `conv3`, `conv1` or `norm`.
        options: of the module's constructor.
    """

    name: str
    kind: Any
    layer: str
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """For the names of tests."""
        return f"{self.name}-{self.layer}"

    @property
    def is_decomposed(self) -> bool:
        """Whether it is DoRA, which has three readings at strengths other than 1."""
        return bool(self.options.get("weight_decompose"))


_LOW = {"lora_dim": 4, "alpha": 3.0}
_TUCKER = {"use_tucker": True}
_ROWS = {"weight_decompose": True, "wd_on_out": True}
_COLUMNS = {"weight_decompose": True, "wd_on_out": False}


def cases() -> Iterator[Case]:
    """Every kind that LyCORIS makes, on every layer that it may change."""
    for layer in ("linear", "conv3", "conv1"):
        for name, kind in (("lora", LoConModule), ("loha", LohaModule), ("lokr", LokrModule)):
            yield Case(f"{name}", kind, layer, _LOW)
            yield Case(f"{name}-rows", kind, layer, _LOW | _ROWS)
            yield Case(f"{name}-columns", kind, layer, _LOW | _COLUMNS)
            if layer == "conv3":
                yield Case(f"{name}-tucker", kind, layer, _LOW | _TUCKER)
                yield Case(f"{name}-tucker-rows", kind, layer, _LOW | _TUCKER | _ROWS)
        yield Case("lora-zero", LoConModule, layer, _LOW | {"alpha": 0})
        yield Case("lora-rs", LoConModule, layer, _LOW | {"rs_lora": True})
        yield Case("lokr-both", LokrModule, layer, _LOW | {"decompose_both": True, "factor": 4})
        yield Case("lokr-whole", LokrModule, layer, _LOW | {"full_matrix": True})
        yield Case("glora", GLoRAModule, layer, _LOW)
        yield Case("ia3", IA3Module, layer, {})
        yield Case("ia3-input", IA3Module, layer, {"train_on_input": True})
        yield Case("full", FullModule, layer, {})
        yield Case("oft", DiagOFTModule, layer, {"lora_dim": 4})
        yield Case("oft-bounded", DiagOFTModule, layer, {"lora_dim": 4, "constraint": 0.02})
        yield Case("oft-rescaled", DiagOFTModule, layer, {"lora_dim": 4, "rescaled": True})
        yield Case("boft", ButterflyOFTModule, layer, {"lora_dim": 4})
        yield Case("boft-bounded", ButterflyOFTModule, layer, {"lora_dim": 4, "constraint": 0.02})
    yield Case("norm", NormModule, "norm", {})


def layer_of(case: Case, seed: int = 0) -> Any:
    """A random layer to change."""
    torch.manual_seed(seed)
    layer: nn.Module
    if case.layer == "linear":
        layer = nn.Linear(12, 16)
    elif case.layer == "norm":
        layer = nn.GroupNorm(4, 16)
    else:
        size = int(case.layer.removeprefix("conv"))
        layer = nn.Conv2d(12, 16, size, padding=size // 2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def module_of(case: Case, layer: Any, strength: float = 1.0, name: str = "x") -> Any:
    """The module on the layer, random, and at work in the layer's forward."""
    module = case.kind(name, layer, strength, **case.options)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key != "dora_scale":
                parameter.normal_(std=0.2)
            else:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    module.apply_to()
    module.eval()
    return module


@torch.no_grad()
def effective_weight(layer: Any) -> tuple[Tensor, Tensor]:
    """The weight and bias that the forward of a layer amounts to."""
    if isinstance(layer, nn.GroupNorm):
        x = torch.randn(1, layer.num_channels, 4, 4, dtype=torch.float64).float()
        normal = nn.functional.group_norm(x, layer.num_groups, eps=layer.eps)
        out = layer(x)
        flat = normal.flatten(2)[0].double()
        seen = out.flatten(2)[0].double()
        weight = (seen[:, 0] - seen[:, 1]) / (flat[:, 0] - flat[:, 1])
        return weight, seen[:, 0] - weight * flat[:, 0]
    if isinstance(layer, nn.Linear):
        bias = layer(torch.zeros(1, layer.in_features))[0]
        return layer(torch.eye(layer.in_features)).T - bias[:, None], bias
    size = layer.kernel_size[0]
    impulses = torch.zeros(layer.in_channels, layer.in_channels, size, size)
    middle = size // 2
    impulses[range(layer.in_channels), range(layer.in_channels), middle, middle] = 1
    bias = layer(torch.zeros_like(impulses[:1]))[0, :, middle, middle]
    weight = (layer(impulses) - bias[:, None, None]).flip(2, 3).transpose(0, 1)
    return weight, bias


def state_of(module: Any, name: str = "x") -> dict[str, Tensor]:
    """The tensors that the module saves."""
    state = module.state_dict()
    return {f"{name}.{key}": tensor.detach().clone() for key, tensor in state.items()}
