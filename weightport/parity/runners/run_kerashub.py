"""Runs the real keras-hub: run_kerashub.py JOB.json

Its Keras loads the weights from the user's file itself.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import exchange
import numpy as np

with exchange.needs("keras-hub"):
    import h5py
    import keras
    from keras.src.utils.naming import to_snake_case
    from keras_hub.models import StableDiffusion3Backbone, StableDiffusion3TextToImage
    from keras_hub.src.models.clip.clip_text_encoder import CLIPTextEncoder
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

PACKAGES = ("keras-hub", "keras", "numpy")
KERAS = f"keras-hub {importlib.metadata.version('keras-hub')}"
FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2")
NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
ENCODER = "layers/clip_text_encoder"  # is only in a backbone
SHIFT = 0.0609  # of latents; no check sees it
LAYERS_OF_A_STAGE = 2  # of an encoder; a decoder has one more

Config = Mapping[str, Any]
MODELS: dict[str, Any] = {}  # source -> what it was loaded into; a backbone serves all checks


# --- models, as the configs of the repo say -------------------------------------------------------


def build_transformer(config: Config, side: int) -> Any:
    """The diffuser."""
    return MMDiT(
        config["patch_size"],
        config["num_attention_heads"] * config["attention_head_dim"],
        config["num_layers"],
        config["num_attention_heads"],
        config["pos_embed_max_size"],
        latent_shape=(*[side_of(config, side)] * 2, config["in_channels"]),
        context_shape=(None, config["joint_attention_dim"]),
        pooled_projection_shape=(config["pooled_projection_dim"],),
        qk_norm=config.get("qk_norm"),
        dual_attention_indices=config.get("dual_attention_layers") or None,
        name="diffuser",
    )


def side_of(config: Config, side: int) -> int:
    """Of the latents that a diffuser is given: no larger than its table of positions."""
    return min(side, config["patch_size"] * config["pos_embed_max_size"])


def build_vae(config: Config) -> Any:
    """The autoencoder; what it encodes to is its mean."""
    widths = config["block_out_channels"]
    return VAEBackbone(
        encoder_num_filters=widths,
        encoder_num_blocks=[LAYERS_OF_A_STAGE] * len(widths),
        decoder_num_filters=widths[::-1],
        decoder_num_blocks=[LAYERS_OF_A_STAGE + 1] * len(widths),
        sampler_method="mode",
        sample_channels=2 * config["latent_channels"],
        scale=config["scaling_factor"],
        shift=SHIFT,
        name="vae",
    )


def build_text_encoder(config: Config, name: str) -> Any:
    """A text encoder; it gives its last state and the one before."""
    return CLIPTextEncoder(
        vocabulary_size=config["vocab_size"],
        embedding_dim=config["hidden_size"],
        hidden_dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        intermediate_dim=config["intermediate_size"],
        intermediate_activation=config["hidden_act"],
        intermediate_output_index=-2,
        max_sequence_length=config["max_position_embeddings"],
        name=name,
    )


def build_backbone(repo: Path, side: int) -> Any:
    """All models in one."""
    configs = {}
    for folder in FOLDERS:
        path = repo / folder / "config.json"
        if not path.is_file():
            exchange.refuse(
                f"{repo}: has no {folder}, without which {KERAS} loads no backbone; compare with"
                " the repository of the whole"
            )
        configs[folder] = json.loads(path.read_text(encoding="utf-8"))
    transformer = configs["transformer"]
    side = side_of(transformer, side)
    encoders = {name: build_text_encoder(configs[folder], name) for folder, name in NAMES.items()}
    return StableDiffusion3Backbone(
        transformer["patch_size"],
        transformer["num_attention_heads"] * transformer["attention_head_dim"],
        transformer["num_layers"],
        transformer["num_attention_heads"],
        transformer["pos_embed_max_size"],
        transformer.get("qk_norm"),
        transformer.get("dual_attention_layers") or None,
        vae=build_vae(configs["vae"]),
        **encoders,
        image_shape=(8 * side, 8 * side, 3),
    )


# --- their weights --------------------------------------------------------------------------------


def loaded(check: Mapping[str, Any]) -> Any:
    """The backbone, or the one model that was saved, with the weights of the source."""
    source = Path(check["source"])
    side = check["image_size"] // 8
    try:
        if source.suffix == ".keras":
            return keras.models.load_model(source, compile=False)
        weights = weights_in(source)
        if is_backbone(weights):
            model = build_backbone(Path(check["repo"]), side)
        elif check["call"] == "flow":
            model = build_transformer(check["config"], side)
        else:
            model = build_vae(check["config"])
        model.load_weights(str(weights))
    except Exception as error:
        exchange.refuse(f"{source}: {KERAS} cannot load it ({error})")
    return model


def weights_in(source: Path) -> Path:
    """The file that Keras loads: of a preset the one in its folder."""
    if not source.is_dir():
        return source
    found = [source / name for name in ("model.weights.h5", "model.weights.json")]
    return next((path for path in found if path.is_file()), source)


def is_backbone(weights: Path) -> bool:
    """Whether a file, or the index of shards, holds all models."""
    if weights.suffix == ".json":
        places = json.loads(weights.read_text(encoding="utf-8"))["weight_map"]
        return any(place.startswith(f"/{ENCODER}/") for place in places)
    with h5py.File(weights) as file:
        return ENCODER in file


# --- what they compute ----------------------------------------------------------------------------


def call(check: Mapping[str, Any], model: Any, x: exchange.Arrays) -> list[Any]:
    """The outputs of a check, with channels last."""
    match check["call"]:
        case "flow":
            diffuser = getattr(model, "diffuser", model)
            give_features(diffuser, x["features"])
            given = {
                "latent": channels_last(x["sample"]),
                "context": x["context"],
                "pooled_projection": x["pooled"],
                "timestep": x["timestep"],
            }
            return [diffuser(given, training=False)]
        case "embed":
            name = NAMES[check["name"]]
            tokens = x["tokens"].astype("i4")
            states = getattr(model, name)({"token_ids": tokens}, training=False)["sequence_output"]
            return [states, getattr(model, f"{name}_projection")(states, tokens, training=False)]
        case "decode":
            vae = getattr(model, "vae", model)
            latent = x["latent"] / np.float32(check["config"]["scaling_factor"])
            return [vae.decoder(channels_last(latent), training=False)]
        case "encode":
            vae = getattr(model, "vae", model)
            moments = vae.encoder(channels_last(x["image"]), training=False)
            mean, logvar = np.split(np.asarray(moments), 2, axis=-1)
            scale = np.float32(check["config"]["scaling_factor"])
            return [mean * scale, logvar]
    raise ValueError(check["call"])


def draw(check: Mapping[str, Any], x: exchange.Arrays) -> exchange.Outputs:
    """keras-hub's own text-to-image from token ids and noise, step by step.

    Returns the image in [0, 1], and in uint8, as its `generate` makes it.
    """
    parts = check["parts"]
    backbone = loaded({**parts["embed"], "image_size": check["image_size"]})
    for call, name in (("flow", "diffuser"), ("decode", "vae")):
        if parts[call]["source"] != parts["embed"]["source"]:  # saved alone
            object.__setattr__(backbone, name, loaded(parts[call]))
    task = StableDiffusion3TextToImage(backbone, None)
    backbone.configure_scheduler(check["steps"])
    tokens = [
        dict.fromkeys(NAMES.values(), x[name].astype("i4")) for name in ("tokens", "no_tokens")
    ]
    noise = channels_last(x["noise"])
    image = task.generate_step(noise, tokens, check["steps"], check["guidance_scale"])
    values = np.clip(channels_first(image) / 2 + 0.5, 0, 1)
    return [values, np.round(255 * values).astype(np.uint8)]


def give_features(diffuser: Any, features: np.ndarray[Any, Any]) -> None:
    """Let these sinusoidal features enter in place of the model's own, in which an ulp of a
    frequency is a thousand times as much."""
    for layer in diffuser.layers:
        if hasattr(layer, "_create_timestep_embedding"):
            layer._create_timestep_embedding = lambda timesteps: features


def channels_first(array: Any) -> np.ndarray[Any, Any]:
    """Keras's images (b, h, w, c) as (b, c, h, w); anything else as it is."""
    found: np.ndarray[Any, Any] = np.asarray(array)
    return found.transpose(0, 3, 1, 2) if found.ndim == 4 else found


