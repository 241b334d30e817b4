"""An original checkpoint computes the same after conversion: the real `ldm` modules against
diffusers and our runtime.

The programs do the same and differ only in the order of sums (attention is fused in one, written
out in the other), so outputs agree to a few roundings: of float32 in the UNet, whose norms cast to
it, and of float64 in the VAE, where float32 attention alone would leave 3.3e-6. A wrong table is
off by far more: query and key swapped give 0.4.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from ldm.modules.ema import LitEma
from safetensors.torch import load_file, save_file

import weightport
from weightport.mappings.families import families
from weightport.mappings.library import load_table

from ..support.keras_files import interpreter
from ..support.runners import warm_runners
from . import run_ldm

EQUAL = {
    "unet": 3e-6,
    "vae": 1e-13,
    "text_encoder": 3e-6,
}  # relative L2; measured 1.1e-6, 5e-15 and 0
WIDTHS = {
    "sd1": (32, 64, 96, 96),
    "sd2": (64, 128, 192, 192),
}  # 8 heads in SD 1.x, heads of width 64 in SD 2.x
CONTEXT, HEADS, VOCABULARY = 128, 2, 49408
TEXT_PREFIX = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}
COMPONENTS = ("unet", "vae", "text_encoder")
FAMILIES = tuple(WIDTHS)


def _prefix(family: str, component: str) -> str:
    return {"unet": "model.diffusion_model.", "vae": "first_stage_model."}.get(
        component
    ) or TEXT_PREFIX[family]


def _build(family: str, component: str) -> torch.nn.Module:
    if component == "unet":
        return run_ldm.unet(family, WIDTHS[family], CONTEXT)
    if component == "vae":
        return run_ldm.Autoencoder((32, 64, 96, 96))
    return run_ldm.text_encoder(family, CONTEXT, HEADS, VOCABULARY)


@cache
def original(family: str, component: str) -> torch.nn.Module:
    return run_ldm.randomise(_build(family, component), seed=COMPONENTS.index(component))


@cache
def checkpoint(family: str) -> dict[str, torch.Tensor]:
    """The state dict of `LatentDiffusion`: its models under their prefixes, and buffers of the
    noise schedule."""
    tensors = {"alphas_cumprod": torch.linspace(0.999, 0.005, 1000)}
    for component in COMPONENTS:
        state = original(family, component).state_dict()
        if (family, component) == (
            "sd1",
            "text_encoder",
        ):  # transformers 5 leaves `text_model.` out
            state = {
                f"text_model.{key.removeprefix('text_model.')}": tensor
                for key, tensor in state.items()
            }
            state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors |= {_prefix(family, component) + key: tensor for key, tensor in state.items()}
    return tensors


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    @cache
    def convert(family: str, suffix: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}{suffix}")
        file = folder / f"model{suffix}"
        if suffix == ".ckpt":
            torch.save({"state_dict": checkpoint(family), "global_step": 470_000}, file)
        else:
            save_file(checkpoint(family), file)
        weightport.convert(file, folder / "repo", prediction_type="epsilon")
        return folder / "repo"

    return convert


@torch.no_grad()
def _outputs(family: str, component: str, model: Any, is_original: bool) -> list[torch.Tensor]:
    """What a model computes from fixed inputs; a batch of two, not square."""
    generator = torch.Generator().manual_seed(1)
    if component == "text_encoder":
        tokens = torch.randint(VOCABULARY, (2, 77), generator=generator)
        return [
            model(tokens) if is_original and family == "sd2" else model(tokens).last_hidden_state
        ]
    latent = torch.randn((2, 4, 8, 16), generator=generator)
    if component == "unet":
        context, timesteps = (
            torch.randn((2, 77, CONTEXT), generator=generator),
            torch.tensor([1, 981]),
        )
        return [
            model(latent, timesteps, context)
            if is_original
            else model(latent, timesteps, context).sample
        ]
    model, latent = deepcopy(model).double(), latent[:, :, :4, :6].double()
    image = torch.randn((2, 3, 32, 40), generator=generator).double()
    if is_original:
        return [model.encode(image), model.decode(latent)]
    distribution = model.encode(image).latent_dist
    return [torch.cat((distribution.mean, distribution.logvar), 1), model.decode(latent).sample]


def _relative_l2(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.double() - expected.double()).norm() / expected.double().norm())


def _strictly(kind: Any, repo: Path, component: str) -> torch.nn.Module:
    model, info = kind.from_pretrained(repo, subfolder=component, output_loading_info=True)
    assert not any(info.values()), f"not a strict load: {info}"
    return model.eval()


def _as_users_load_it(repo: Path, component: str) -> torch.nn.Module:
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    return _strictly(kinds.get(component, transformers.CLIPTextModel), repo, component)


def _in_our_runtime(repo: Path, component: str) -> torch.nn.Module:
    kinds: dict[str, type[Any]] = {
        "unet": weightport.UNet2DConditionModel,
        "vae": weightport.AutoencoderKL,
    }
    return kinds.get(component, weightport.CLIPTextModel).from_pretrained(repo / component)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_repo_computes_what_the_original_does(
    repo: Callable[[str, str], Path], family: str, component: str
) -> None:
    expected = _outputs(family, component, original(family, component), is_original=True)
    for load in (_as_users_load_it, _in_our_runtime):
        outputs = _outputs(
            family, component, load(repo(family, ".safetensors"), component), is_original=False
        )
        assert max(map(_relative_l2, outputs, expected)) <= EQUAL[component]


@pytest.mark.parametrize(("family", "suffix"), [("sd1", ".safetensors"), ("sd2", ".ckpt")])
def test_parity_runs_the_real_modules(
    repo: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, family: str, suffix: str
) -> None:
    warm_runners(monkeypatch)
    folder = repo(family, suffix)
    found = weightport.parity(folder, folder.with_name(f"model{suffix}"), layers=True)
    assert found.passed
    against = {check.name: check.against for check in found.checks}
    text = {"sd1": "ldm", "sd2": "diffusers"}[
        family
    ]  # which loads OpenCLIP's weights into transformers
    assert against == {
        "unet": "ldm",
        "decoder": "ldm",
        "image_encoder": "ldm",
        "text_encoder": text,
    }
    for check in found.checks:
        assert check.weights
        assert not check.weights.wrong
        assert len(check.layers) > 60


def test_the_text_encoder_of_sd2_runs_in_the_real_open_clip(
    repo: Callable[[str, str], Path],
) -> None:
    folder, python = repo("sd2", ".ckpt"), interpreter("openclip")
    found = weightport.parity(
        folder,
        folder.with_name("model.ckpt"),
        component="text_encoder",
        source_python=python,
        layers=True,
    )
    (check,) = found.checks
    assert check.against == "openclip"
    assert found.environment["openclip"]["versions"]["open-clip-torch"] == "3.3.0"
    assert check.matched.relative_l2 <= EQUAL["text_encoder"]  # equal, by the same torch
    assert check.passed
    assert len(check.layers) > 60


def test_the_moving_average_is_run_by_the_real_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file as ldm's trainer saves it, weights and `LitEma`'s averages; the repo has the
    averages."""
    warm_runners(monkeypatch)
    averaged = run_ldm.randomise(_build("sd1", "unet"), seed=9)
    average = LitEma(torch.nn.ModuleDict({"diffusion_model": averaged})).state_dict()
    state = {
        f"model.diffusion_model.{key}": tensor
        for key, tensor in original("sd1", "unet").state_dict().items()
    }
    state |= {f"model_ema.{key}": tensor for key, tensor in average.items()}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    weightport.convert(
        tmp_path / "model.ckpt", tmp_path / "repo", ema=True, prediction_type="epsilon"
    )
    (check,) = weightport.parity(tmp_path / "repo", tmp_path / "model.ckpt", ema=True).checks
    assert check.passed
    assert check.against == "ldm"
    (check,) = weightport.parity(tmp_path / "repo", tmp_path / "model.ckpt").checks
    assert not check.passed
    assert len(check.weights.wrong) == 686


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ckpt_becomes_the_same_repo(repo: Callable[[str, str], Path], family: str) -> None:
    ours, theirs = (
        sorted(repo(family, suffix).rglob("*.safetensors")) for suffix in (".ckpt", ".safetensors")
    )
    assert len(ours) == len(COMPONENTS)
    assert all(
        a.name == b.name and a.read_bytes() == b.read_bytes()
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("residue", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_loads_strictly_into_the_original_modules(
    repo: Callable[[str, str], Path], tmp_path: Path, family: str, residue: bool
) -> None:
    file = tmp_path / "back.safetensors"
    weightport.convert(repo(family, ".ckpt"), file, to="ldm", residue=residue)
    back = load_file(file)
    for component in COMPONENTS:
        prefix = _prefix(family, component)
        state = {
            key.removeprefix(prefix): tensor
            for key, tensor in back.items()
            if key.startswith(prefix)
        }
        if (family, component) == ("sd1", "text_encoder"):
            continue  # transformers' own names are not CompVis's
        model = _build(family, component)
        model.load_state_dict(
            state, strict=True
        )  # without residue OpenCLIP's last layer is made up
        ours, theirs = model.state_dict(), original(family, component).state_dict()
        made_up = () if residue else ("transformer.resblocks.23.", "text_projection", "logit_scale")
        assert all(
            torch.equal(ours[key], theirs[key]) for key in theirs if not key.startswith(made_up)
        )
    if residue:
        expected = checkpoint(family)
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("family", "context"), [("sd1", 768), ("sd2", 1024)])
def test_the_tables_know_every_tensor_of_the_full_size_modules(family: str, context: int) -> None:
    with torch.device("meta"):
        modules = {
            "unet": run_ldm.unet(family, (320, 640, 1280, 1280), context),
            "vae": run_ldm.Autoencoder((128, 256, 512, 512)),
        }
    for name, module in modules.items():
        component = families()[family].components[name]
        shapes, known = component.manifest(), {}
        for link in load_table(f"ldm_{name}").links(shapes, component.config):
            known[link.sources[0]] = link.source_shape(shapes)
        prefix = _prefix(family, name)
        assert known == {
            prefix + key: tuple(tensor.shape) for key, tensor in module.state_dict().items()
        }
