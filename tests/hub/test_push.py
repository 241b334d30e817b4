"""`weightport push`, and pulling by `hub:owner/name@revision/file` and `--base`, against a Hub on
loopback."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import weightport
from weightport.pull import Reference
from weightport.push import unverified

from ..support.command import COMMAND, Run, assert_refused, run
from ..support.forks import run_command, run_python
from ..support.hub_server import TOKEN, Fault, HubServer
from ..support.runners import warm_runners

UNET = "unet/diffusion_pytorch_model.safetensors"
Command = Callable[..., Run]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, sd1_keras: dict[str, Path]) -> Path:
    """What `convert` makes of `sd1_keras`; not to be written to."""
    folder = tmp_path_factory.mktemp("converted") / "repo"
    weightport.convert(list(sd1_keras.values()), folder, image_size=64, license="mit")
    return folder


@pytest.fixture
def own(converted: Path, tmp_path: Path) -> Path:
    """A copy of `converted` to change, proven."""
    folder = shutil.copytree(converted, tmp_path / "own")
    report = json.loads((folder / "conversion.json").read_text())
    (folder / "parity.json").write_text(json.dumps(proof(report)))
    return folder


@pytest.fixture
def command(hub: HubServer, tmp_path: Path) -> Command:
    """Runs the command in a process of its own, as a client of the hub that tries again at once."""

    def command(*arguments: str | Path, token: str | None = TOKEN, **environment: str) -> Run:
        given = hub.environment(tmp_path / "home", token) | environment
        return run_command(*arguments, environment=given, hasty=True)

    return command


def proof(report: dict[str, Any], passed: bool = True) -> dict[str, Any]:
    """The `parity.json` of a conversion."""
    error = {"max_abs": 1e-5, "relative_l2": 2.6e-6, "cosine": 1.0, "psnr": None}
    more = {
        "against": "kerascv",
        "tolerance": 3e-6,
        "passed": passed,
        "matched": error,
        "as_diffusers": None,
    }
    checks = [{"name": source["part"]} | more for source in report["sources"]]
    files = [
        {"name": f"repo/{name}", "sha256": file["sha256"]} for name, file in report["files"].items()
    ]
    return {"passed": passed, "dtype": "float32", "files": files, "checks": checks}


def done(ended: Run) -> Run:
    """A run that went well and said nothing else."""
    assert (ended.status, ended.err) == (0, ""), ended
    return ended


# ---- adapters and embeddings alone


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA, a LoHa and embeddings, under others' names."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("alone")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    plain = {"lora_down.weight": torch.ones(4, 768), "lora_up.weight": torch.ones(1280, 4)}
    state = {f"{name}.{role}": one for role, one in plain.items()}
    words = json.dumps({"10_dog": {'sks: "dog"': 12, "grass": 3}})
    save_file(state, folder / "style.safetensors", {"ss_tag_frequency": words})
    pairs = {"a": (1280, 4), "b": (4, 768)}
    halves = {f"hada_w{n}_{side}": torch.ones(pairs[side]) * n for n in (1, 2) for side in "ab"}
    save_file({f"{name}.{role}": one for role, one in halves.items()}, folder / "loha.safetensors")
    save_file({"<cat>": torch.ones(2, 768)}, folder / "cat.safetensors")
    pair = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
    save_file(pair, folder / "<xl>.safetensors")
    return folder


def card_of(hub: HubServer, name: str) -> tuple[str, dict[str, Any]]:
    text = hub.repos[name].files()["README.md"].decode()
    return text, ModelCard(text).data.to_dict()


def test_a_lora_alone_is_pushed_with_a_card(hub: HubServer, alone: Path, command: Command) -> None:
    style = alone / "style.safetensors"
    base = ("--base-model", "org/base", "--license", "mit")
    ended = done(command("push", style, "org/style", *base))
    assert ended.out.startswith("pushed 2 files: ")
    assert hub.repos["org/style"].files()["style.safetensors"] == style.read_bytes()
    text, data = card_of(hub, "org/style")
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["instance_prompt"] == 'sks: "dog"'
    assert data["license"] == "mit"
    assert "lora" in data["tags"]
    assert "from diffusers import DiffusionPipeline" in text
    assert 'load_lora_weights("org/style", weight_name="style.safetensors")' in text
    assert hashlib.sha256(style.read_bytes()).hexdigest() in text
    before = hub.repos["org/style"].files()["README.md"]
    ended = command("push", style, "org/style", "--license", "mit")
    assert "names no base model; --base-model sets it" in ended.err
    assert hub.repos["org/style"].files()["README.md"] == before, "the card of a repo stays"


def test_what_diffusers_does_not_load_is_said(
    hub: HubServer, alone: Path, command: Command
) -> None:
    command("push", alone / "loha.safetensors", "org/loha")
    text, data = card_of(hub, "org/loha")
    assert "from weightport import DiffusionPipeline" in text
    assert "from diffusers" not in text
    assert "base_model_relation" not in data
    command("push", alone / "cat.safetensors", "org/cat")
    text, data = card_of(hub, "org/cat")
    assert data["instance_prompt"] == "<cat>"
    assert "textual_inversion" in data["tags"]
    assert 'load_textual_inversion("org/cat", weight_name="cat.safetensors")' in text
    assert "from diffusers" in text
    command("push", alone / "<xl>.safetensors", "org/xl")
    text, _ = card_of(hub, "org/xl")
    assert "Stable Diffusion XL" in text
    assert "from diffusers" not in text


# ---- references


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:org/name/file.h5", ("org/name", None, "file.h5")),
        ("hub:org/name@v1.0/a/b.h5", ("org/name", "v1.0", "a/b.h5")),
        ("hub:org/name@refs/pr/12/b.h5", ("org/name", "refs/pr/12", "b.h5")),
        ("org/name", ("org/name", None, "")),
        ("org/name@main", ("org/name", "main", "")),
        ("hub:org/name/", ("org/name", None, "")),
    ],
)
def test_references(text: str, parts: tuple[str, str | None, str]) -> None:
    reference = Reference.parse(text)
    assert reference is not None
    assert (reference.repo_id, reference.revision, reference.path) == parts
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    ["name", "./org/name", "../name", "hub:org", "hub:org/name/../../x", "~/a/b", "/a/b", ""],
)
def test_no_references(text: str) -> None:
    assert Reference.parse(text) is None


# ---- push


def test_push(hub: HubServer, own: Path, command: Command) -> None:
    ended = done(command("push", own, "org/model", "--private", "-m", "first"))
    repo = hub.repos["org/model"]
    assert repo.private
    assert [commit.title for commit in repo.history()] == ["first", "initial commit"]
    assert ended.out == f"pushed 15 files: {hub.endpoint}/org/model/commit/{repo.refs['main']}\n"
    there = repo.files()
    here = {
        path.relative_to(own).as_posix(): path.read_bytes()
        for path in own.rglob("*")
        if path.is_file()
    }
    assert there.keys() == here.keys() | {".gitattributes"}
    assert {name for name in here if there[name] != here[name]} == {"README.md"}
    card = there["README.md"].decode()
    assert 'from_pretrained("org/model")' in card
    assert "All checks passed" in card
    assert ModelCard(card).data.to_dict()["license"] == "mit"

    sizes = {request.path: request.received for request in hub.requests if request.method == "PUT"}
    assert sum(sizes.values()) == sum(
        len(content) for name, content in here.items() if name.endswith(".safetensors")
    )
    hub.requests.clear()
    done(command("push", own, "org/model"))
    assert len(repo.history()) == 2, "nothing new, no commit"
    assert not [request for request in hub.requests if request.method == "PUT"]


def test_push_as_json(own: Path, command: Command) -> None:
    pushed = json.loads(done(command("push", own, "org/model", "--json")).out)
    assert UNET in pushed["files"]
    assert pushed["warnings"] == []


def test_push_to_a_branch_and_as_a_pull_request(
    hub: HubServer, own: Path, command: Command
) -> None:
    base = hub.add("tester/model", {"notes.txt": b"mine"})
    done(command("push", own, "tester/model", "--revision", "v2"))
    ended = done(command("push", own, "tester/model", "--create-pr"))
    repo = hub.repos["tester/model"]
    assert ended.out.endswith("/tester/model/discussions/1\n")
    assert repo.refs["main"] == base
    for ref in ("v2", "refs/pr/1"):
        assert {"notes.txt", "model_index.json", UNET} <= repo.files(ref).keys()
        assert len(repo.history(ref)) == 2
    assert (
        'from_pretrained("tester/model", revision="v2")' in repo.files("v2")["README.md"].decode()
    )


def test_the_card_keeps_what_the_user_wrote(hub: HubServer, own: Path, command: Command) -> None:
    card = own / "README.md"
    text = (
        card.read_text().replace("license: mit", "license: openrail\nlanguage: en")
        + "\nMy own words.\n"
    )
    card.write_text(text)
    done(command("push", own, "org/model", "--base-model", "org/base"))
    assert card.read_text() == text, "the repo on the disk stays as it is"
    pushed = hub.repos["org/model"].files()["README.md"].decode()
    assert pushed.endswith("\nMy own words.\n")
    data = ModelCard(pushed).data.to_dict()
    assert (data["language"], data["base_model"], data["license"]) == ("en", "org/base", "openrail")


def _without(sources: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [source for source in sources if source["part"] != part]


def test_push_of_what_is_not_proven(hub: HubServer, own: Path, command: Command) -> None:
    report = json.loads((own / "conversion.json").read_text())
    others = {"files": [], **{k: v for k, v in proof(report).items() if k != "files"}}
    cases = {
        "parity has not been run;": None,
        "parity has failed;": proof(report, passed=False),
        "parity.json is of other weights;": others,
        "parity has not been run for decoder;": proof(
            report | {"sources": _without(report["sources"], "decoder")}
        ),
    }
    for reason, parity in cases.items():
        (own / "parity.json").unlink(missing_ok=True)
        if parity is not None:
            (own / "parity.json").write_text(json.dumps(parity))
        assert_refused(command("push", own, "org/model"), own, reason + ".*--allow-unverified")
        assert hub.requests == []
    assert unverified(report, proof(report)) is None
    based = [
        s | {"format": "diffusers repo"} if s["part"] == "text_encoder" else s
        for s in report["sources"]
    ]
    without = proof(report | {"sources": _without(based, "text_encoder")})
    assert unverified(report | {"sources": based}, without) is None, (
        "what a base brings needs no proof"
    )
    ended = command("push", own, "org/model", "--allow-unverified")
    assert ended.status == 0
    assert ended.err == "warning: unverified: parity has not been run for decoder\n"
    assert UNET in hub.repos["org/model"].files()


def test_push_of_a_real_proof(
    hub: HubServer, own: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `weightport parity` wrote is taken, the card has its figures, and nothing tells where
    the repo lay."""
    pytest.importorskip("diffusers")
    warm_runners(monkeypatch)
    done(run("parity", own, "--against", "diffusers", "-o", own, "-q"))
    done(command("push", own, "org/model"))
    there = hub.repos["org/model"].files()
    found = json.loads(there["parity.json"])
    card = there["README.md"].decode()
    assert "[`parity.html`](parity.html)" in card
    assert {check["name"] for check in found["checks"]} == {
        "text_encoder",
        "unet",
        "decoder",
        "image_encoder",
    }
    for check in found["checks"]:
        error = check["matched"]
        figures = [error["relative_l2"], check["tolerance"], error["max_abs"]]
        cells = [
            check["name"],
            "diffusers",
            *(f"{figure:.1e}" for figure in figures),
            "the same",
            "passed",
        ]
        assert f"| {' | '.join(cells)} |" in card
    for name in ("parity.json", "parity.html", "README.md"):
        assert str(own.parent).encode() not in there[name]


