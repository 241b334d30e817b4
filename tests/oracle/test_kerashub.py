"""Files that keras-hub wrote: to repositories that compute the same in diffusers, and back, bit for
bit."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection

import weightport
from weightport.errors import ConversionError

from ..support import digests
from ..support.kept import content_of, kept
from ..support.keras_files import interpreter
from ..support.kerashub_files import MAKE, KerasHubFiles, kerashub, kerashub_files, variables
from ..support.runners import warm_runners

LOAD = Path(__file__).with_name("load_kerashub.py")
SINGLE = "backbone,diffuser,dreambooth,vae,clip,preset,keras,diffuser_keras,sharded,trainer"
FAST: dict[str, Any] = {"sync": False, "hashes": False}
RELATIVE = 1e-5
PARTS = {"transformer", "decoder", "image_encoder", "text_encoder", "text_encoder_2"}
COMPONENTS = {"transformer", "vae", "text_encoder", "text_encoder_2"}


@pytest.fixture(scope="module")
def made() -> KerasHubFiles:
    """A narrow SD 3.5 medium in every form."""
    return kerashub_files("--formats", f"{SINGLE},lora,flux", "--compute")


@pytest.fixture(scope="module")
def repo(made: KerasHubFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the weights of its backbone become."""
    path = tmp_path_factory.mktemp("kerashub") / "repo"
    weightport.convert(made.path("backbone"), path, **FAST)
    return path


def weights(repo: Path) -> dict[str, bytes]:
    """The files of weights of a repository."""
    return {file.parent.name: file.read_bytes() for file in repo.glob("*/*.safetensors")}


# --- there ----------------------------------------------------------------------------------------


def distance(found: Tensor, expected: np.ndarray[Any, Any]) -> float:
    """The relative L2 distance."""
    wanted = torch.from_numpy(expected.astype(np.float32))
    return float((found.float() - wanted).norm() / wanted.norm())


def check_transformer(repo: Path, computed: dict[str, np.ndarray[Any, Any]]) -> None:
    """Diffusers' model of the repo must compute what keras-hub computed."""
    given = {
        name: torch.from_numpy(computed[f"diffuser.{name}"])
        for name in ("latent", "context", "pooled_projection", "timestep")
    }
    model = SD3Transformer2DModel.from_pretrained(repo, subfolder="transformer").eval()
    with torch.no_grad():
        out = model(
            given["latent"].permute(0, 3, 1, 2),
            given["context"],
            given["pooled_projection"],
            given["timestep"],
            return_dict=False,
        )[0]
    assert distance(out.permute(0, 2, 3, 1), computed["diffuser.output"]) < RELATIVE


def test_the_transformer_computes_the_same(made: KerasHubFiles, repo: Path) -> None:
    check_transformer(repo, made.computed())


def test_heads_are_those_that_the_config_of_a_preset_says(tmp_path: Path) -> None:
    """Of SD 3's transformer no tensor tells them."""
    files = kerashub_files("--family", "sd3", "--formats", "preset", "--compute")
    result = weightport.convert(files.path("preset"), tmp_path / "repo", **FAST)
    assert result.family == "sd3"
    check_transformer(tmp_path / "repo", files.computed())


@torch.no_grad()
def test_the_autoencoder_computes_the_same(made: KerasHubFiles, repo: Path) -> None:
    computed = made.computed()
    model = AutoencoderKL.from_pretrained(repo, subfolder="vae").eval()
    image = torch.from_numpy(computed["vae.image"]).permute(0, 3, 1, 2)
    moments = model.encode(image).latent_dist.parameters
    assert distance(moments.permute(0, 2, 3, 1), computed["vae.moments"]) < RELATIVE
    latent = torch.from_numpy(computed["diffuser.latent"][:1]).permute(0, 3, 1, 2)
    decoded = model.decode(latent).sample
    assert distance(decoded.permute(0, 2, 3, 1), computed["vae.decoded"]) < RELATIVE


@torch.no_grad()
@pytest.mark.parametrize(
    ("folder", "name"), [("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")]
)
def test_the_text_encoders_compute_the_same(
    folder: str, name: str, made: KerasHubFiles, repo: Path
) -> None:
    """Of the pooled states the last normalisation has another eps in keras-hub."""
    computed = made.computed()
    model = CLIPTextModelWithProjection.from_pretrained(repo, subfolder=folder).eval()
    tokens = torch.from_numpy(computed["tokens"]).long()
    out = model(tokens, output_hidden_states=True)
    assert distance(out.hidden_states[-2], computed[f"{name}.hidden"]) < RELATIVE
    assert distance(out.text_embeds, computed[f"{name}.pooled"]) < 2 * RELATIVE


