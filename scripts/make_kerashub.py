"""Make real files of keras-hub: narrow models of Stable Diffusion 3 with random weights, saved by
keras-hub itself, and what they compute.

Runs in an environment with keras-hub and needs nothing of this project. OUT receives the files,
`computed.npz` with inputs and outputs of every model (`<model>.<name>`), and `made.json`.

    python make_kerashub.py OUT --family sd35_medium --formats backbone,diffuser
"""

import argparse
import importlib.metadata
import json
import zlib
from pathlib import Path

import keras
import numpy as np
from keras_hub.models import FluxBackbone, StableDiffusion3Backbone
from keras_hub.src.models.clip.clip_text_encoder import CLIPTextEncoder
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

FAMILIES = {  # layers, whether queries and keys are normalised, blocks with a second attention
    "sd3": (2, None, ()),
    "sd35_medium": (3, "rms_norm", (0, 1)),
    "sd35_large": (2, "rms_norm", ()),
}
FORMATS = (
    "backbone",
    "diffuser",
    "dreambooth",
    "vae",
    "clip",
    "preset",
    "keras",
    "diffuser_keras",
    "sharded",
    "trainer",
    "lora",
    "flux",
)
HEADS = 2
VOCABULARY = 300
POSITIONS = 6  # along a side of the table of positions
LATENT = 8  # pixels of a latent image along a side
VAE_WIDTHS = (32, 64, 96, 96)  # they differ where the real ones do
SHARDS = 6


class Trainer(keras.Model):
    """A backbone in a subclassed model, as fine-tuning scripts hold one."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.built = True


class DreamBooth(Trainer):
    """As the example of keras.io has it: only the diffuser is saved."""

    def save_weights(self, filepath, **options):
        """Save the weights of the diffuser."""
        self.backbone.diffuser.save_weights(filepath, **options)


def build(family, dtype, vocabulary=VOCABULARY):
    """A narrow backbone with keras-hub's initial weights."""
    layers, normalised, dual = FAMILIES[family]
    clips = {
        name: CLIPTextEncoder(
            vocabulary_size=vocabulary,
            embedding_dim=width,
            hidden_dim=width,
            num_layers=count,
            num_heads=HEADS,
            intermediate_dim=2 * width,
            intermediate_activation=activation,
            intermediate_output_index=-2,
            dtype=dtype,
            name=name,
        )
        for name, width, count, activation in (
            ("clip_l", 32, 2, "quick_gelu"),
            ("clip_g", 48, 3, "gelu"),
        )
    }
    vae = VAEBackbone(
        encoder_num_filters=VAE_WIDTHS,
        encoder_num_blocks=(2, 2, 2, 2),
        decoder_num_filters=VAE_WIDTHS[::-1],
        decoder_num_blocks=(3, 3, 3, 3),
        sampler_method="sample",
        dtype=dtype,
        name="vae",
    )
    return StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=64,
        mmdit_num_layers=layers,
        mmdit_num_heads=HEADS,
        mmdit_position_size=POSITIONS,
        mmdit_qk_norm=normalised,
        mmdit_dual_attention_indices=dual,
        vae=vae,
        **clips,
        image_shape=(8 * LATENT, 8 * LATENT, 3),
        dtype=dtype,
    )


def randomise(model, seed):
    """Give every weight random values that depend on seed, path and shape alone."""
    for variable in model.weights:
        if not variable.path.endswith("seed_generator_state"):
            shape = tuple(variable.shape)
            key = [seed, zlib.crc32(variable.path.encode())]
            noise = np.random.default_rng(key).standard_normal(shape).astype("f4")
            kernel = len(shape) > 1 and "embedding" not in variable.path
            noise *= np.float32(np.prod(shape[:-1]) ** -0.5 if kernel else 0.2)
            is_scale = variable.path.endswith(("gamma", "scale"))
            variable.assign(noise + 1 if is_scale else noise)