def test_push_on_a_terminal_asks_for_the_license(own: Path, hub: HubServer, tmp_path: Path) -> None:
    """And does not where it is known."""
    environment = hub.environment(tmp_path / "home", TOKEN)
    assert b"License" not in _on_a_terminal(["push", own, "org/known"], environment, b"")
    report, card = own / "conversion.json", own / "README.md"
    report.write_text(report.read_text().replace('"license": "mit"', '"license": null'))
    card.write_text(card.read_text().replace("license: mit\n", ""))
    shown = _on_a_terminal(["push", own, "org/model"], environment, b"openrail\n")
    assert shown.count(b"License of the model, as the Hub names it") == 1
    assert b"warning" not in shown
    assert (
        ModelCard(hub.repos["org/model"].files()["README.md"].decode()).data.to_dict()["license"]
        == "openrail"
    )
    assert b"warning: the model card names no license" in _on_a_terminal(
        ["push", own, "org/none"], environment, b"\n"
    )


def _on_a_terminal(
    arguments: list[str | Path], environment: dict[str, str], answer: bytes
) -> bytes:
    """What the command shows on a terminal whose user types `answer`; it must succeed."""
    leader, follower = pty.openpty()
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(
        command,
        stdin=follower,
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env={**os.environ, **environment},
    ) as process:
        os.close(follower)
        os.write(leader, answer)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the process has ended
            while chunk := os.read(leader, 4096):
                shown += chunk
    os.close(leader)
    assert process.returncode == 0, shown
    return shown


