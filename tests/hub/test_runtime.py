"""`push_to_hub` and `from_pretrained` of models, schedulers and pipelines, against a Hub on
loopback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import weightport

from ..support.forks import run_command, run_python
from ..support.hub_server import TOKEN, Fault, HubServer

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
Client = Callable[..., Any]

_CLIENT = """
import hashlib, json, sys, warnings
import torch
import weightport as w
from weightport import *

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    image = pipe("a horse", latents=latents, num_inference_steps=2, output_type="np").images
    return hashlib.sha256(image.tobytes()).hexdigest()

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

names = {**globals(), "args": sys.argv[2:]}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        exec(sys.argv[1], names)
        error = None
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
print(json.dumps({"result": names.get("result"), "error": error, "warnings": [str(c.message) for c in caught]}))
"""


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """Runs code in a fresh process that is a client of the hub; what it puts into `result`, or its
    error."""

    def client(
        code: str,
        *arguments: str | Path,
        home: str = "home",
        token: str | None = TOKEN,
        **more: str,
    ) -> Any:
        environment = hub.environment(tmp_path / home, token) | more
        ended = run_python(_CLIENT, code, *arguments, environment=environment)
        assert ended.status == 0, ended.err
        answer = json.loads(ended.out)
        return answer["error"] or answer["result"]

    return client


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory, sd1_keras: dict[str, Path]) -> Path:
    """A converted repo; not to be written to."""
    folder = tmp_path_factory.mktemp("runtime") / "repo"
    weightport.convert(list(sd1_keras.values()), folder, image_size=64)
    return folder


@pytest.fixture
def model(hub: HubServer, repo: Path, tmp_path: Path) -> HubServer:
    """A hub with `org/model`: main and fp16 weights side by side, pickles, and files that nothing
    needs."""
    folder = shutil.copytree(repo, tmp_path / "model")
    for name, stem in WEIGHTS.items():
        weights = folder / name / f"{stem}.safetensors"
        shutil.copyfile(weights, folder / name / f"{stem}.fp16.safetensors")
        (
            folder
            / name
            / f"{stem.replace('model', 'pytorch_model') if stem == 'model' else stem}.bin"
        ).write_bytes(b"no")
        (folder / name / "flax_model.msgpack").write_bytes(b"no")
    (folder / "original.ckpt").write_bytes(b"no")
    hub.add_folder("org/model", folder)
    shutil.rmtree(folder)
    return hub


# ---- push


def test_models_and_schedulers(hub: HubServer, repo: Path, tmp_path: Path, client: Client) -> None:
    hub.add("org/carded", {"README.md": b"# Mine\n"})
    code = """