def compute(backbone):
    """Inputs and outputs of every model, by name."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, VOCABULARY - 1, (2, 12)).astype("int32")
    tokens[:, -1] = VOCABULARY - 1  # the end, which is the largest
    found = {"tokens": tokens}
    pooled = {}
    for name in ("clip_l", "clip_g"):
        outputs = getattr(backbone, name)({"token_ids": tokens}, training=False)
        project = getattr(backbone, f"{name}_projection")
        pooled[name] = project(outputs["sequence_output"], tokens, training=False)
        found[f"{name}.hidden"] = outputs["intermediate_output"]
        found[f"{name}.pooled"] = pooled[name]
    given = {
        "latent": rng.standard_normal((2, LATENT, LATENT, 16)).astype("f4"),
        "context": rng.standard_normal((2, 10, 4096)).astype("f4"),
        "pooled_projection": rng.standard_normal((2, 80)).astype("f4"),
        "timestep": np.array([500.0, 21.5], "f4"),
    }
    found |= {f"diffuser.{name}": value for name, value in given.items()}
    found["diffuser.output"] = backbone.diffuser(given, training=False)
    image = rng.standard_normal((1, 64, 64, 3)).astype("f4")
    found["vae.image"] = image
    found["vae.moments"] = backbone.vae.encoder(image, training=False)
    found["vae.decoded"] = backbone.vae.decode(given["latent"][:1], training=False)
    return {name: keras.ops.convert_to_numpy(value) for name, value in found.items()}


def save(backbone, kind, out):
    """Save a model in one form; returns the name of what a reader is given."""
    if kind in ("backbone", "trainer", "dreambooth"):
        holder = {"backbone": lambda model: model, "trainer": Trainer, "dreambooth": DreamBooth}
        name = "dreambooth-unet" if kind == "dreambooth" else kind
        holder[kind](backbone).save_weights(out / f"{name}.weights.h5")
        return f"{name}.weights.h5"
    if kind in ("diffuser", "vae"):
        getattr(backbone, kind).save_weights(out / f"{kind}.weights.h5")
        return f"{kind}.weights.h5"
    if kind == "clip":
        backbone.clip_l.save_weights(out / "clip.weights.h5")
        return "clip.weights.h5"
    if kind == "preset":
        backbone.save_to_preset(out / "preset")
        return "preset"
    if kind in ("keras", "diffuser_keras"):
        model = backbone if kind == "keras" else backbone.diffuser
        model.save(out / f"{kind}.keras")
        return f"{kind}.keras"
    if kind == "sharded":
        nbytes = sum(np.prod(weight.shape) for weight in backbone.weights) * 4
        path = out / "sharded.weights.json"
        backbone.save_weights(path, max_shard_size=float(nbytes) / SHARDS / 1e9)
        return path.name
    if kind == "lora":
        backbone.clip_l.enable_lora(4)
        backbone.clip_l.save_lora_weights(out / "clip.lora.h5")
        return "clip.lora.h5"
    flux = FluxBackbone(
        input_channels=16,
        hidden_size=64,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[8, 12, 12],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(4, 16),
        text_shape=(4, 64),
        image_ids_shape=(4, 3),
        text_ids_shape=(4, 3),
        y_shape=(64,),
    )
    flux.save_weights(out / "flux.weights.h5")
    return "flux.weights.h5"


def names(text):
    """Names with commas between them."""
    return tuple(text.split(","))


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="sd35_medium")
    parser.add_argument("--formats", type=names, default=("backbone",), metavar="NAME,...")
    parser.add_argument("--dtype", default="float32", help="Keras dtype policy")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="token rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compute", action="store_true", help="write computed.npz")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    backbone = build(arguments.family, arguments.dtype, arguments.vocabulary)
    randomise(backbone, arguments.seed)
    if arguments.compute:
        np.savez(arguments.out / "computed.npz", **compute(backbone))
    files = {kind: save(backbone, kind, arguments.out) for kind in arguments.formats}
    versions = {name: importlib.metadata.version(name) for name in ("keras", "keras-hub")}
    made = {"versions": versions, "files": files}
    (arguments.out / "made.json").write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