def test_push_without_a_license_warns(own: Path, hub: HubServer, command: Command) -> None:
    card = own / "README.md"
    card.write_text(card.read_text().replace("license: mit\n", ""))
    report = own / "conversion.json"
    report.write_text(report.read_text().replace('"license": "mit"', '"license": null'))
    assert (
        command("push", own, "org/a").err
        == "warning: the model card names no license; --license sets it\n"
    )
    done(command("push", own, "org/b", "--license", "openrail"))
    assert "license: openrail\n" in hub.repos["org/b"].files()["README.md"].decode()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "names", "reason"),
    [
        (lambda repo: _flip(repo / UNET), UNET, "not the file that conversion.json describes"),
        (
            lambda repo: (repo / "vae/config.json").write_text("{}"),
            "vae/config.json",
            "not the file that",
        ),
        (
            lambda repo: (repo / "tokenizer/vocab.json").unlink(),
            "tokenizer/vocab.json",
            "is missing",
        ),
        (lambda repo: (repo / "unet/x.bin").write_text(""), "unet/x.bin", "not in conversion.json"),
        (
            lambda repo: (repo / "pipeline.py").write_text(""),
            "pipeline.py",
            "not in conversion.json",
        ),
        (
            lambda repo: (repo / "secret.txt").symlink_to("/etc/hostname"),
            "secret.txt",
            "not in conversion.json",
        ),
        (
            lambda repo: (repo / "conversion.json").unlink(),
            "own",
            "not what `weightport convert` writes",
        ),
        (
            lambda repo: (repo / "conversion.json").write_text("{"),
            "conversion.json",
            "the JSON in it",
        ),
    ],
)
def test_push_refuses_what_was_changed(
    hub: HubServer,
    own: Path,
    command: Command,
    change: Callable[[Path], object],
    names: str,
    reason: str,
) -> None:
    change(own)
    assert_refused(command("push", own, "org/model", "--allow-unverified"), names, reason)
    assert hub.requests == []


