"""What the runners on PyTorch share: inputs in, hooks on modules, calls as in diffusers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import exchange
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# its convolutions round two to three times as much as those by matrix products
torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
SAME_FEATURES = 1e-3  # what float32 makes of one formula differs by less, other formulas by more


def read(file: Path) -> dict[str, Any]:
    """The state dict in an original checkpoint. Pickles may hold tensors only."""
    state: dict[str, Any]
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        exchange.refuse(f"{file}: torch cannot load it ({error})")
    found: dict[str, Any] = state.get("state_dict", state)
    return found


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it; all of them if none has it."""
    found = {
        key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)
    }
    return found or dict(state)


def tensors(inputs: exchange.Arrays, dtype: str) -> dict[str, Tensor]:
    """The inputs of a check; floating-point ones in `dtype`."""
    found = {}
    for name, array in inputs.items():
        x = torch.from_numpy(array)
        found[name] = x.to(getattr(torch, dtype)) if x.is_floating_point() else x
    return found


@contextlib.contextmanager
def recorded(model: nn.Module, watch: Mapping[str, str]) -> Iterator[exchange.Arrays]:
    """What modules return while their model is called, by the names that `watch` gives paths."""
    found: exchange.Arrays = {}
    modules = dict(model.named_modules())

    def spy(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            found[name] = numpy(output if isinstance(output, Tensor) else output[0]).copy()

        return hook

    handles = []
    for path, name in watch.items():
        bare = path.removeprefix("text_model.")  # a level that transformers 5 has not
        module = modules.get(path, modules.get(bare))
        if module is not None:
            handles.append(module.register_forward_hook(spy(name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def give_features(time_embedding: nn.Module, features: Tensor) -> None:
    """Let these sinusoidal features (b, d) enter in place of the model's own, if they agree."""

    def replaced(module: nn.Module, arguments: Any) -> Any:
        own, *rest = arguments
        if own.shape != features.shape:
            return None
        same = (own - features).abs().max() < SAME_FEATURES
        return (features, *rest) if same else None

    time_embedding.register_forward_pre_hook(replaced)


def numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor as an array."""
    array: np.ndarray[Any, Any] = tensor.detach().numpy()
    return array


@torch.no_grad()
def call(how: str, model: Any, x: Mapping[str, Tensor]) -> exchange.Outputs:
    """The outputs of a model called as in diffusers and transformers. Latents are scaled."""
    match how:
        case "embed" | "read":
            return embed(model, x)
        case "flow":
            give_features(model.time_text_embed.timestep_embedder, x["features"])
            return [numpy(model(x["sample"], x["context"], x["pooled"], x["timestep"]).sample)]
        case "flow of patches":
            return [numpy(flow_of_patches(model, x).sample)]
        case "decode":
            return [numpy(model.decode(x["latent"] / model.config.scaling_factor).sample)]
        case "encode":
            return encode(model, x["image"])
        case "denoise":
            return [numpy(denoise(model, x).sample)]
        case "control":
            output = denoise(model, x, controlnet_cond=x["image"])
            down = output.down_block_res_samples
            return [*map(numpy, down), numpy(output.mid_block_res_sample)]
    raise ValueError(how)


def encode(model: Any, image: Tensor) -> exchange.Outputs:
    """The latents of an image, and how uncertain they are if the model says that."""
    encoded = model.encode(image)
    if hasattr(encoded, "latents"):
        return [numpy(encoded.latents * model.config.scaling_factor)]
    latents = encoded.latent_dist
    return [numpy(latents.mean * model.config.scaling_factor), numpy(latents.logvar)]


def embed(model: Any, x: Mapping[str, Tensor]) -> exchange.Outputs:
    """The states of a text encoder, and the pooled ones if it has them."""
    output = model(x["tokens"])
    states = [numpy(output.last_hidden_state)]
    if hasattr(output, "text_embeds"):
        states.append(numpy(output.text_embeds))
    return states


def flow_of_patches(model: Any, x: Mapping[str, Tensor]) -> Any:
    """The velocity of Flux's latents in patches; not every model is told the guidance."""
    return model(
        hidden_states=x["sample"],
        encoder_hidden_states=x["context"],
        pooled_projections=x["pooled"],
        timestep=x["timestep"],
        img_ids=x["places"],
        txt_ids=x["text_places"],
        guidance=x["guidance"] if model.config.guidance_embeds else None,
    )


def denoise(model: Any, x: Mapping[str, Tensor], **options: Any) -> Any:
    """What a denoiser, or a model that steers one, makes of a noised sample."""
    give_features(model.time_embedding, x["features"])
    if "class_labels" in x:
        options["class_labels"] = x["class_labels"]
    if "text_embeds" in x:
        options["added_cond_kwargs"] = {name: x[name] for name in ("text_embeds", "time_ids")}
    return model(x["sample"], x["timestep"], x["context"], **options)


def run(
    check: Mapping[str, Any], model: Any, inputs: exchange.Arrays
) -> tuple[exchange.Outputs, exchange.Arrays]:
    """The outputs of a check and the activations it asks for."""
    model = model.to(getattr(torch, check["dtype"])).eval()
    with recorded(model, check["watch"]) as found:
        outputs = call(check["call"], model, tensors(inputs, check["dtype"]))
    return outputs, found