unet = UNet2DConditionModel.from_pretrained(args[0], subfolder="unet")
scheduler = DDIMScheduler.from_pretrained(args[0], subfolder="scheduler")
urls = [
    unet.push_to_hub("x"),
    unet.push_to_hub("org/carded", variant="fp16", private=True, commit_message="fp16"),
    scheduler.push_to_hub("org/sched", private=True),
    scheduler.push_to_hub("org/carded", create_pr=True, subfolder="scheduler"),
    scheduler.push_to_hub("org/sched", revision="next"),
]
unet.save_pretrained(args[1] + "/saved", push_to_hub=True, repo_id="org/saved")
scheduler.save_pretrained(args[1] + "/plain", push_to_hub=True)
again = [
    same(unet, UNet2DConditionModel.from_pretrained(name, **options))
    for name, options in [("tester/x", {}), ("org/carded", {"variant": "fp16"}), ("org/saved", {})]
]
result = [urls, again, repr(DDIMScheduler.from_pretrained("tester/plain")) == repr(scheduler)]
"""
    urls, again, scheduler = client(code, repo, tmp_path)
    assert (again, scheduler) == ([True] * 3, True)
    weights, card = "diffusion_pytorch_model.safetensors", "README.md"
    x, carded, sched = (hub.repos[name] for name in ("tester/x", "org/carded", "org/sched"))
    assert urls[0] == f"{hub.endpoint}/tester/x/commit/{x.refs['main']}"
    assert x.files().keys() == {".gitattributes", card, "config.json", weights}
    assert x.history()[0].title == "Upload UNet2DConditionModel"
    assert b"library_name: diffusers" in x.files()[card]
    assert carded.history()[0].title == "fp16"
    assert carded.files().keys() == {card, "config.json", weights.replace(".s", ".fp16.s")}
    assert carded.files()[card] == b"# Mine\n", "a card that is there stays"
    assert urls[3] == f"{hub.endpoint}/org/carded/discussions/1"
    assert "scheduler/scheduler_config.json" in carded.files("refs/pr/1")
    assert sched.private
    assert len(sched.history()) == 2
    assert len(sched.history("next")) == 2, "the same again is no commit"


def test_pushing_fails_in_one_line(hub: HubServer, repo: Path, client: Client) -> None:
    code = 'DDIMScheduler.from_pretrained(args[0], subfolder="scheduler").push_to_hub("org/model")'
    assert client(code, repo, token=None).startswith(
        "OSError: org/model: the Hub does not know you"
    )
    hub.faults.append(Fault("POST", "/commit/", status=503))
    assert (
        client(code, repo)
        == "OSError: org/model: the Hub has a problem (503); nothing was changed, run it again"
        " later"
    )
    assert hub.repos["org/model"].files().keys() == {".gitattributes"}


# ---- round trip


def test_the_round_trip_gives_the_same_image(
    hub: HubServer, repo: Path, tmp_path: Path, client: Client
) -> None:
    environment = hub.environment(tmp_path / "home")
    pushed = run_command("push", repo, "org/model", "--allow-unverified", environment=environment)
    assert pushed.status == 0, pushed.err
    before = client("result = draw(StableDiffusionPipeline.from_pretrained(args[0]))", repo)
    code = (
        "pipe = DiffusionPipeline.from_pretrained('org/model'); result = [type(pipe).__name__,"
        " draw(pipe)]"
    )
    assert client(code, home="empty") == ["StableDiffusionPipeline", before]
    shutil.rmtree(tmp_path / "empty")

    push = (
        "result = DiffusionPipeline.from_pretrained('org/model').push_to_hub('copy', private=True)"
    )
    assert client(push).startswith(f"{hub.endpoint}/tester/copy/commit/")
    assert hub.repos["tester/copy"].history()[0].title == "Upload StableDiffusionPipeline"
    assert (
        client("result = draw(DiffusionPipeline.from_pretrained('tester/copy'))", home="empty")
        == before
    )


# ---- pull


def test_only_what_is_needed(model: HubServer, client: Client, repo: Path) -> None:
    common = {
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "unet/config.json", "vae/config.json",
    }  # fmt: skip
    files = model.repos["org/model"].files()
    for options, part in (("", ""), (", variant='fp16'", ".fp16")):
        model.requests.clear()
        code = f"result = type(DiffusionPipeline.from_pretrained('org/model'{options})).__name__"
        assert client(code, home=f"home{part}") == "StableDiffusionPipeline"
        fetched = model.downloads()
        weights = {f"{name}/{stem}{part}.safetensors" for name, stem in WEIGHTS.items()}
        assert (
            weights | common
            <= fetched.keys()
            <= weights | common | {"tokenizer/special_tokens_map.json"}
        )
        assert fetched == {name: len(files[name]) for name in fetched}, "every byte once"

        model.requests.clear()
        assert client(code, home=f"home{part}") == "StableDiffusionPipeline"
        assert model.downloads() == {}
        assert [request.path for request in model.requests if "agent" not in request.path] == [
            "/api/models/org/model"
        ]

        model.requests.clear()
        folder = client(code.replace("from_pretrained", "download"), home=f"home{part}-2")
        assert (folder, model.downloads()) == ("str", fetched), "without loading, the same files"

        model.requests.clear()
        offline = client(code, home=f"home{part}", HF_HUB_OFFLINE="1")
        assert (offline, model.requests) == ("StableDiffusionPipeline", [])
        local = code.replace("org/model'", "org/model', local_files_only=True")
        assert client(local, home=f"home{part}") == "StableDiffusionPipeline"
        assert model.requests == []


def test_components_that_are_given_are_not_fetched(
    model: HubServer, client: Client, repo: Path
) -> None:
    code = """
