"""Runs the real keras-cv: run_kerascv.py JOB.json

Its Keras loads the weights from the user's file itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import io
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import exchange
import numpy as np

with exchange.needs("keras-cv"):
    import kerascv_build
    import tensorflow as tf
    from keras_cv.src.models.stable_diffusion.stable_diffusion import (
        StableDiffusion,
        StableDiffusionV2,
    )
    from kerascv_build import keras

PACKAGES = ("keras-cv", "keras", "numpy")
KERAS = f"Keras {importlib.metadata.version('keras')}"
VERSIONS = {"sd1": "v1", "sd2": "v2"}  # as kerascv_build calls them
GENERATORS = {"sd1": StableDiffusion, "sd2": StableDiffusionV2}
MODELS: dict[tuple[str, str, int], Any] = {}
PARTS = {"embed": "_text_encoder", "denoise": "_diffusion_model", "decode": "_decoder"}


def build(check: Mapping[str, Any]) -> Any:
    """The check's model, at the widths that its config says."""
    with contextlib.ExitStack() as stack:
        if is_narrow(check):
            stack.enter_context(kerascv_build.narrow(**widths(check)))
        vocabulary = check["config"].get("vocab_size")
        return kerascv_build.build(
            check["name"], VERSIONS[check["family"]], check["image_size"], vocabulary
        )


def is_narrow(check: Mapping[str, Any]) -> bool:
    """Whether the model has other widths than stock ones."""
    config = check["config"]
    stock = check["stock_config"]
    keys = ("block_out_channels", "cross_attention_dim", "hidden_size")
    return any(config.get(key) != stock.get(key) for key in keys)


def widths(check: Mapping[str, Any]) -> dict[str, dict[int, int]]:
    """Stock width -> the model's, for each kind of model that `kerascv_build.narrow` asks about."""
    config = check["config"]
    context = config.get("cross_attention_dim", config.get("hidden_size"))
    stages = check["stock_config"].get("block_out_channels", ())
    own = dict(zip(stages, config.get("block_out_channels", ()), strict=True))
    denoises = check["call"] == "denoise"
    return {
        "unet": own if denoises else {width: width for width in (320, 640, 1280)},
        "vae": own if own and not denoises else {width: width for width in (128, 256, 512)},
        "context": {768: context, 1024: context},
    }


def loaded(check: Mapping[str, Any]) -> Any:
    """The check's model with the weights of its file.

    It is kept: the pipeline is made of the models that were checked alone.
    """
    key = (check["name"], check["source"], check["image_size"])
    if key not in MODELS:
        keras.backend.clear_session()  # some formats know layers by how many there were
        MODELS[key] = load(build(check), Path(check["source"]))
    return MODELS[key]


def load(model: Any, path: Path) -> Any:
    """The model with the weights of a file, read by Keras.

    A SavedModel is what Keras makes of it.
    """
    try:
        if (path / "saved_model.pb").exists():
            return keras.models.load_model(path, compile=False)
        prefix = tf.train.latest_checkpoint(str(path)) if path.is_dir() else None
        model.load_weights(prefix or str(path))
    except Exception as error:
        exchange.refuse(f"{path}: {KERAS} cannot load it ({error})")
    return model


