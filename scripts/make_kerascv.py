"""Make real KerasCV checkpoints: Stable Diffusion components with random weights, saved by Keras
itself.

Runs in an environment with keras-cv (0.6.4 on Keras 2.15, or 0.9.0 on Keras 3) and needs nothing of
this project. OUT receives the files, `<component>.npz` with every weight by structural path (see
`kerascv_models.leaves`), `images.npz` if asked for, and `made.json`, which lists it all.

    python make_kerascv.py OUT --components unet,decoder --formats weights.h5,keras
"""

import argparse
import copy
import gc
import importlib.metadata
import json
import time
import warnings
from pathlib import Path

import absl.logging
import kerascv_images
import kerascv_models as models
import numpy as np
import tensorflow as tf
from keras_cv.src.models.stable_diffusion import decoder, diffusion_model, text_encoder
from kerascv_models import COMPONENTS, KERAS_3, KERAS_VERSION, keras

KERAS_2_FORMATS = ("weights.h5", "h5", "model.h5", "keras", "ckpt", "tf_checkpoint", "saved_model")
KERAS_3_FORMATS = (
    "weights.h5",
    "model.h5",
    "keras",
    "tf_checkpoint",
    "saved_model",
    "export",
    "sharded",
)
FORMATS = tuple(dict.fromkeys(KERAS_2_FORMATS + KERAS_3_FORMATS))
TRAINER_FORMATS = (
    "weights.h5",
    "h5",
    "ckpt",
    "tf_checkpoint",
    "sharded",
)  # what a subclassed model can be saved to
DTYPES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
LORA_RANK = 4


class Trainer(keras.Model):
    """Components held by one subclassed model, as fine-tuning scripts hold them."""

    def __init__(self, text_encoder=None, unet=None, image_encoder=None, **_):
        super().__init__()
        if text_encoder is not None:
            self.text_encoder = text_encoder
        if unet is not None:
            self.diffusion_model = unet
        if image_encoder is not None:  # trainers cut the scaling off and sample from the moments
            self.vae = keras.Model(image_encoder.inputs, image_encoder.layers[-2].output)
        self.built = True


