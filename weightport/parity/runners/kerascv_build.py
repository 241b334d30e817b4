"""KerasCV's Stable Diffusion components by its own constructors, full-size or narrow. Keras 2.15
and Keras 3.

For models of other widths, `narrow` lends the constructors layer classes that look the width up:
such a model has the real one's layers, names and creation order by construction.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # or TensorFlow announces it, log level or not
os.environ.pop("KERAS_BACKEND", None)  # keras-cv 0.6 would take it as a wish for keras-core

import tensorflow as tf
from keras_cv.src.backend import keras
from keras_cv.src.models.stable_diffusion import (
    decoder,
    diffusion_model,
    image_encoder,
    text_encoder,
)

LENGTH = 77  # tokens of a prompt
VOCAB = 49408
WEIGHTS = ("kernel", "gamma", "embeddings", "bias", "beta")  # attributes of a layer
Widths = Mapping[int, int]  # full-size width -> that of the model


class _Overlay:
    """A module seen with some of its attributes replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _scaled(layer: Any, widths: Widths) -> Any:
    """A layer class whose first argument, the width, is looked up in `widths`."""
    return lambda width, *args, **kwargs: layer(widths.get(width, width), *args, **kwargs)


def _narrow_unet(widths: Widths, context: Widths) -> dict[str, Any]:
    layers, spatial = keras.layers, diffusion_model.SpatialTransformer
    sizes = {320: widths[320], **context}

    def spatial_transformer(heads: int, head_size: int, fully_connected: bool) -> Any:
        width = widths[
            heads * head_size
        ]  # eight heads in version 1, heads of width 64 in version 2
        heads = max(1, width // head_size) if fully_connected else heads
        return spatial(heads, width // heads, fully_connected=fully_connected)

    narrow_layers = _Overlay(
        layers,
        Input=lambda shape, **kwargs: layers.Input([sizes.get(n, n) for n in shape], **kwargs),
        Dense=_scaled(layers.Dense, {1280: 4 * widths[320]}),
    )
    return {
        "keras": _Overlay(keras, layers=narrow_layers),
        "SpatialTransformer": spatial_transformer,
        **{
            name: _scaled(getattr(diffusion_model, name), widths)
            for name in ("PaddedConv2D", "ResBlock", "Upsample")
        },
    }


def _narrow_text_encoder(widths: Widths) -> dict[str, Any]:
    embedding, layer = text_encoder.CLIPEmbedding, text_encoder.CLIPEncoderLayer
    return {
        "CLIPEmbedding": lambda vocab, width, length: embedding(vocab, widths[width], length),
        "CLIPEncoderLayer": lambda width, heads, activation: layer(
            widths[width], max(1, widths[width] * heads // width), activation=activation
        ),
    }


@contextlib.contextmanager
def narrow(unet: Widths, vae: Widths, context: Widths) -> Iterator[None]:
    """While this context lasts, KerasCV's constructors build models of these widths.

    Args:
        unet: widths for 320, 640 and 1280.
        vae: widths for 128, 256 and 512.
        context: the width of the text encoder for 768 and 1024.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(diffusion_model, **_narrow_unet(unet, context)))
        stack.enter_context(mock.patch.multiple(text_encoder, **_narrow_text_encoder(context)))
        for module in (decoder, image_encoder):
            names = ("PaddedConv2D", "ResnetBlock", "AttentionBlock")
            scaled = {name: _scaled(getattr(module, name), vae) for name in names}
            stack.enter_context(mock.patch.multiple(module, **scaled))
        stack.enter_context(_shapes_computed())
        yield


@contextlib.contextmanager
def _shapes_computed() -> Iterator[None]:
    """While this context lasts, Keras 3 sees the shapes that a layer returns by running it.

    It would trace a graph of the layer, which takes longer than running a narrow one on zeros.
    """
    try:
        from keras.src import backend
        from keras.src.backend import compute_output_spec as traced
    except ImportError:  # Keras 2 makes one graph of all
        yield
        return

    def zeros(value: Any) -> Any:
        is_symbol = isinstance(value, keras.KerasTensor)
        return tf.zeros([1, *value.shape[1:]], value.dtype) if is_symbol else value

    def symbol(value: Any) -> Any:
        return keras.KerasTensor([None, *value.shape[1:]], value.dtype.name)

    def computed(call: Any, *args: Any, **kwargs: Any) -> Any:
        given = keras.tree.flatten((args, kwargs))
        if any(None in value.shape[1:] for value in given if isinstance(value, keras.KerasTensor)):
            return traced(call, *args, **kwargs)
        args, kwargs = keras.tree.map_structure(zeros, (args, kwargs))
        return keras.tree.map_structure(symbol, call(*args, **kwargs))

    with mock.patch.object(backend, "compute_output_spec", computed):
        yield


@contextlib.contextmanager
def _traced_once() -> Iterator[None]:
    """While this context lasts, Keras 3 traces a layer that is made of others once, not once more a
    level.

    It would trace such a layer to build what is inside, and then again to use it. Using it builds
    the same variables, in the same order and under the same names; only the time is shorter.
    """
    try:
        from keras.src.layers import layer
    except ImportError:  # Keras 2 traces once
        yield
        return
    with mock.patch.object(layer, "might_have_unbuilt_state", create=True, return_value=False):
        yield


@tf.autograph.experimental.do_not_convert  # nothing here branches on a tensor's value
@_traced_once()
def build(component: str, version: str, image_size: int, vocab: int = VOCAB) -> Any:
    """One component as KerasCV constructs it, with Keras's initial weights; nothing is downloaded.

    Args:
        version: `v1` or `v2`.
        image_size: in pixels; convolutions fix none, but Keras wants to know.
    """
    second = version == "v2"
    if component == "text_encoder":
        kind = text_encoder.TextEncoderV2 if second else text_encoder.TextEncoder
        return kind(LENGTH, vocab_size=vocab, download_weights=False)
    if component == "unet":
        kind = diffusion_model.DiffusionModelV2 if second else diffusion_model.DiffusionModel
        return kind(image_size, image_size, LENGTH, download_weights=False)
    if component == "decoder":
        return decoder.Decoder(image_size, image_size, download_weights=False)
    return image_encoder.ImageEncoder(download_weights=False)


def _class(layer: Any) -> str:
    name = type(layer).__name__
    return (
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
        .lower()
        .replace("2_d", "2d")
    )


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer, outer ones first, by structural path: `res_block.3`,
    `res_block.3.entry_flow.padded_conv2d.conv2d`.

    A path is the class of a top-level layer (both normalisations are `norm`), its rank among the
    layers of that class, then attribute names; in a list attribute, the class. No Keras name takes
    part: those depend on the process.
    """
    ranks: Counter[str] = Counter()
    for layer in model.layers:
        kind = "norm" if _class(layer).endswith("_normalization") else _class(layer)
        yield from _nested(layer, f"{kind}.{ranks[kind]}")
        ranks[kind] += 1


def _nested(layer: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, layer
    if holds_weights(layer):
        return
    for name, child in vars(layer).items():
        if name.startswith("_"):
            continue
        if isinstance(child, keras.layers.Layer):
            yield from _nested(child, f"{path}.{name}")
        elif isinstance(child, list):
            for item in child:
                if isinstance(item, keras.layers.Layer):
                    yield from _nested(item, f"{path}.{name}.{_class(item)}")


def holds_weights(layer: Any) -> bool:
    """Whether a layer has weights of its own, not only those of layers inside it."""
    return any(getattr(layer, name, None) is not None for name in WEIGHTS)