@contextlib.contextmanager
def recorded(model: Any, watch: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What layers return while their model is called, by the names that `watch` gives paths."""
    found: dict[str, Any] = {}
    watched = [(watch[path], layer) for path, layer in kerascv_build.layers(model) if path in watch]

    def spy(name: str, call: Any) -> Any:
        def spying(*args: Any, **kwargs: Any) -> Any:
            found[name] = call(*args, **kwargs)
            return found[name]

        return tf.autograph.experimental.do_not_convert(spying)

    for name, layer in watched:
        layer.call = spy(name, layer.call)
    try:
        yield found
    finally:
        for _, layer in watched:
            del layer.call


def channels_first(array: Any) -> np.ndarray[Any, Any]:
    """Keras's images (b, h, w, c) as (b, c, h, w); anything else as it is."""
    found: np.ndarray[Any, Any] = np.asarray(array)
    return found.transpose(0, 3, 1, 2) if found.ndim == 4 else found


def channels_last(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Images (b, c, h, w) as (b, h, w, c); anything else as it is."""
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def arguments(check: Mapping[str, Any], inputs: exchange.Arrays, dtype: str) -> list[Any]:
    """The inputs in Keras's order, layout and dtype."""
    if check["call"] == "embed":
        tokens = inputs["tokens"].astype("i4")
        return [tokens, np.broadcast_to(np.arange(tokens.shape[1], dtype="i4"), tokens.shape)]
    if check["call"] == "denoise":
        names = ("sample", "features", "context")
        return [channels_last(inputs[name]).astype(dtype) for name in names]
    return [channels_last(array).astype(dtype) for array in inputs.values()]


class Recording:
    """A model that keeps what it predicted last."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.output: Any = None

    def predict_on_batch(self, *args: Any) -> Any:
        """The model's prediction."""
        self.output = self.model.predict_on_batch(*args)
        return self.output


def pipeline(check: Mapping[str, Any], inputs: exchange.Arrays) -> exchange.Outputs:
    """KerasCV's own `generate_image` from token ids and noise.

    Returns the image in [0, 1], and as it comes, in uint8.
    """
    size = check["image_size"]
    jit_compile = not is_narrow(check["parts"]["denoise"])
    generator = GENERATORS[check["family"]](size, size, jit_compile=jit_compile)
    for call, attribute in PARTS.items():
        model = loaded(check["parts"][call])
        model.compile(jit_compile=jit_compile)
        setattr(generator, attribute, model)
    generator._decoder = Recording(generator.decoder)
    features = check["parts"]["denoise"]["config"]["block_out_channels"][0]
    generator._get_timestep_embedding = partial(generator._get_timestep_embedding, dim=features)
    tokens = inputs["tokens"].astype("i4")
    positions = np.arange(tokens.shape[1], dtype="i4")[None]
    context = generator.text_encoder.predict_on_batch({"tokens": tokens, "positions": positions})
    with contextlib.redirect_stdout(io.StringIO()):  # a progress bar
        image = generator.generate_image(
            context,
            batch_size=1,
            num_steps=check["steps"],
            unconditional_guidance_scale=check["guidance_scale"],
            diffusion_noise=channels_last(inputs["noise"]),
        )
    decoded = (generator.decoder.output + 1) / 2
    return [channels_first(decoded.clip(0, 1)), channels_first(image)]


def run(
    check: Mapping[str, Any], inputs: exchange.Arrays
) -> tuple[exchange.Outputs, exchange.Arrays]:
    """Under XLA, as KerasCV compiles its models; narrow ones take longer to compile than to run.

    At full width TensorFlow's own GroupNormalization loses ten times as much.
    """
    gc.collect()
    keras.backend.set_floatx(check["dtype"])  # of the inputs
    keras.mixed_precision.set_global_policy(check["dtype"])  # of the layers
    if check["call"] == "draw":
        return pipeline(check, inputs), {}
    model = loaded(check)
    given = [tf.constant(array) for array in arguments(check, inputs, check["dtype"])]

    def predict(watch: Mapping[str, str], *args: Any) -> tuple[Any, dict[str, Any]]:
        with recorded(model, watch) as found:
            output = model(list(args) if len(args) > 1 else args[0], training=False)
        return output, found

    if is_narrow(check):
        output, found = predict(check["watch"], *given)
    else:
        compiled = partial(tf.function, autograph=False, jit_compile=check["dtype"] == "float32")
        output, found = compiled(partial(predict, {}))(*given)
        if check["watch"]:  # apart: XLA fuses, and rounds, otherwise where layers are to be seen
            _, found = compiled(partial(predict, check["watch"]))(*given)
    return [channels_first(output)], {name: channels_first(array) for name, array in found.items()}


if __name__ == "__main__":
    gc.disable()  # a model is millions of objects that stay; between models `run` collects
    warnings.simplefilter("ignore")
    tf.get_logger().setLevel("ERROR")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    exchange.serve(run, {**versions, "tensorflow": tf.__version__})