@pytest.mark.parametrize("form", ["preset", "keras", "sharded", "trainer"])
def test_every_form_of_a_backbone_gives_the_same(
    form: str, made: KerasHubFiles, repo: Path, tmp_path: Path
) -> None:
    weightport.convert(made.path(form), tmp_path / "repo", **FAST)
    assert weights(tmp_path / "repo") == weights(repo)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_preset_may_be_named_by_its_weights_or_be_in_shards(
    sharded: bool, made: KerasHubFiles, repo: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "preset"
    folder.mkdir()
    shutil.copy(made.path("preset") / "config.json", folder)
    if sharded:
        index = made.path("sharded")
        for shard in index.parent.glob("sharded_*.weights.h5"):
            shutil.copy(shard, folder)
        shutil.copy(index, folder / "model.weights.json")
    else:
        shutil.copy(made.path("preset") / "model.weights.h5", folder)
    named = folder if sharded else folder / "model.weights.h5"
    weightport.convert(named, tmp_path / "repo", **FAST)
    assert weights(tmp_path / "repo") == weights(repo)


@pytest.mark.parametrize("form", ["diffuser", "dreambooth", "diffuser_keras", "vae"])
def test_models_that_were_saved_alone_give_the_same(
    form: str, made: KerasHubFiles, repo: Path, tmp_path: Path
) -> None:
    result = weightport.convert(made.path(form), tmp_path / "repo", **FAST)
    (name,) = result.components
    assert weights(tmp_path / "repo")[name] == weights(repo)[name]


def test_the_older_name_of_a_layer_is_read(made: KerasHubFiles, repo: Path, tmp_path: Path) -> None:
    """CLIP's layers are blocks up to keras-hub 0.21.1."""
    file = tmp_path / "old.weights.h5"
    with h5py.File(made.path("backbone")) as new, h5py.File(file, "w") as old:
        for name in variables(made.path("backbone")):
            old[name.replace("clip_encoder_layer", "clip_encoder_block")] = new[name][()]
    assert "layers/clip_text_encoder/layers/clip_encoder_block_1/dense_1/vars/0" in variables(file)
    weightport.convert(file, tmp_path / "repo", **FAST)
    assert weights(tmp_path / "repo") == weights(repo)


# --- parity ---------------------------------------------------------------------------------------


def test_parity_runs_kerashub_on_its_own_files(tmp_path: Path) -> None:
    """Of a preset every model, layer by layer, and a picture."""
    files = kerashub_files("--vocabulary", "49408", "--formats", "preset")
    source = files.path("preset")
    weightport.convert(source, tmp_path / "repo", **FAST)
    with pytest.MonkeyPatch.context() as patch:
        warm_runners(patch)
        found = weightport.parity(
            tmp_path / "repo", source, source_python=interpreter("k3"), layers=True
        )
    assert {check.name for check in found.checks} == PARTS
    for check in found.checks:
        assert check.against == "kerashub"
        assert check.weights.equal
        assert not check.weights.wrong
        assert 0 < check.matched.relative_l2 <= check.tolerance
        assert (check.as_diffusers is not None) == check.name.startswith("text_encoder")
        assert len(check.layers) > 5
        assert not [layer for layer in check.layers if layer.relative_l2 >= RELATIVE]
    assert found.images is not None
    assert found.images.sampler.startswith("keras-hub ")
    assert 0 < found.images.matched.relative_l2 <= found.images.tolerance
    assert found.images.levels <= 1
    assert found.passed


# --- DreamBooth -----------------------------------------------------------------------------------


def test_dreambooth_without_a_base_says_what_is_lacking(
    made: KerasHubFiles, tmp_path: Path
) -> None:
    result = weightport.convert(made.path("dreambooth"), tmp_path / "repo", **FAST)
    assert result.family == "sd35_medium"
    assert {entry.split()[0] for entry in result.lacks} >= COMPONENTS - {"transformer"}


@pytest.mark.parametrize("base", ["repo", "preset"])
def test_dreambooth_with_a_base_is_a_whole_pipeline(
    base: str, made: KerasHubFiles, repo: Path, tmp_path: Path
) -> None:
    """The base's transformer gives way."""
    path = tmp_path / "base"
    shutil.copytree(repo if base == "repo" else made.path("preset"), path)
    trained = tmp_path / "trained.weights.h5"
    shutil.copy(made.path("dreambooth"), trained)
    with h5py.File(trained, "r+") as file:
        file["layers/dense_1/vars/1"][...] += 1
    weightport.convert(trained, tmp_path / "repo", base=path, **FAST)
    found = weights(tmp_path / "repo")
    known = weights(repo)
    assert found.keys() == COMPONENTS
    assert found.pop("transformer") != known.pop("transformer")
    assert found == known
    pipe = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "repo", tokenizer=None, tokenizer_2=None, tokenizer_3=None, text_encoder_3=None
    )
    assert pipe.transformer.config.num_layers == 3