def test_push_refuses_what_was_not_hashed(
    place: Path, sd1_keras: dict[str, Path], command: Command
) -> None:
    weightport.convert(sd1_keras["decoder"], place / "out", hashes=False)
    assert_refused(
        command("push", place / "out", "org/model", "--allow-unverified"), "out", "--no-hash"
    )


@pytest.mark.parametrize(
    ("repo_id", "options", "reason"),
    [
        ("org/model", {"token": None}, "HF_TOKEN or run `hf auth login`"),
        ("org/model", {"token": "hf_wrong"}, "HF_TOKEN or run `hf auth login`"),
        ("org/model", {"token": "hf_other"}, "token with write access"),
        ("org/model", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("org/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "connection failed"),
        ("model", {}, "owner/name"),
    ],
)
def test_push_fails_in_one_line(
    hub: HubServer, own: Path, command: Command, repo_id: str, options: dict[str, Any], reason: str
) -> None:
    assert_refused(command("push", own, repo_id, **options), repo_id, reason)
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ([Fault("POST", "/commit/", status=500)], "has a problem"),
        ([Fault("POST", "/commit/", cut=1)], "connection failed"),
        ([Fault("PUT", "/lfs/", status=403)], "not allowed"),
        ([Fault("POST", "/preupload/", status=400)], "org/model: "),
    ],
    ids=["commit-500", "commit-dropped", "upload-403", "preupload-400"],
)
def test_push_is_all_or_nothing(
    hub: HubServer, own: Path, command: Command, faults: list[Fault], reason: str
) -> None:
    hub.faults += faults
    assert_refused(command("push", own, "org/model"), "org/model", reason)
    assert hub.repos["org/model"].files().keys() == {".gitattributes"}
    kept = len(hub.objects)
    hub.requests.clear()
    done(command("push", own, "org/model"))
    assert UNET in hub.repos["org/model"].files()
    assert len(hub.repos["org/model"].history()) == 2
    if "commit" in faults[0].pattern:
        assert kept == 3
        assert not [request for request in hub.requests if request.method == "PUT"], (
            "it is not sent again"
        )


def test_push_gets_over_a_dropped_upload(hub: HubServer, own: Path, command: Command) -> None:
    hub.faults.append(Fault("PUT", "/lfs/", cut=100_000))
    done(command("push", own, "org/model"))
    assert hub.faults[0].times == 0
    there = hub.repos["org/model"].files()[UNET]
    assert (
        hashlib.sha256(there).hexdigest() == hashlib.sha256((own / UNET).read_bytes()).hexdigest()
    )


