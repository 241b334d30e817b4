"""No file decides how much time and memory is spent: hostile ones in a process that measures both.

Their cost is bounded, or linear in what the file holds (`benchmarks/growth.py` prints the curves).
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from weightport.converters.readers.object_graph import Node
from weightport.converters.readers.torch_file import read_torch
from weightport.runtime.models.clip import CLIPTextModel
from weightport.runtime.models.unet import UNet2DConditionModel
from weightport.runtime.schedulers import DDIMScheduler

from ..support.pickle_files import EMPTY_DICT, NONE, archive, call, mapping, text
from ..support.synthetic import write_many_tensors
from ..support.tf_bundle_writer import write_bundle

SECONDS = 5.0  # of CPU, for each file, on a machine that counts as fast as is said next
COUNTED = 0.15  # seconds for two million steps of a loop, where others do not slow it down
MEMORY = 500e6  # bytes, of the whole process
STEP = 3  # more than one CPU beside us makes ours slower

# Reads each file that is named, and says what came of it, what it cost, and the peak so far.
CHILD = """
import json, sys, time, warnings
from pathlib import Path
{prepare}
warnings.simplefilter("ignore")
begin = time.process_time()
for _ in range(2_000_000):
    begin = begin + 0
print(time.process_time() - begin, flush=True)
for path in sys.argv[1:]:
    begin = time.process_time()
    try:
        {read}
        message = ""
    except (ConversionError, OSError, ValueError) as error:
        message = str(error)
    seconds = time.process_time() - begin
    status = Path("/proc/self/status").read_text().split()
    peak = 1024 * int(status[status.index("VmHWM:") + 1])  # ru_maxrss is also the parent's
    print(json.dumps([Path(path).name, message, seconds, peak]), flush=True)
"""
INSPECT = CHILD.format(
    prepare="from weightport.api import inspect\nfrom weightport.errors import ConversionError",
    read="inspect(path)",
)


LOAD = CHILD.format(
    prepare="""
