"""The documentation does what it says: examples, commands and Python blocks run on narrow models.

A block that cannot run here stands behind a comment, `<!-- not run: the reason -->`.
"""

from __future__ import annotations

import doctest
import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from weightport.mappings.library import all_tables

from .support.command import run
from .support.transformer_families import bundle, original, weights, write

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^>]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# what only narrow models, as they are here, say otherwise
SIZE = re.compile(r"\b\d+(\.\d+)? [kMG]?B\b")
NOTE = re.compile(r"^note: \w+ has sizes of its own: .*\n", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and why it is not run."""

    page: str
    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that are commands or Python."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language = found["language"]
        ours = language == "sh" and "weightport " in found["text"]
        if ours or language in {"console", "python"}:
            yield Block(page.name, language, found["text"], found["reason"])


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in BLOCKS if block.reason is None]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
    sd1_legacy: dict[str, Path],
    sd1_keras: dict[str, Path],
    original_of: Callable[[str], Path],
) -> Path:
    """A folder with every file that the pages name, and a home that has KerasCV's own."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("docs")
    stock = folder / "home" / ".keras" / "models"
    stock.mkdir(parents=True)
    shutil.copyfile(sd1_legacy["unet"], folder / "dreambooth-unet.h5")
    shutil.copyfile(sd1_keras["text_encoder"], folder / "text_encoder.weights.h5")
    shutil.copyfile(sd1_legacy["decoder"], stock / "kcv_decoder.h5")
    shutil.copyfile(sd1_legacy["image_encoder"], stock / "vae_encoder.h5")
    torch.save({"state_dict": load_file(original_of("sd1"))}, folder / "model.ckpt")
    save_file({"<cat>": torch.ones(64)}, folder / "cat.safetensors")
    write(folder / "sd3_medium_incl_clips_t5xxlfp16.safetensors", bundle("sd3"))
    write(folder / "flux1-dev.safetensors", original("flux", "transformer"))
    write(folder / "ae.safetensors", original("flux", "vae"))
    write(folder / "clip_l.safetensors", weights("flux", "text_encoder"))
    write(folder / "t5xxl_fp16.safetensors", weights("flux", "text_encoder_2"))
    write(folder / "chroma1-hd.safetensors", original("chroma", "transformer"))
    write(folder / "z_image_turbo_bf16.safetensors", original("zimage_turbo", "transformer"))
    turbo = [folder / "z_image_turbo_bf16.safetensors", folder / "ae.safetensors"]
    made = run("convert", *turbo, "-o", folder / "Z-Image-Turbo")
    assert made.status == 0, made.err
    sources = [folder / "dreambooth-unet.h5", folder / "text_encoder.weights.h5"]
    made = run("convert", *sources, "--base", stock, "-o", folder / "my-model")
    assert made.status == 0, made.err
    draw_small(folder / "my-model")
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to run a page in; the files are links."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("HOME", str(files / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw_small(repo: Path) -> None:
    """Make 64 pixels the size of a repo's images."""
    path = repo / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["sample_size"] = 8
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_page(page: str, here: Path) -> None:
    names: dict[str, object] = {}
    for block in RUN:
        if block.page == page and block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.page == page:
            run_commands(block.text, here)


def run_commands(text: str, here: Path) -> None:
    """Run the commands of a block, and compare what each prints with what the block shows."""
    home = str(Path.home())
    for entry in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *shown = entry.replace("\\\n", "").splitlines()
        program, *arguments = shlex.split(command.replace("~", home))
        assert program == "weightport", f"mark this block as not run: {command}"
        output = output_of(arguments, here)
        ended = run(*arguments)
        assert ended.status == 0, f"{command}: {ended.err}"
        if output and (output / "unet").is_dir():
            draw_small(output)
        if shown:
            compare("\n".join(shown), ended.out.replace(home, "~"))


def output_of(arguments: list[str], here: Path) -> Path | None:
    """What a command writes; there is room for it afterwards."""
    if "-o" not in arguments:
        return None
    path = here / arguments[arguments.index("-o") + 1]
    path.unlink(missing_ok=True)  # a link to what lies ready for other commands
    return path


def compare(shown: str, printed: str) -> None:
    """What a page shows is what was printed, but for the model's width; `...` is anything."""
    expected = re.escape(SIZE.sub("SIZE", shown.strip()))
    expected = re.sub(r"(\\ )+", r" +", expected).replace(r"\.\.\.", r"[\s\S]*")
    actual = SIZE.sub("SIZE", NOTE.sub("", printed).strip())
    assert re.fullmatch(expected, actual), f"the page shows\n{shown}\nbut it prints\n{printed}"


def test_blocks_that_are_not_run() -> None:
    reasons = Counter(block.reason for block in BLOCKS if block.reason is not None)
    assert reasons == {
        "it asks the Hub": 3,
        "it needs Keras": 3,
        "it takes minutes": 2,
        "it is what runs this": 1,
        "it serves until it is interrupted": 1,
        "names files that are not there": 3,
        "takes 30 GB of disk, and an hour": 1,
    }


def test_pages_made_from_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    tables = import_module("rosetta").page()
    for table in all_tables():
        if table.about["layout"] != "diffusers":  # of those, the ones with names of their own
            assert f"`{table.name}`" in tables
    assert "\n| `down_blocks.{0..3}.resnets.{0..1}.conv1.weight` | `res_block.{0..7}." in tables
    assert tables.count("\n") < 3500
    options = import_module("cli_page").page()
    for command in ("convert", "inspect", "diff", "generate", "compare-schedulers", "parity"):
        assert f"## weightport {command}\n" in options
    assert "| `--max-shard-size SIZE` |" in options


EXAMPLES = [path for path in PAGES if ">>> " in path.read_text()]


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda path: path.stem)
def test_examples(page: Path) -> None:
    outcome = doctest.testfile(str(page), module_relative=False)
    assert outcome.attempted
    assert outcome.failed == 0