def parse_arguments():
    """The command line; refuses what this Keras cannot do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument(
        "--version", choices=("v1", "v2"), default="v1", help="Stable Diffusion 1 or 2"
    )
    parser.add_argument(
        "--components", type=_names(COMPONENTS), default=COMPONENTS, metavar="NAME,..."
    )
    parser.add_argument(
        "--formats", type=_names(FORMATS), default=("weights.h5",), metavar="NAME,..."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--vocab",
        type=int,
        default=models.VOCAB,
        help="token rows; more than 49408 are added tokens",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Keras dtype policy")
    parser.add_argument(
        "--second",
        action="store_true",
        help="build one whole set first: every layer counter is ahead",
    )
    parser.add_argument(
        "--shuffle",
        action="store_true",
        help="build in reverse order, with unrelated layers between",
    )
    parser.add_argument("--freeze", action="store_true", help="freeze a random half of the layers")
    parser.add_argument(
        "--optimizer", action="store_true", help="save AdamW slots and EMA beside the weights"
    )
    parser.add_argument(
        "--deepcopy", action="store_true", help="save a deep copy, as EMA trainers do (Keras 2)"
    )
    parser.add_argument(
        "--trainer",
        action="store_true",
        help="save through one subclassed model that holds them all",
    )
    parser.add_argument(
        "--lora", action="store_true", help="enable LoRA wherever Keras can (Keras 3)"
    )
    parser.add_argument(
        "--quantize", choices=("int8", "int4"), help="quantise wherever Keras can (Keras 3)"
    )
    parser.add_argument(
        "--images",
        type=_numbers,
        default=(),
        metavar="STEPS,...",
        help="also draw images with the unet and the decoder",
    )
    parser.add_argument("--no-truth", action="store_true", help="do not write <component>.npz")
    arguments = parser.parse_args()
    if arguments.images and not {"unet", "decoder"}.issubset(arguments.components):
        parser.error("--images needs the unet and the decoder")
    if (arguments.lora or arguments.quantize) and not KERAS_3:
        parser.error("--lora and --quantize need Keras 3")
    if arguments.deepcopy and (
        KERAS_3 or not {"unet", "text_encoder"}.issuperset(arguments.components)
    ):
        parser.error("--deepcopy needs Keras 2, which can copy the unet and the text_encoder only")
    return arguments


def _numbers(text):
    return tuple(map(int, text.split(",")))


def _names(allowed):
    def parse(text):
        names = tuple(text.split(","))
        if unknown := set(names) - set(allowed):
            raise argparse.ArgumentTypeError(
                f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(allowed)}"
            )
        return names

    return parse


def prepare(component, arguments):
    """Build one component and bring it into the state that is to be saved."""
    model = models.build(component, arguments.version, arguments.vocab)
    models.randomise(model, component, arguments.seed)
    rng = np.random.default_rng([arguments.seed, 2])
    if arguments.quantize:
        model.quantize(arguments.quantize)
    if arguments.lora:
        for _, layer in models.leaves(model):
            enable_lora(layer, rng)
    if arguments.freeze:
        for _, layer in models.leaves(model):
            layer.trainable = bool(rng.integers(2))
    if arguments.optimizer:
        add_optimizer(model, rng)
    return copy.deepcopy(model) if arguments.deepcopy else model


def enable_lora(layer, rng):
    """Give a layer random low-rank factors, if its class can have them."""
    if hasattr(layer, "enable_lora"):
        layer.enable_lora(LORA_RANK)
        slot = "embeddings" if hasattr(layer, "embeddings") else "kernel"
        second = getattr(layer, f"lora_{slot}_b")
        second.assign(rng.standard_normal(second.shape, "f4") * 0.02)


def add_optimizer(model, rng):
    """Compile with an AdamW whose slots and averages are random, so that no one can take them for
    the weights."""
    model.compile(optimizer=keras.optimizers.AdamW(use_ema=True))
    model.optimizer.build(model.trainable_variables)
    for slot in model.optimizer.variables:
        if len(slot.shape):
            slot.assign(tf.cast(rng.standard_normal(tuple(slot.shape), "f4"), slot.dtype))


def create_unrelated_layers(rng):
    """Move the counters that Keras names layers by, as other models in the process would."""
    unrelated = (
        keras.layers.LayerNormalization,
        lambda: diffusion_model.ResBlock(8),
        lambda: diffusion_model.SpatialTransformer(8, 40, fully_connected=False),
        lambda: diffusion_model.Upsample(8),
        lambda: decoder.ResnetBlock(8),
        lambda: decoder.AttentionBlock(8),
        lambda: text_encoder.CLIPEmbedding(8, 768, 8),
        lambda: text_encoder.CLIPEncoderLayer(768, 12, "gelu"),
    )
    for create in unrelated:
        for _ in range(rng.integers(1, 12)):
            create()


def write(model, name, kind, out):
    """Save a model in one format; returns the path that a reader is given."""
    path = out / f"{name}.{kind}"
    if kind in ("ckpt", "tf_checkpoint", "sharded"):
        path.mkdir(exist_ok=True)
    if kind in ("weights.h5", "h5"):
        model.save_weights(path)
    elif kind in ("model.h5", "keras"):
        model.save(path)
    elif kind == "ckpt":
        model.save_weights(path / "ckpt")
    elif kind == "tf_checkpoint":
        tf.train.Checkpoint(model=model).save(path / "ckpt")
    elif kind == "saved_model":
        tf.saved_model.save(model, path) if KERAS_3 else model.save(path)
    elif kind == "export":
        model.export(path, verbose=False)
    else:
        sizes = [sum(np.prod(weight.shape) for weight in layer.weights) for layer in model.layers]
        gigabytes = 4.1e-9 * max(
            *sizes, sum(sizes) / 3
        )  # about three shards; a layer must fit in one
        model.save_weights(path / "model.weights.json", max_shard_size=gigabytes)
    return path


def save(model, name, arguments, made):
    """Save a model in every format asked for, and note what was written or skipped."""
    for kind in arguments.formats:
        entry = {"component": name, "format": kind}
        if kind not in (KERAS_3_FORMATS if KERAS_3 else KERAS_2_FORMATS):
            made["skipped"].append({**entry, "reason": f"Keras {KERAS_VERSION} does not write it"})
        elif name == "trainer" and kind not in TRAINER_FORMATS:
            made["skipped"].append({**entry, "reason": "not for a subclassed model"})
        else:
            begin = time.perf_counter()
            path = write(model, name, kind, arguments.out)
            if kind == "tf_checkpoint" and KERAS_3 and name in ("unet", "trainer"):
                entry["incomplete"] = "Keras 3 leaves out the layers that ResBlock keeps in lists"
            made["files"].append({**entry, "path": path.name})
            print(f"{path}  {time.perf_counter() - begin:.1f} s", flush=True)


def make(arguments):
    """Build and save every component; returns the content of `made.json`."""
    packages = ("keras", "keras-cv", "tensorflow-cpu", "numpy", "h5py")
    flags = {**vars(arguments), "out": "."}
    versions = {name: importlib.metadata.version(name) for name in packages}
    made = {"versions": versions, "flags": flags, "files": [], "skipped": [], "truth": {}}
    rng, built = np.random.default_rng([arguments.seed, 3]), {}
    for component in arguments.components if arguments.second else ():
        models.build(component, arguments.version, arguments.vocab)
    for component in arguments.components[:: -1 if arguments.shuffle else 1]:
        if arguments.shuffle:
            create_unrelated_layers(rng)
        model = prepare(component, arguments)
        if not arguments.no_truth:
            made["truth"][component] = f"{component}.npz"
            np.savez(arguments.out / f"{component}.npz", **models.truth(model))
        if arguments.trainer or arguments.images:
            built[component] = model
        if not arguments.trainer:
            save(model, component, arguments, made)
        del model
        gc.collect()
    if arguments.trainer:
        save(Trainer(**built), "trainer", arguments, made)
    if arguments.images:
        images = kerascv_images.draw(built["unet"], built["decoder"], arguments.images)
        np.savez(arguments.out / "images.npz", **images)
        made["images"] = "images.npz"
    return made


def main():
    """Run the command line."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    gc.disable()  # models stay until the end: looking for cycles again and again finds none
    warnings.simplefilter("ignore")  # Keras warns of every format but its newest
    tf.get_logger().setLevel("ERROR")
    absl.logging.set_verbosity("error")
    keras.mixed_precision.set_global_policy(arguments.dtype)
    with models.narrow(arguments.version, arguments.size == "small"):
        made = make(arguments)
    (arguments.out / "made.json").write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