def channels_last(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Images (b, c, h, w) as (b, h, w, c)."""
    return array.transpose(0, 2, 3, 1)


# --- what single layers compute -------------------------------------------------------------------


def layers(model: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every layer in a model or layer, by its key: class and rank in lists, else the attribute."""
    if hasattr(model, "layers"):
        yield from listed(model.layers, path)
        return
    for name, value in vars(model).items():
        place = ".".join(filter(None, (path, name.lstrip("_"))))
        if isinstance(value, keras.layers.Layer):
            yield place, value
            yield from layers(value, place)
        elif isinstance(value, list) and not name.startswith("_"):
            yield from listed([one for one in value if isinstance(one, keras.layers.Layer)], place)


def listed(members: list[Any], path: str) -> Iterator[tuple[str, Any]]:
    """The layers of a list."""
    ranks: Counter[str] = Counter()
    for layer in members:
        name = to_snake_case(type(layer).__name__)
        place = ".".join(filter(None, (path, f"{name}.{ranks[name]}")))
        ranks[name] += 1
        yield place, layer
        yield from layers(layer, place)


@contextlib.contextmanager
def recorded(model: Any, watch: Mapping[str, str]) -> Iterator[exchange.Arrays]:
    """What layers return while their model is called, by the names that `watch` gives keys."""
    found: exchange.Arrays = {}
    front = "" if hasattr(model, "diffuser") or hasattr(model, "vae") else alone(model)
    watched = [
        (watch[key], layer)
        for key, layer in layers(model, front)
        if key in watch and not is_activated(layer)
    ]

    def spy(name: str, layer: Any) -> Any:
        called = layer.call

        def spying(*args: Any, **kwargs: Any) -> Any:
            output = called(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            found[name] = as_ours(layer, first)
            return output

        return spying

    for name, layer in watched:
        layer.call = spy(name, layer)
    try:
        yield found
    finally:
        for _, layer in watched:
            del layer.call


def as_ours(layer: Any, array: Any) -> np.ndarray[Any, Any]:
    """What a layer returns, in our order of axes."""
    if isinstance(layer, keras.layers.RMSNormalization):  # of tokens and heads, not of pixels
        return np.asarray(array).swapaxes(1, 2)
    return channels_first(array)


def is_activated(layer: Any) -> bool:
    """Whether what a layer returns went through an activation, which is a module of ours."""
    return getattr(layer, "activation", None) not in (None, keras.activations.linear)


def alone(model: Any) -> str:
    """The key of a model in a backbone; a VAE's halves are layers of the backbone themselves."""
    return "mm_di_t.0" if isinstance(model, MMDiT) else ""


def run(
    check: Mapping[str, Any], inputs: exchange.Arrays
) -> tuple[exchange.Outputs, exchange.Arrays]:
    """One model, eagerly, as keras-hub's own tests run it."""
    keras.config.set_floatx(check["dtype"])
    keras.config.set_dtype_policy(check["dtype"])
    given = {
        name: array.astype(check["dtype"]) if array.dtype.kind == "f" else array
        for name, array in inputs.items()
    }
    if check["call"] == "draw":
        MODELS.clear()
        return draw(check, given), {}
    if MODELS.keys() != {check["source"]}:
        MODELS.clear()
        MODELS[check["source"]] = loaded(check)
    model = MODELS[check["source"]]
    with recorded(model, check["watch"]) as found:
        outputs = [channels_first(output) for output in call(check, model, given)]
    return outputs, found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    exchange.serve(run, {name: importlib.metadata.version(name) for name in PACKAGES})
