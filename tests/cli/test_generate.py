"""`weightport generate`: images, their settings, and the way back from a PNG."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from weightport.converters.repo.tokenizer import write_tokenizer
from weightport.recipe import CHUNK, Recipe, read_recipe, write_image
from weightport.runtime.models.attention import Attention
from weightport.runtime.models.clip import CLIPTextModel
from weightport.runtime.models.controlnet import ControlNetModel
from weightport.runtime.models.unet import UNet2DConditionModel
from weightport.runtime.models.vae import AutoencoderKL
from weightport.runtime.pipelines.stable_diffusion import StableDiffusionPipeline
from weightport.runtime.schedulers import DDIMScheduler
from weightport.runtime.text.tokenizer import CLIPTokenizer

from ..support.adapter_files import kohya_state
from ..support.command import Run, run

UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny model."""
    folder = tmp_path_factory.mktemp("generate")
    write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(
        {**UNET, "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    ).eval()
    ControlNetModel.from_config(
        {**UNET, "conditioning_embedding_out_channels": [16, 32]}
    ).save_pretrained(folder / "control")
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(
            {"block_out_channels": [32, 32], "norm_num_groups": 8, **VAE_BLOCKS}
        ).eval(),
        text_encoder=CLIPTextModel(
            {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "hidden_act": "quick_gelu",
            }
        ).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(),
        requires_safety_checker=False,
    ).save_pretrained(folder / "repo")
    return folder / "repo"


VAE_BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def generate(*arguments: str | Path) -> Run:
    return run("generate", *arguments)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def photo(path: Path, size: int = 16) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


SMALL = ("--steps", "2", "--device", "cpu")


def test_an_image_and_its_settings(repo: Path, place: Path) -> None:
    out = place / "cat.png"
    ran = generate(
        repo, "a cat", *SMALL, "--seed", "7", "--guidance", "3", "--scheduler", "euler", "-o", out
    )
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"wrote {out} (seed 7, 16x16)\n"
    recipe = read_recipe(out)
    expected = Recipe(
        repo=str(repo), prompt="a cat", scheduler="euler", steps=2, seed=7, guidance=3.0
    )
    assert recipe == Recipe(**{**vars(expected), "torch": torch.__version__})
    pipe: Any = StableDiffusionPipeline.from_pretrained(repo)
    from weightport.runtime.schedulers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(7)
    image = pipe("a cat", num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
    assert np.array_equal(pixels(out), np.asarray(image)), (
        "the command adds nothing to the pipeline"
    )


def options(place: Path, repo: Path) -> dict[str, list[str | Path]]:
    return {
        "plain": [],
        "all": [
            "--negative",
            "a dög",
            "--guidance",
            "2.5",
            "--scheduler",
            "dpm++2m-karras",
            "--size",
            "24x32",
        ],
        "image": ["--image", photo(place / "photo.png"), "--strength", "0.9"],
        "resized": ["--image", photo(place / "photo.png", 40), "--strength", "0.9", "--size", "16"],
        "mask": ["--image", photo(place / "photo.png"), "--mask", photo(place / "mask.png")],
        "controlnet": [
            "--image",
            photo(place / "photo.png"),
            "--controlnet",
            repo.parent / "control",
        ],
        "bfloat16": ["--dtype", "bfloat16"],
        "changed": ["--lora", f"{lora(repo)}@0.7", "--lora", lora(repo), "--embedding", word(repo)],
    }


def lora(repo: Path) -> Path:
    """An adapter of the UNet, as kohya names it."""
    unet = UNet2DConditionModel.from_pretrained(repo / "unet")
    path = repo.parent / "style.safetensors"
    if not path.exists():
        state = kohya_state({"lora_unet": unet}, only=("to_q", "to_v"), dtype=torch.float32)
        save_file(state, path)
    return path


def word(repo: Path) -> Path:
    """An embedding of two vectors."""
    path = repo.parent / "<dot>.pt"
    torch.save({"string_to_param": {"*": torch.ones(2, 16)}, "name": "<dot>"}, path)
    return path


def test_adapters_and_embeddings_are_those_of_the_pipeline(repo: Path, place: Path) -> None:
    style = lora(repo)
    given: list[str | Path] = ["--lora", f"{style}@unet=0.5", "--embedding", word(repo)]
    given += ["--seed", "3"]
    assert generate(repo, "a <dot>", *SMALL, *given, "-o", place / "a.png").status == 0
    pipe: Any = StableDiffusionPipeline.from_pretrained(repo)
    plain = pipe("a", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters("style", 0.5)
    pipe.load_textual_inversion({"<dot>": torch.ones(2, 16)})
    generator = torch.Generator().manual_seed(3)
    image = pipe("a <dot>", num_inference_steps=2, generator=generator).images[0]
    assert np.array_equal(pixels(place / "a.png"), np.asarray(image))
    assert not np.array_equal(pixels(place / "a.png"), np.asarray(plain))
    changed = place / "other.safetensors"
    shutil.copy(style, changed)
    recipe = read_recipe(place / "a.png")
    assert recipe.lora == (f"{style}@unet=0.5",)
    moved = replace(recipe, lora=(f"{changed}@unet=0.5",))
    write_image(image, moved, place / "moved.png")
    assert generate("--from", place / "moved.png", "-o", place / "b.png").status == 0
    assert np.array_equal(pixels(place / "b.png"), pixels(place / "a.png"))
    save_file({key: 2 * one for key, one in load_file(style).items()}, changed)
    ran = generate("--from", place / "moved.png", "-o", place / "c.png")
    assert re.fullmatch(r"error: .*other.safetensors: has changed since the image.*\n", ran.err)
    ran = generate("--from", place / "moved.png", "--lora", changed, "-o", place / "c.png")
    assert ran.status == 0, ran.err


@pytest.mark.parametrize(
    "name", ["plain", "all", "image", "resized", "mask", "controlnet", "bfloat16", "changed"]
)
def test_made_again_bit_for_bit(repo: Path, place: Path, name: str) -> None:
    given = options(place, repo)[name]
    ran = generate(repo, "a “cat” 猫", *SMALL, *given, "-o", place / "one.png")
    assert ran.status == 0, ran.err
    ran = generate("--from", place / "one.png", "-o", place / "two.png")
    assert ran.status == 0, ran.err
    assert (place / "two.png").read_bytes() == (place / "one.png").read_bytes()
    ran = generate("--from", place / "one.png", "--seed", "5", "-o", place / "three.png")
    assert ran.status == 0, ran.err
    assert not np.array_equal(pixels(place / "three.png"), pixels(place / "one.png"))
    expected = vars(read_recipe(place / "one.png")) | {"seed": 5}
    assert vars(read_recipe(place / "three.png")) == expected


def test_each_of_several_images_stands_alone(repo: Path, place: Path) -> None:
    ran = generate(
        repo, "a cat", *SMALL, "--seed", "1", "-n", "3", "-o", place / "cat.png", "--json"
    )
    assert ran.status == 0, ran.err
    made = json.loads(ran.out)
    assert [one["seed"] for one in made] == [1, 2, 3]
    assert [Path(one["path"]).name for one in made] == ["cat-1.png", "cat-2.png", "cat-3.png"]
    assert generate("--from", place / "cat-2.png", "-o", place / "again.png").status == 0
    assert (place / "again.png").read_bytes() == (place / "cat-2.png").read_bytes()


def test_seeds_are_random_by_default(repo: Path, place: Path) -> None:
    for name in ("a.png", "b.png"):
        assert generate(repo, "a cat", *SMALL, "-o", place / name).status == 0
    assert read_recipe(place / "a.png").seed != read_recipe(place / "b.png").seed


def test_a_long_prompt_is_one_warning(repo: Path, place: Path) -> None:
    ran = generate(repo, "cat " * 80 + "mouse", *SMALL, "-q", "-o", place / "a.png")
    assert (ran.status, ran.out) == (0, "")
    assert re.fullmatch(r"warning: .*77 tokens.*mouse\n", ran.err)


def test_settings_are_not_believed_blindly(repo: Path, place: Path) -> None:
    photo(place / "photo.png")
    assert (
        generate(repo, "a", *SMALL, "--image", place / "photo.png", "-o", place / "one.png").status
        == 0
    )
    photo(place / "photo.png", 24)
    ran = generate("--from", place / "one.png", "-o", place / "two.png")
    assert ran.status == 1
    assert re.fullmatch(r"error: .*photo.png: has changed since the image was made.*\n", ran.err)
    ran = generate(
        "--from", place / "one.png", "--image", place / "photo.png", "-o", place / "two.png"
    )
    assert ran.status == 0, ran.err


def damaged(path: Path, text: str | None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text(CHUNK, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


GOOD = json.dumps(vars(Recipe("r", "p")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no settings of weightport"),
        ("{", "the settings in it are damaged"),
        ("[]", "the settings in it are damaged"),
        ('{"repo": "r"}', "the settings in it are damaged"),
        (GOOD.replace('"seed": 0', '"seed": "0"'), "damaged: `seed` must be integer"),
        (GOOD.replace('"size": null', '"size": ["a", 8]'), "damaged: `size.0` must be integer"),
        (GOOD.replace('"steps": null', '"steps": [1]'), "damaged: `steps` must be integer"),
        (GOOD.replace("}", ', "more": 1}'), "damaged: .*more"),
    ],
)
def test_damaged_settings(place: Path, text: str | None, message: str) -> None:
    ran = generate("--from", damaged(place / "in.png", text), "-o", place / "out.png")
    assert ran.status == 1
    assert re.fullmatch(rf"error: .*in.png: .*{message}.*\n", ran.err), ran.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{repo}"], 2, "required: REPO, PROMPT"),
        (["{place}/none", "a"], 1, "none: there is no such folder"),
        (["{repo}", "a", "--scheduler", "dim"], 1, "no scheduler 'dim'; did you mean ddim"),
        (["{repo}", "a", "--size", "13x16"], 1, "multiple of 8"),
        (["{repo}", "a", "--size", "ax16"], 2, "argument --size: invalid"),
        (["{repo}", "a", "--steps", "0"], 2, "argument --steps: invalid"),
        (["{repo}", "a", "--strength", "0.5"], 1, "its StableDiffusionPipeline takes no strength"),
        (
            ["{repo}", "a", "--image", "{place}/none.png"],
            1,
            "none.png: cannot be opened .No such file",
        ),
        (
            ["{repo}", "a", "--image", "{repo}/model_index.json"],
            1,
            "model_index.json: not an image",
        ),
        (["{repo}", "a", "--image", "{place}/photo.png", "--strength", "2"], 1, "strength"),
        (["{repo}", "a", "--mask", "{place}/photo.png"], 1, "image is needed"),
        (["{repo}", "a", "--controlnet", "{repo}"], 1, ""),
        (["{repo}", "a", "--device", "abacus"], 1, "abacus"),
        (["{repo}", "a", "-o", "{place}/photo.png"], 1, "photo.png: exists already"),
        (["{repo}", "a", "-o", "{place}/no/a.png"], 1, "there is no such folder"),
        (["{repo}", "a", "--lora", "{place}/no.safetensors@2"], 1, "no.safetensors: cannot be op"),
        (["{repo}", "a", "--lora", "{place}/photo.png"], 1, "photo.png"),
        (["{repo}", "a", "--embedding", "{repo}/model_index.json"], 1, "model_index.json"),
        (["--from", "{repo}/model_index.json"], 1, "not a PNG"),
        (["--from", "{place}/none.png"], 1, "none.png: cannot be opened .No such file"),
    ],
)
def test_refusals(repo: Path, place: Path, arguments: list[str], status: int, message: str) -> None:
    before = photo(place / "photo.png").read_bytes()
    filled = [argument.format(repo=repo, place=place) for argument in arguments]
    ran = generate(
        *filled, *([] if "--from" in filled or "--steps" in filled else ["--steps", "2"])
    )
    assert ran.status == status
    assert re.fullmatch(rf"error: .*{message}.*\n", ran.err), ran.err
    assert ran.out == ""
    assert (place / "photo.png").read_bytes() == before
    assert sorted(path.name for path in place.iterdir()) == ["cwd", "photo.png"]
    assert not list((place / "cwd").iterdir())


def test_overwrite(repo: Path, place: Path) -> None:
    photo(place / "photo.png")
    assert generate(repo, "a", *SMALL, "-o", place / "photo.png", "--overwrite").status == 0
    assert read_recipe(place / "photo.png").prompt == "a"


def test_a_pipeline_learns_a_word_and_projects_the_text_once(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(repo)
    pipe.load_textual_inversion({"<dot>": torch.randn(2, 16)})
    assert pipe.tokenizer.added_tokens_encoder["<dot>_1"] == 49409
    attention = next(
        module
        for module in pipe.unet.modules()
        if isinstance(module, Attention) and is_cross(module)
    )
    calls: list[int] = []
    attention.to_k.register_forward_hook(lambda *_: calls.append(1))

    def image(prompt: str) -> np.ndarray[Any, Any]:
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipe(prompt, num_inference_steps=4, generator=generator).images[0])

    learnt = image("a <dot>")
    assert len(calls) == 1
    monkeypatch.setattr(
        "weightport.runtime.pipelines.latent.constant_context", lambda *_: contextlib.nullcontext()
    )
    assert np.array_equal(image("a <dot>"), learnt), "bits do not change"
    assert len(calls) == 5
    assert not np.array_equal(image("a"), learnt)


def is_cross(module: Attention) -> bool:
    return module.to_k.in_features != module.to_q.in_features
