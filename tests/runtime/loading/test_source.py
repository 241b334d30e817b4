"""Folders and the Hub: what is asked for, what is fetched, what is said when it is not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weightport import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from weightport.hub.download import HubOptions
from weightport.runtime.loading.source import Source, open_source, split_options

from ...support.forks import run_python
from ...support.hub_server import HubServer
from .test_custom_code import HELPERS, MORE, ONE_STEP, UNET, write_files

Client = Callable[..., str]
RUN = """
import os, sys
import torch
from weightport import *

class Pair(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        self.register_modules(unet=unet, scheduler=scheduler)

def run(code):
    try:
        exec(code, globals())
    except (OSError, ValueError) as error:
        print(type(error).__name__, error, sep=": ")

run(sys.argv[1])
"""
NEEDED = {
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
}
LOAD = (
    "pipe = Pair.from_pretrained('org/pair', **{options});"
    " print(pipe.unet.conv_in.weight.sum().item())"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a UNet, in two variants, and a scheduler; with much that nobody needs."""
    folder = tmp_path_factory.mktemp("hub") / "pair"
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(UNET)
    unet.save_pretrained(folder / "unet")
    unet.half().save_pretrained(folder / "unet", variant="fp16")
    unet.save_pretrained(folder / "unet", safe_serialization=False, variant="fp32")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "Pair",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    unneeded = dict.fromkeys(
        ("README.md", "vae/config.json", "unet/run.py", "unet/notes.md", "big.ckpt"), "unneeded"
    )
    return write_files(folder, {"model_index.json": json.dumps(index), **unneeded})


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """Runs code in a process of its own, whose Hub is `hub`; gives what it prints."""

    def run(code: str, token: str | None = None, **more: str) -> str:
        hub.requests.clear()
        environment = hub.environment(tmp_path / "home", token) | more
        ended = run_python(RUN, code, environment=environment)
        assert ended.status == 0, ended.err
        return ended.out.strip()

    return run


def asked(hub: HubServer) -> list[str]:
    return [f"{request.method} {request.path.split('?')[0]}" for request in hub.requests]


def test_cold_warm_offline_and_changed(hub: HubServer, client: Client, pair: Path) -> None:
    commit = hub.add_folder("org/pair", pair)
    load = LOAD.format(options="{}")
    first = client(load)
    assert hub.downloads().keys() == NEEDED  # nothing else, each once
    assert len([line for line in asked(hub) if "/api/" in line]) == 1
    assert len(hub.requests) <= 1 + 2 * len(NEEDED)
    assert client(load) == first
    assert len(hub.requests) == 1
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert client(load, **offline) == first
        assert hub.requests == []
    assert client(LOAD.format(options="{'local_files_only': True}")) == first
    assert hub.requests == []
    assert client(LOAD.format(options="{'variant': 'fp16'}")) != ""
    assert hub.downloads().keys() == {"unet/diffusion_pytorch_model.fp16.safetensors"}

    (weights,) = pair.glob("unet/diffusion_pytorch_model.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-4096:] = bytes(4096)
    hub.add("org/pair", {"unet/diffusion_pytorch_model.safetensors": bytes(changed)})
    total = (
        "print(sum(p.sum().item() for p in Pair.from_pretrained('org/pair',"
        " **{options}).unet.parameters()))"
    )
    new = client(total.format(options="{}"))
    assert "unet/diffusion_pytorch_model.safetensors" in hub.downloads()
    old = client(total.format(options={"revision": commit}))
    assert hub.downloads() == {}
    assert new != old
    assert client(total.format(options={"revision": commit}), HF_HUB_OFFLINE="1") == old
    assert client(total.format(options="{}"), HF_HUB_OFFLINE="1") == new
    client(LOAD.format(options="{'force_download': True}"))
    assert hub.downloads().keys() == NEEDED


def test_components_passed_in_are_not_downloaded(
    hub: HubServer, client: Client, pair: Path
) -> None:
    hub.add_folder("org/pair", pair)
    client("Pair.from_pretrained('org/pair', unet=None)")
    assert hub.downloads().keys() == {"model_index.json", "scheduler/scheduler_config.json"}


def test_single_components(hub: HubServer, client: Client, pair: Path, tmp_path: Path) -> None:
    hub.add_folder("org/pair", pair)
    client("UNet2DConditionModel.from_pretrained('org/pair', subfolder='unet', variant='fp16')")
    assert hub.downloads().keys() == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    client("EulerDiscreteScheduler.from_pretrained('org/pair', subfolder='scheduler')")
    assert hub.downloads().keys() == {"scheduler/scheduler_config.json"}
    hub.add_folder("org/unet", pair / "unet")
    cache = tmp_path / "cache"
    assert (
        client(
            f"print(type(AutoModel.from_pretrained('org/unet', cache_dir={str(cache)!r})).__name__)"
        )
        == "UNet2DConditionModel"
    )
    assert any(cache.rglob("*.safetensors"))
    assert (
        client(
            f"AutoModel.from_pretrained('org/unet', cache_dir={str(cache)!r},"
            " local_files_only=True)"
        )
        == ""
    )


def test_what_is_not_there_is_said_in_one_line(hub: HubServer, client: Client, pair: Path) -> None:
    hub.add_folder("org/pair", pair)
    hub.add_folder("tester/secret", pair, private=True)
    for code, token, message in (
        (
            "Pair.from_pretrained('org/none')",
            None,
            "OSError: org/none: there is no such folder; on the Hub: ",
        ),
        ("Pair.from_pretrained('tester/secret')", None, "set HF_TOKEN or run `hf auth login`"),
        (
            "Pair.from_pretrained('tester/secret')",
            "hf_other",
            "this token may not see it; check the name and HF_TOKEN",
        ),
        (
            "Pair.from_pretrained('org/pair', revision='v9')",
            None,
            "OSError: org/pair@v9: there is no such folder; on",
        ),
        (
            "Pair.from_pretrained('org/pair', revision='v9')",
            None,
            "there is no such branch, tag or commit",
        ),
        ("Pair.from_pretrained('org/pair', variant='bf16')", None, "there are fp16, fp32"),
        (
            "AutoModel.from_pretrained('org/pair', subfolder='vae')",
            None,
            "org/pair/vae/config.json: the JSON in it",
        ),
        (
            "Pair.from_pretrained('org/other', local_files_only=True)",
            None,
            "org/other: there is no such folder; the Hub",
        ),
        (
            "Pair.from_pretrained('org/other', local_files_only=True)",
            None,
            "and it has not been downloaded before",
        ),
    ):
        printed = client(code, token)
        assert message in printed
        assert "\n" not in printed
    assert client("Pair.from_pretrained('tester/secret', token='hf_test')", None) == ""


def test_offline_without_a_download(client: Client) -> None:
    printed = client("Pair.from_pretrained('org/pair')", HF_HUB_OFFLINE="1")
    assert (
        printed
        == "OSError: org/pair: there is no such folder; the Hub may not be asked (local_files_only"
        " or HF_HUB_OFFLINE), and it has not been downloaded before"
    )


def test_an_incomplete_download_is_named(hub: HubServer, client: Client, pair: Path) -> None:
    hub.add_folder("org/pair", pair)
    client("Pair.from_pretrained('org/pair', unet=None)")
    printed = client("Pair.from_pretrained('org/pair')", HF_HUB_OFFLINE="1")
    assert printed.startswith("OSError: org/pair (as downloaded)/unet: there is no ")


def test_code_from_the_hub(hub: HubServer, client: Client, pair: Path) -> None:
    hub.add_folder("org/pair", pair)
    files = {
        "pipeline.py": ONE_STEP,
        "helpers.py": HELPERS,
        "parts/more.py": MORE,
        "evil.py": "1 / 0",
    }
    old = hub.add("org/code", {name: text.encode() for name, text in files.items()})
    hub.add("org/code", {"parts/more.py": b"def one():\n    return 2\n"})
    load = "DiffusionPipeline.from_pretrained('org/pair', custom_pipeline='org/code', {options})"
    assert "org/code/pipeline.py: " in client(load.format(options=""))
    assert not any(name.endswith(".py") for name in hub.downloads())
    show = f"print({load}(0).sum().item())"
    new = float(client(show.format(options="trust_remote_code=True")))
    assert {name for name in hub.downloads() if name.endswith(".py")} == files.keys() - {"evil.py"}
    pinned = float(client(show.format(options=f"trust_remote_code=True, custom_revision={old!r}")))
    assert new == pytest.approx(2 * pinned)
    assert "disabled" in client(
        show.format(options="trust_remote_code=True"), DIFFUSERS_DISABLE_REMOTE_CODE="1"
    )


def test_a_repository_that_is_its_own_code(hub: HubServer, client: Client, pair: Path) -> None:
    index = json.loads((pair / "model_index.json").read_text()) | {
        "_class_name": ["pipeline", "OneStep"]
    }
    hub.add_folder("org/own", pair)
    files = {
        "model_index.json": json.dumps(index),
        "pipeline.py": ONE_STEP,
        "helpers.py": HELPERS,
        "parts/more.py": MORE,
    }
    hub.add("org/own", {name: text.encode() for name, text in files.items()})
    assert "trust_remote_code" in client("DiffusionPipeline.from_pretrained('org/own')")
    code = (
        "print(type(DiffusionPipeline.from_pretrained('org/own', trust_remote_code=True)).__name__)"
    )
    assert client(code) == "OneStep"


def test_without_huggingface_hub(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "sys.modules['huggingface_hub'] = None\n"
    )
    ended = run_python(code + RUN, "Pair.from_pretrained('org/pair')")
    assert (
        ended.out.strip()
        == "OSError: org/pair: there is no such folder; an id on the Hub needs `pip install"
        " 'weightport[hub]'`"
    )


# --- folders --------------------------------------------------------------------------------------


def test_folders(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.parent)
    for name in ("pair", Path("pair"), "./pair", str(pair)):
        source = open_source(name)
        assert isinstance(source, Source)
        assert open_source(source) is source
        assert "model_index.json" in source.names
        assert open_source(name, "unet").path("config.json").is_file()
        assert open_source(name, "nothing").names == source.names


def test_only_regular_files_count(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model_index.json")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    assert list(open_source(tmp_path).names) == []
    with pytest.raises(OSError, match=r"there is no model_index\.json in it"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"1", b"{" * 10**5, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        open_source(tmp_path).json("x.json")


def test_options_of_the_hub() -> None:
    given: dict[str, Any] = {"token": "t", "revision": "r", "unet": 1}
    assert split_options(given, HubOptions) == ({"token": "t", "revision": "r"}, {"unet": 1})
