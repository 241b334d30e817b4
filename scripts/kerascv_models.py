"""Random weights for KerasCV's Stable Diffusion components, and what they are. Runs on Keras 2.15
and on Keras 3.

The models, full-size or narrow, are those that `weightport parity` builds
(weightport/parity/runners/kerascv_build.py).
"""

import contextlib
import importlib.metadata
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent / "weightport" / "parity" / "runners")
)

import kerascv_build
import numpy as np
import tensorflow as tf
from kerascv_build import VOCAB, keras

COMPONENTS = ("text_encoder", "unet", "decoder", "image_encoder")
KERAS_VERSION = importlib.metadata.version("keras")
KERAS_3 = KERAS_VERSION.startswith("3.")
IMAGE_SIZE = 128  # pixels; convolutions fix no size

# Full width -> narrow width. Widths differ where the real ones do, so that the same blocks have
# residual projections. Time embeddings stay four times the first width. Attention keeps the real
# rule: eight heads in version 1, heads of width 64 in version 2 and in both text encoders.
UNET_WIDTHS = {"v1": {320: 32, 640: 64, 1280: 96}, "v2": {320: 64, 640: 128, 1280: 192}}
VAE_WIDTHS = {128: 32, 256: 64, 512: 96}
CONTEXT_WIDTHS = {768: 128, 1024: 128}

SLOTS = {
    "kernel": "weight",
    "gamma": "weight",
    "embeddings": "weight",
    "bias": "bias",
    "beta": "bias",
}


@contextlib.contextmanager
def narrow(version: str, enabled: bool = True) -> Iterator[None]:
    """While this context lasts, KerasCV's constructors build narrow models (full ones if not
    `enabled`)."""
    if not enabled:
        yield
        return
    with kerascv_build.narrow(UNET_WIDTHS[version], VAE_WIDTHS, CONTEXT_WIDTHS):
        yield


def build(component: str, version: str, vocab: int = VOCAB) -> keras.Model:
    """One component as KerasCV constructs it, with Keras's initial weights; nothing is
    downloaded."""
    return kerascv_build.build(component, version, IMAGE_SIZE, vocab)


def leaves(model: keras.Model) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Every layer that holds weights itself, by structural path:
    `res_block.3.entry_flow.padded_conv2d.conv2d`."""
    return (
        (path, layer)
        for path, layer in kerascv_build.layers(model)
        if kerascv_build.holds_weights(layer)
    )


def slots(model: keras.Model) -> Iterator[tuple[str, keras.layers.Layer, str]]:
    """Every weight as (structural path, layer, attribute name): `("dense.0.bias", <Dense>,
    "bias")`."""
    for path, layer in leaves(model):
        for slot, role in SLOTS.items():
            if getattr(layer, slot, None) is not None:
                yield f"{path}.{role}", layer, slot


def randomise(model: keras.Model, component: str, seed: int) -> None:
    """Give every weight random values that depend on seed, component, path and shape alone, rounded
    from float32."""
    for path, layer, slot in slots(model):
        variable = getattr(layer, slot)
        shape = tuple(variable.shape)
        noise = np.random.default_rng(
            [seed, zlib.crc32(f"{component}.{path}".encode())]
        ).standard_normal(shape, "f4")
        if slot == "kernel":
            noise /= np.float32(math.sqrt(math.prod(shape[:-1])))
        else:
            noise *= np.float32(0.05 if slot == "embeddings" else 0.2)
        variable.assign(tf.cast(noise + 1 if slot == "gamma" else noise, variable.dtype))


def truth(model: keras.Model) -> dict[str, np.ndarray]:
    """The effective weights by structural path: LoRA merged, quantised ones as they are used,
    bfloat16 as float32."""
    return {path: _effective(layer, slot) for path, layer, slot in slots(model)}


def _effective(layer, slot):
    values = np.asarray(getattr(layer, slot))
    if values.dtype.kind == "f":
        return values
    values, scale = values.astype("f4"), getattr(layer, f"{slot}_scale", None)
    if scale is None:
        return values
    scale, zero = np.asarray(scale, "f4"), getattr(layer, f"{slot}_zero", None)
    if zero is None:  # one scale per output of a kernel, per row of an embedding
        return values / (scale if slot == "kernel" else scale[:, None])
    groups, axis = np.asarray(layer.g_idx).astype(int), 0 if slot == "kernel" else 1
    return (values - np.take(np.asarray(zero, "f4"), groups, axis)) * np.take(scale, groups, axis)