# --- and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "form"), [(None, "backbone"), ("transformer", "diffuser"), ("vae", "vae")]
)
def test_back_is_the_same_file(
    component: str | None, form: str, made: KerasHubFiles, repo: Path, tmp_path: Path
) -> None:
    """Every variable under its path, with its dtype and bits; but for a sampler's seed."""
    file = tmp_path / "back.weights.h5"
    weightport.convert(repo, file, to="kerashub", component=component, **FAST)
    expected = variables(made.path(form))
    assert variables(file) == {n: v for n, v in expected.items() if "seed_generator" not in n}


@pytest.mark.parametrize(("dtype", "family"), [("float16", "sd3"), ("bfloat16", "sd35_large")])
def test_other_dtypes_go_there_and_back(dtype: str, family: str, tmp_path: Path) -> None:
    """Normalisations of queries and keys stay in float32."""
    arguments = ("--family", family, "--dtype", dtype, "--formats", "backbone,sharded")
    files = kerashub_files(*arguments)
    for form in ("backbone", "sharded"):
        result = weightport.convert(files.path(form), tmp_path / form, **FAST)
        assert result.family == family
    assert weights(tmp_path / "backbone") == weights(tmp_path / "sharded")
    file = tmp_path / "back.weights.h5"
    weightport.convert(tmp_path / "backbone", file, to="kerashub", **FAST)
    assert variables(file) == variables(files.path("backbone"))


def test_the_models_of_an_incomplete_repo_are_files_of_their_own(
    repo: Path, tmp_path: Path
) -> None:
    shutil.copytree(repo, tmp_path / "repo")
    shutil.rmtree(tmp_path / "repo" / "text_encoder")
    index = json.loads((tmp_path / "repo" / "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (tmp_path / "repo" / "model_index.json").write_text(json.dumps(index))
    result = weightport.convert(
        tmp_path / "repo", tmp_path / "mine.weights.h5", to="kerashub", **FAST
    )
    names = ["text_encoder_2", "transformer", "vae"]
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == [
        f"mine.{name}.weights.h5" for name in names
    ]
    assert any("projection of the text_encoder_2" in note for note in result.notes)


def test_kerashub_loads_what_is_written(made: KerasHubFiles, repo: Path, tmp_path: Path) -> None:
    """Its own `load_weights`: the whole backbone, and each model alone."""
    jobs: list[dict[str, Any]] = []
    parts = {
        "backbone": None,
        "diffuser": "transformer",
        "vae": "vae",
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
    }
    for model, component in parts.items():
        file = tmp_path / f"{model}.weights.h5"
        weightport.convert(repo, file, to="kerashub", component=component, **FAST)
        jobs.append({"model": model, "files": {model: str(file)}})
    jobs.append({"model": "backbone", "files": {"theirs": str(made.path("backbone"))}})
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    given = json.dumps([content_of(Path(*job["files"].values())) for job in jobs]).encode()
    scripts = [LOAD, MAKE, Path(digests.__file__)]
    folder = kept(interpreter("k3"), scripts, given, partial(_load, path))
    expected = json.loads((folder / "theirs.json").read_text())
    assert json.loads((folder / "backbone.json").read_text()) == expected
    for model in ("diffuser", "vae", "clip_l", "clip_g"):
        found = json.loads((folder / f"{model}.json").read_text())
        assert found
        assert found.items() <= expected.items()


def _load(jobs: Path, folder: Path) -> None:
    ended = kerashub().script(LOAD, jobs, folder)
    assert ended.status == 0, ended.err[-4000:]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("lora", r"clip\.lora\.h5: LoRA factors of keras-hub.*backbone\.load_lora_weights"),
        ("flux", r"flux\.weights\.h5: keras-hub's Flux, which is another model than FLUX\.1"),
        ("clip", r"clip\.weights\.h5: a CLIP text encoder of keras-hub without its projection"),
    ],
)
def test_what_cannot_be_converted_is_named(
    form: str, message: str, made: KerasHubFiles, tmp_path: Path
) -> None:
    for call in (
        lambda: weightport.inspect(made.path(form)),
        lambda: weightport.convert(made.path(form), tmp_path / "repo"),
    ):
        with pytest.raises(ConversionError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_outputs_have_names_of_keras_files(repo: Path, tmp_path: Path) -> None:
    for name in ("mine.h5", "mine"):
        with pytest.raises(ConversionError, match=r"name the Keras file `something\.weights\.h5`"):
            weightport.convert(repo, tmp_path / name, to="kerashub")
    with pytest.raises(ConversionError, match=r"loads the weights of the whole vae"):
        weightport.convert(repo, tmp_path / "a.weights.h5", to="kerashub", component="decoder")
    assert not any(tmp_path.iterdir())