vae = AutoencoderKL.from_pretrained(args[0], subfolder="vae")
pipe = DiffusionPipeline.from_pretrained("org/model", vae=vae, text_encoder=None)
result = pipe.vae is vae
"""
    assert client(code, repo) is True
    assert not [name for name in model.downloads() if name.startswith(("vae/", "text_encoder/"))]


def test_one_model_one_scheduler(model: HubServer, client: Client) -> None:
    client(
        "result = type(UNet2DConditionModel.from_pretrained('org/model',"
        " subfolder='unet')).__name__"
    )
    assert model.downloads().keys() == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    model.requests.clear()
    client(
        "result = type(EulerDiscreteScheduler.from_pretrained('org/model',"
        " subfolder='scheduler')).__name__"
    )
    assert model.downloads().keys() == {"scheduler/scheduler_config.json"}


def test_new_commits_and_revisions(model: HubServer, repo: Path, client: Client) -> None:
    old = model.repos["org/model"].refs["main"]
    config = json.loads((repo / "scheduler" / "scheduler_config.json").read_text())
    code = """
def steps(**options):
    return DDIMScheduler.from_pretrained("org/model", subfolder="scheduler", **options).config.num_train_timesteps
result = [steps(**json.loads(options)) for options in args]
"""
    assert client(code, "{}") == [1000]
    changed = json.dumps(config | {"num_train_timesteps": 500}).encode()
    model.add("org/model", {"scheduler/scheduler_config.json": changed})
    revisions = [json.dumps({"revision": revision}) for revision in ("main", old)]
    assert client(code, "{}", *revisions) == [500, 500, 1000]
    assert client(code, "{}", *revisions, HF_HUB_OFFLINE="1") == [500, 500, 1000]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("org/nothing", {}, "OSError: org/nothing: .*HF_TOKEN"),
        ("org/private", {"token": "hf_other"}, "OSError: org/private: .*HF_TOKEN"),
        ("org/gated", {}, "OSError: org/gated: .*gated; ask for access"),
        ("org/model", {"HF_HUB_OFFLINE": "1"}, "OSError: org/model: .*HF_HUB_OFFLINE"),
        ("org/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "OSError: org/model: .*reached"),
    ],
)
def test_errors_in_one_line(
    hub: HubServer, client: Client, name: str, options: dict[str, str], says: str
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "org/model": {},
        "org/private": {"private": True},
        "org/gated": {"gated": True},
    }
    for repo_id, kind in kinds.items():
        hub.add(repo_id, {"model_index.json": b"{}"}, **kind)
    error = client("DiffusionPipeline.from_pretrained(args[0])", name, **options)
    assert isinstance(error, str)
    assert "\n" not in error
    assert re.search(says, error), error


def test_private_and_gated_with_a_token(hub: HubServer, repo: Path, client: Client) -> None:
    files = {"scheduler_config.json": (repo / "scheduler" / "scheduler_config.json").read_bytes()}
    hub.add("org/private", files, private=True)
    hub.add("org/gated", files, gated=True, granted={"tester"})
    code = f"""
result = [len(DDIMScheduler.from_pretrained(n, token={TOKEN!r}).timesteps) for n in ("org/private", "org/gated")]
"""
    assert client(code, token=None) == [1000, 1000]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "unet/diff", cut=5_000_000),
        Fault("GET", "unet/diff", status=429, headers={"Retry-After": "0"}),
        Fault("HEAD", "unet/diff", status=503),
    ],
    ids=["dropped", "429", "503"],
)
def test_loading_gets_over(model: HubServer, client: Client, repo: Path, fault: Fault) -> None:
    model.faults.append(fault)
    code = """
result = same(*(UNet2DConditionModel.from_pretrained(name, subfolder="unet") for name in (args[0], "org/model")))
"""
    assert client(code, repo) is True
    assert fault.times == 0


def test_a_damaged_download_is_not_kept(model: HubServer, client: Client, tmp_path: Path) -> None:
    model.faults.append(Fault("GET", "unet/diff", short=1))
    code = (
        "result = type(UNet2DConditionModel.from_pretrained('org/model',"
        " subfolder='unet')).__name__"
    )
    error = client(code)
    assert error.startswith(
        "OSError: org/model: unet/diffusion_pytorch_model.safetensors: Consistency check failed"
    )
    assert not [path for path in (tmp_path / "home").rglob("*.safetensors") if path.is_file()]
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    assert client(code) == "UNet2DConditionModel"