def test_the_example(hub: HubServer, sd1_keras: dict[str, Path], tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "push_to_hub.py"
    environment = hub.environment(tmp_path / "home")
    ended = run_python(
        "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')",
        script,
        *sd1_keras.values(),
        "org/model",
        environment=environment,
    )
    assert ended.status == 0, ended.err
    assert ended.out == f"{hub.endpoint}/org/model/commit/{hub.repos['org/model'].refs['main']}\n"
    assert hub.repos["org/model"].private
    assert UNET in hub.repos["org/model"].files()


# ---- pull


def test_convert_from_the_hub(
    hub: HubServer, place: Path, sd1_keras: dict[str, Path], converted: Path, command: Command
) -> None:
    hub.add(
        "org/keras", {"x/unet.h5": sd1_keras["unet"].read_bytes(), "x/other.h5": b"not asked for"}
    )
    hub.add_folder("org/base", converted)
    extra = {
        "unet/diffusion_pytorch_model.fp16.safetensors": b"no",
        "unet/model.bin": b"no",
        "safety/x.safetensors": b"",
    }
    hub.add("org/base", extra)
    arguments = [
        "convert",
        "hub:org/keras@main/x/unet.h5",
        "--base",
        "org/base@main",
        "--image-size",
        "64",
        "-q",
    ]
    done(command(*arguments, "-o", place / "out"))
    for name in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (place / "out" / name).read_bytes() == (converted / name).read_bytes()
    options = json.loads((place / "out" / "conversion.json").read_text())["options"]
    assert options["base_model"] == "org/base"
    fetched = hub.downloads()
    assert "x/unet.h5" in fetched
    assert not fetched.keys() & {"x/other.h5", "README.md", "conversion.json", *extra}

    hub.requests.clear()
    done(command(*arguments, "-o", place / "again", HF_HUB_OFFLINE="1"))
    assert hub.requests == []
    assert (place / "again" / UNET).read_bytes() == (converted / UNET).read_bytes()


def test_revisions_of_a_file(
    hub: HubServer, place: Path, sd1_keras: dict[str, Path], command: Command
) -> None:
    commit = hub.add("org/keras", {"part.h5": sd1_keras["unet"].read_bytes()})
    hub.add("org/keras", {"part.h5": sd1_keras["decoder"].read_bytes()})
    for revision, part in ((f"@{commit}", "unet"), ("", "decoder")):
        (found,) = json.loads(
            done(command("inspect", f"hub:org/keras{revision}/part.h5", "--json")).out
        )["parts"]
        assert found["part"] == part


def test_a_folder_of_the_hub(
    hub: HubServer, place: Path, converted: Path, command: Command
) -> None:
    hub.add_folder("org/base", converted)
    found = json.loads(done(command("inspect", "hub:org/base/vae", "--json")).out)
    assert found["parts"][0]["part"] == "vae"
    assert {name.split("/")[0] for name in hub.downloads()} == {"vae"}
    assert done(command("diff", "hub:org/base", converted)).status == 0


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("hub:org/keras/nothing.h5", {}, "no such file in the repo"),
        ("hub:org/nothing/unet.h5", {}, "no such repo, or this token may not see it"),
        ("hub:org/keras@v9/unet.h5", {}, "no such branch, tag or commit"),
        (
            "hub:org/private/unet.h5",
            {"token": "hf_other"},
            "no such repo, or this token may not see it",
        ),
        ("hub:org/gated/unet.h5", {}, "gated; ask for access"),
        ("hub:org/gated/unet.h5", {"token": None}, "gated; ask for access"),
        (
            "hub:org/keras/unet.h5",
            {"HF_HUB_OFFLINE": "1"},
            "not downloaded before, and .* HF_HUB_OFFLINE",
        ),
        (
            "hub:org/keras/unet.h5",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "not downloaded before, and .*connection",
        ),
        ("hub:org", {}, "write hub:owner/name@revision/file"),
    ],
)
def test_pull_fails_in_one_line(
    hub: HubServer, place: Path, command: Command, source: str, options: dict[str, Any], reason: str
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "org/keras": {},
        "org/private": {"private": True},
        "org/gated": {"gated": True},
    }
    for repo_id, kind in kinds.items():
        hub.add(repo_id, {"unet.h5": b"x"}, **kind)
    ended = command("convert", source, "-o", place / "out", **options)
    assert_refused(ended, source, reason)
    assert not (place / "out").exists()


def test_an_interrupted_download_leaves_nothing_partial(
    hub: HubServer, place: Path, tmp_path: Path, sd1_keras: dict[str, Path], command: Command
) -> None:
    hub.add("org/keras", {"unet.h5": sd1_keras["unet"].read_bytes()})
    hub.faults.append(Fault("GET", "unet.h5", short=1))
    arguments = ("convert", "hub:org/keras/unet.h5", "-o", place / "out", "-q")
    assert_refused(command(*arguments), "hub:org/keras/unet.h5", "Consistency check failed")
    assert not [path for path in (tmp_path / "home").rglob("*.h5") if path.is_file()]
    done(command(*arguments))
    assert (place / "out" / UNET).stat().st_size > 1_000_000