from weightport.errors import ConversionError
from weightport.runtime.loading.model import AutoModel
from weightport.runtime.schedulers import DDIMScheduler
from weightport.runtime.text.tokenizer import CLIPTokenizer
READ = {"model": AutoModel, "scheduler": DDIMScheduler, "tokenizer": CLIPTokenizer}
""",
    read='READ[Path(path).name.partition("-")[0]].from_pretrained(path)',
)


@dataclass(frozen=True)
class Reading:
    """What reading one file came to; its seconds are those of a machine that is not loaded."""

    message: str
    seconds: float
    peak: int


def read_all(code: str, paths: list[Path]) -> dict[str, Reading]:
    """Read files in a process of its own, which is killed when it takes far too long."""

    def limit() -> None:
        seconds = int(SECONDS * (len(paths) + STEP))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))

    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    counted, *found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == len(paths), (len(found), ran.returncode, ran.stderr[-2000:])
    slow = max(1.0, counted / COUNTED)
    return {name: Reading(message, seconds / slow, peak) for name, message, seconds, peak in found}


# ---- what conversions read


def cut_header(path: Path) -> None:
    write_many_tensors(path, 100)
    os.truncate(path, 200)


def deep_header(path: Path) -> None:
    text = b'{"a":' * 100_000
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def empty_values(path: Path) -> None:
    text = b'{"a":[' + b"[]," * 20_000_000 + b"[]]}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def roots(path: Path) -> None:
    """Very many groups that look like a component."""
    with h5py.File(path, "w") as file:
        for number in range(4096):
            file[f"m{number}/res_block/vars/0"] = np.zeros(1, "f4")


def rooted(path: Path, structures: Callable[[int], bytes]) -> None:
    """An HDF5 file whose root group is what stands at the beginning of some structures, which are
    told where in the file they lie."""
    with h5py.File(path, "w") as file:
        file.create_group("a")
    data = bytearray(path.read_bytes())
    at = len(data)
    data += structures(at)
    struct.pack_into("<Q", data, 40, len(data))  # in the superblock: the end of the file
    struct.pack_into("<Q", data, 64, at)  # and the root group
    path.write_bytes(data)


def header(message: bytes) -> bytes:
    return struct.pack("<BxHII4x", 1, 0, 1, len(message)) + message


def attributes(path: Path) -> None:
    """A group with very many attributes of no bytes."""
    messages = struct.pack("<HHB3x", 12, 0, 0) * (4_194_304 - 40)
    rooted(path, lambda at: header(messages))


def names(path: Path) -> None:
    """A group with very many children, all of one name of a thousand bytes."""
    count = 60_000
    text = b"x" * 1000 + bytes(24)
    entry = struct.pack("<QQ24x", 0, 0)

    def structures(at: int) -> bytes:
        heap = at + 48
        tree = heap + 32 + len(text)
        nodes = tree + 24 + 16 * 20
        made = header(struct.pack("<HHB3xQQ", 17, 16, 0, tree, heap)).ljust(48, b"\0")
        made += b"HEAP" + struct.pack("<4xQQQ", len(text), 0, heap + 32) + text
        made += b"TREE" + struct.pack("<BBH16x", 0, 0, 20)
        for number in range(20):
            made += struct.pack("<QQ", 0, nodes + number * (8 + 40 * count))
        return made + (b"SNOD" + struct.pack("<BxH", 1, count) + entry * count) * 20

    rooted(path, structures)


def shard_index(path: Path) -> None:
    """Very many entries over one shard of very many datasets."""
    with h5py.File(path.with_name("shard.weights.h5"), "w") as file:
        for number in range(4096):
            file[f"l/x{number}/vars/0"] = np.zeros(1, "f4")
    groups = (f"/l/x{number}" for number in range(8000))
    entries = dict.fromkeys(groups, ["shard.weights.h5"] * 2)
    path.write_text(json.dumps({"weight_map": entries}), encoding="utf-8")


def graph(nodes: list[Node]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_bundle(path.with_suffix(""), {"a": np.zeros(1, "f4")}, nodes, checksums=False)

    return write


def chain() -> list[Node]:
    """Each object in the one before: the paths to them are long."""
    length = 40_000
    return [Node({"child": i + 1} if i + 1 < length else {}, {}) for i in range(length)]


def shared() -> list[Node]:
    """Models that share their layers, which share what is in them."""
    models = range(1, 201)
    layers = range(201, 401)
    return [
        Node({f"m{i}": i for i in models}, {}),
        *(Node({f"layer-{i}": i for i in layers}, {}) for _ in models),
        *(Node({f"x{i}": 401 for i in range(200)}, {}) for _ in layers),
        Node({}, {}),
    ]


def operations() -> list[Node]:
    """Models that share one list of layers."""
    models = range(1, 20_001)
    return [
        Node({f"m{i}": i for i in models}, {}),
        *(Node({"_operations": 20_001}, {}) for _ in models),
        Node({str(i): 20_002 for i in range(10_000)}, {}),
        Node({}, {}),
    ]


def no_graph(path: Path) -> None:
    write_bundle(path.with_suffix(""), {"a": np.zeros(1, "f4")}, None)


SOURCES: dict[str, tuple[Callable[[Path], None], str]] = {
    "names.safetensors": (lambda path: write_many_tensors(path, 100_000), ""),
    "cut.safetensors": (cut_header, "is the download complete"),
    "deep.safetensors": (deep_header, "nested too deeply"),
    "values.safetensors": (empty_values, "more than 2000000 values"),
    "roots.weights.h5": (roots, "more than 16 groups"),
    "attributes.weights.h5": (attributes, "more than 67108864 bytes"),
    "names.weights.h5": (names, "more than 67108864 bytes"),
    "index.weights.json": (shard_index, "in none of the shards|none of its layers"),
    "chain.index": (graph(chain()), "no component"),
    "shared.index": (graph(shared()), "no component"),
    "operations.index": (graph(operations()), "no component"),
    "nothing.index": (no_graph, "no component"),
}


def test_hostile_sources_cost_little(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in SOURCES]
    for path, (write, _) in zip(paths, SOURCES.values(), strict=True):
        write(path)
    check(read_all(INSPECT, paths), {name: reason for name, (_, reason) in SOURCES.items()})


def check(readings: Mapping[str, Reading], reasons: Mapping[str, str]) -> None:
    """Each was refused in one line that names it, for its reason, and cost little."""
    for name, reason in reasons.items():
        reading = readings[name]
        assert "\n" not in reading.message
        if reason:
            pytest.fail(f"{name} was read") if not reading.message else None
            assert name.partition(".")[0] in reading.message, (name, reading)
            assert any(one in reading.message for one in reason.split("|")), (name, reading)
        assert reading.seconds < SECONDS, (name, reading)
        assert reading.peak < MEMORY, (name, reading)


def test_a_pickle_may_be_merely_long(tmp_path: Path) -> None:
    numbers = torch.zeros(100_000)
    state = {f"block.{i}x.weight": numbers[i : i + 1] for i in range(len(numbers))}
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    assert read_torch(tmp_path / "m.ckpt").tensors.keys() == state.keys()


# ---- what the runtime reads

UNET = {
    "block_out_channels": [8, 8],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}


CLIP = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 20,
}
BOMBS = {  # of pickles, which torch hangs at, fills the memory with, or runs
    "hash": archive(
        EMPTY_DICT + b")q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"h\x00" + NONE + b"s"
    ),
    "copies": archive(
        b"".join(mapping(a=text("x" * 1000)) + b"q\x010" for _ in range(9))
        + call("_codecs.encode", text("x" * 1_000_000), text("latin1"))
    ),
    "command": archive(call("os.system", text("echo"))),
}
BLOCKS = 3000
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers_per_block": 10**9}, "layers_per_block"),
    "layers_each": ({"layers_per_block": [10**5, 10**5]}, "config.json"),
    "transformers": ({"transformer_layers_per_block": 10**9}, "parameters are asked for"),
    "channels": ({"block_out_channels": [2**31, 2**31]}, "config.json|does not fit"),
    "groups": ({"norm_num_groups": 0}, "config.json"),
    "text": ({"layers_per_block": "many"}, "layers_per_block"),
    "object": ({"cross_attention_dim": {"a": 1}}, "cross_attention_dim"),
    "huge": ({"cross_attention_dim": 10**30}, "config.json"),
    "blocks": (
        {
            "block_out_channels": [8] * BLOCKS,
            "down_block_types": ["DownBlock2D"] * BLOCKS,
            "up_block_types": ["UpBlock2D"] * BLOCKS,
        },
        "parameters are asked for|parts are asked for",
    ),
}
CLIP_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "depth": ({"num_hidden_layers": 10**9}, "parameters are asked for"),
    "vocabulary": ({"vocab_size": 10**12}, "does not fit"),
    "heads": ({"num_attention_heads": 0}, "config.json"),
}
SCHEDULERS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
    "none": ({"num_train_timesteps": 0}, "num_train_timesteps"),
    "word": ({"beta_start": "low"}, "beta_start"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict[str, str]]:
    """Hostile folders of components, and why each is refused."""
    place = tmp_path_factory.mktemp("hostile")
    reasons: dict[str, str] = {}
    for model, cases in (
        (UNet2DConditionModel.from_config(UNET), CONFIGS),
        (CLIPTextModel.from_config(CLIP), CLIP_CONFIGS),
    ):
        for name, (change, reason) in cases.items():
            folder = place / f"model-{name}"
            model.save_pretrained(folder)
            edit(folder / "config.json", change)
            reasons[folder.name] = reason
    for name, (change, reason) in SCHEDULERS.items():
        folder = place / f"scheduler-{name}"
        DDIMScheduler().save_pretrained(folder)
        edit(folder / "scheduler_config.json", change)
        reasons[folder.name] = reason
    for name, bomb in BOMBS.items():
        folder = place / f"model-{name}"
        UNet2DConditionModel.from_config(UNET).save_pretrained(folder, safe_serialization=False)
        (folder / "diffusion_pytorch_model.bin").write_bytes(bomb)
        reasons[folder.name] = "diffusion_pytorch_model.bin"
    reasons |= tokenizers(place)
    return [place / name for name in reasons], reasons


def edit(path: Path, change: Mapping[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")


def tokenizers(place: Path) -> dict[str, str]:
    """Tokenizers whose files are huge, or no files."""
    sparse = place / "tokenizer-sparse"
    sparse.mkdir()
    with (sparse / "tokenizer.json").open("wb") as file:
        file.truncate(5 << 30)
    merges = place / "tokenizer-merges"
    merges.mkdir()
    (merges / "vocab.json").write_text("{}", encoding="utf-8")
    with (merges / "merges.txt").open("wb") as file:
        file.truncate(5 << 30)
    pipe = place / "tokenizer-pipe"
    pipe.mkdir()
    os.mkfifo(pipe / "tokenizer.json")
    words = place / "tokenizer-words"
    words.mkdir()
    (words / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": "b"}, "merges": []}}), encoding="utf-8"
    )
    return {
        sparse.name: "5368709120 bytes",
        merges.name: "5368709120 bytes",
        pipe.name: "there is no",
        words.name: "vocab",
    }


def test_hostile_components_cost_little(folders: tuple[list[Path], dict[str, str]]) -> None:
    paths, reasons = folders
    check(read_all(LOAD, paths), reasons)


def test_a_bin_file_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    model = UNet2DConditionModel.from_config(UNET)
    model.save_pretrained(tmp_path, safe_serialization=False)
    (written,) = tmp_path.glob("*.bin")
    for form in (True, False):
        state = {key: value.bfloat16() for key, value in model.state_dict().items()}
        torch.save(state, written, _use_new_zipfile_serialization=form)
        for disable_mmap in (True, False):
            loaded = UNet2DConditionModel.from_pretrained(
                tmp_path, dtype="auto", disable_mmap=disable_mmap
            ).state_dict()
            assert all(torch.equal(loaded[key], value) for key, value in state.items())
