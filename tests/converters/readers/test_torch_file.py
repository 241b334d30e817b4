"""The reader of PyTorch checkpoints gives what torch gives, for everything that torch and trainers
write."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import pickle
import struct
import sys
import time
import typing
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from weightport.converters.checkpoint import Checkpoint, Computed, SourceFile, Stored
from weightport.converters.readers import pickle_machine
from weightport.converters.readers.signatures import is_torch
from weightport.converters.readers.torch_file import read_torch
from weightport.errors import ConversionError

from ...support.pickle_files import (
    FOUR,
    archive,
    legacy,
    mapping,
    name,
    program,
    tarred,
    tensor,
    text,
    trainer_classes,
    written,
)

FORMATS: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip protocol 4": {"pickle_protocol": 4},
    "zip protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
every_format = pytest.mark.parametrize("form", FORMATS)
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


def saved(path: Path, value: object, form: str = "zip") -> Path:
    torch.save(value, path, **FORMATS[form])
    return path


def as_bytes(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """The same names in the same order, and the same bits."""
    assert list(found.tensors) == list(expected)
    for key, value in expected.items():
        array = found.tensors[key].numpy()
        assert array.shape == found.tensors[key].shape == tuple(value.shape), key
        assert array.tobytes() == as_bytes(value), key


def zoo() -> dict[str, torch.Tensor]:
    """Tensors of every kind of geometry."""
    base = torch.randn(6, 8)
    state: dict[str, torch.Tensor] = {
        str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in DTYPES
    }
    state |= {
        "zero rank": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    state |= {
        "rows": base[2:4],
        "columns": base[:, 1:5:2],
        "transposed": base.t(),
        "half": base.half().t(),
    }
    state |= {
        "one": torch.arange(77).expand(1, -1),
        "expanded": torch.ones(3, 1).expand(3, 5),
        "shared": base,
    }
    state |= {"channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    state |= {
        "buffer": nn.Buffer(torch.zeros(3)),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "frozen": frozen(),
    }
    return state


def frozen() -> nn.Parameter:
    """A parameter with an attribute, which is saved beside it."""
    parameter: Any = nn.Parameter(torch.ones(2), requires_grad=False)
    parameter.label = "x"
    return parameter


@every_format
def test_same_as_torch(tmp_path: Path, form: str) -> None:
    path = saved(tmp_path / "model.ckpt", zoo(), form)
    found = read_torch(path)
    # torch itself refuses newer protocols unless it may execute; these files are our own
    expected = torch.load(path, weights_only="protocol" not in form)
    assert_same(found, expected)
    assert not found.layout  # the modules of layouts say it
    assert not found.skipped
    assert not found.ignored_classes


def test_contiguous_tensors_are_read_in_place(tmp_path: Path) -> None:
    found = read_torch(saved(tmp_path / "model.ckpt", zoo())).tensors
    assert {key for key, value in found.items() if isinstance(value, Computed)} == {
        "columns", "transposed", "half", "expanded", "channels last", "permuted",
    }  # fmt: skip
    assert isinstance(found["one"], Stored)


def test_negated_views_are_refused(tmp_path: Path) -> None:
    state = {"w": torch._neg_view(torch.ones(2))}
    with pytest.raises(ConversionError, match="`w` is a tensor made by"):
        read_torch(saved(tmp_path / "model.ckpt", state))


UNSUPPORTED = {
    "complex64": torch.zeros(2, dtype=torch.complex64),
    "uint16": torch.zeros(2, dtype=torch.uint16),
    "float8_e4m3fnuz": torch.zeros(2, dtype=torch.float8_e4m3fnuz),
    "_rebuild_sparse_tensor": torch.eye(3).to_sparse(),
    "_rebuild_qtensor": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "_rebuild_meta_tensor": torch.zeros(2, device="meta"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_other_tensors_are_refused_by_name_only_among_the_weights(
    tmp_path: Path, kind: str, form: str
) -> None:
    if kind in ("uint16", "float8_e4m3fnuz") and form == "legacy":
        form = "zip"
    odd = UNSUPPORTED[kind]
    with pytest.raises(ConversionError, match=f"`odd` .*{kind}.* not supported"):
        read_torch(saved(tmp_path / "model.ckpt", {"odd": odd}, form))
    beside = {"state_dict": {"w": torch.ones(2)}, "optimizer": {"odd": odd}}
    found = read_torch(saved(tmp_path / "beside.ckpt", beside, form))
    assert_same(found, beside["state_dict"])
    assert found.skipped == {"optimizer": "state of the optimizer"}


# ---- what trainers save


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state},
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"module": {"state_dict": state}},
        lambda state: collections.OrderedDict(state),
        lambda state: collections.defaultdict(int, state),
    ],
)
def test_state_dicts_are_found(tmp_path: Path, wrap: Any) -> None:
    state = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    assert_same(read_torch(saved(tmp_path / "model.ckpt", wrap(state))), state)


def test_nested_parts_are_joined_by_dots(tmp_path: Path) -> None:
    parts = {
        "unet": {"w": torch.ones(1)},
        "vae": {"w": torch.zeros(1)},
        "optimizer": {"state": {0: torch.ones(5)}},
    }
    found = read_torch(saved(tmp_path / "model.pt", parts | {"step": 5}))
    assert_same(found, {"unet.w": torch.ones(1), "vae.w": torch.zeros(1)})
    assert found.skipped == {
        "optimizer": "state of the optimizer",
        "step": "no tensor, but a number",
    }
    assert found.metadata == {"step": "5"}


def lightning(classes: Any) -> tuple[dict[Any, Any], dict[str, torch.Tensor]]:
    """What pytorch-lightning saves, with everything that people keep in hyper-parameters and
    callbacks."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    config, node = classes.DictConfig(), classes.AnyNode()
    config.__dict__ |= {
        "_metadata": {"ref_type": Any, "object_type": dict},
        "_parent": None,
        "_content": {"lr": node},
    }
    node.__dict__ |= {"_val": 1e-4, "_parent": config}  # a cycle, as in OmegaConf
    callback, net = classes.ModelCheckpoint(), classes.net()
    callback.best_model_score = torch.tensor(0.5)
    state = {
        "model.diffusion_model.out.weight": layer.weight.data,
        "model.diffusion_model.out.bias": layer.bias.data,
    }
    saved: dict[Any, Any] = {
        "epoch": 7,
        "global_step": 840_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(state),
        "loops": {"fit_loop": {"progress": collections.Counter(a=1), "box": classes.Box([1])}},
        "callbacks": {classes.ModelCheckpoint: {"callback": callback, "dirpath": pathlib.PurePosixPath("/x")}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"when": datetime.datetime(2022, 8, 20, tzinfo=datetime.UTC), "for": datetime.timedelta(1)}],
        "hyper_parameters": classes.AttributeDict(config=config, kind=classes.Kind.V, net=net, size=(64, 64)),
        "odd": [np.float64(3), np.arange(3.0), np.random.RandomState(0), np.dtype("f4"), {1, 2}, 1 << 80, -1.5, None],
        "more": [complex(1, 2), slice(1, 2), argparse.Namespace(a=1), bytearray(b"x"), b"y", torch.device("cpu")],
        "types": [dict[str, int], typing.Dict[str, typing.Any], range(3), frozenset("a"), uuid.UUID(int=5)],  # noqa: UP006
        ("a", "tuple"): collections.defaultdict(list, {1: [torch.float16, torch.Size([2])]}),
    }  # fmt: skip
    return saved, state


@every_format
def test_lightning_checkpoint(tmp_path: Path, form: str) -> None:
    with trainer_classes() as classes:
        content, state = lightning(classes)
        path = saved(tmp_path / "model.ckpt", content, form)
    before = set(sys.modules)
    found = read_torch(path)
    assert_same(found, state)
    assert set(sys.modules) == before
    assert found.metadata == {
        "epoch": "7",
        "global_step": "840000",
        "pytorch-lightning_version": "1.4.2",
    }
    assert found.skipped["optimizer_states"] == "state of the optimizer"
    assert found.skipped["callbacks"] == "state of the trainer's callbacks"
    assert found.skipped["odd"] == "beside `state_dict`: a list"
    assert (
        found.skipped["a key that is no text"]
        == "beside `state_dict`: an object of class `collections.defaultdict`"
    )
    assert set(found.skipped) >= content.keys() - {"state_dict", ("a", "tuple")}
    assert found.ignored_classes == [
        "ldm.kinds.Kind", "ldm.model.Box", "ldm.model.net", "omegaconf.dictconfig.DictConfig",
        "omegaconf.nodes.AnyNode", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ]  # fmt: skip


class Small(nn.Module):
    """Every way in which a module holds tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)
        self.tied = self.head
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_buffer("none", None)


@every_format
@pytest.mark.parametrize(
    "wrap", [lambda model: model, nn.DataParallel, lambda model: {"model": model}]
)
def test_whole_modules(tmp_path: Path, form: str, wrap: Any) -> None:
    value = wrap(Small())
    found = read_torch(saved(tmp_path / "model.pt", value, form))
    model = value["model"] if isinstance(value, dict) else value
    assert_same(found, model.state_dict())
    assert "torch.nn.modules.linear.Linear" in found.ignored_classes


def test_python_2_ordered_dict(tmp_path: Path) -> None:
    entries = b"](](" + text("w") + tensor() + b"ee"
    value = name("collections.OrderedDict") + b"(" + entries + b"tR"
    found = read_torch(written(tmp_path / "old.ckpt", legacy(value)))
    assert found.tensors["w"].numpy().tolist() == [1, 2, 3, 4]


def test_tar_checkpoint(tmp_path: Path) -> None:
    path = written(tmp_path / "old.pt", tarred(mapping(w=text("7") + b"Q")))
    assert_same(read_torch(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_of_numpy_arrays(tmp_path: Path, protocol: int) -> None:
    state = {
        "a": np.arange(6, dtype="f4").reshape(2, 3),
        "b": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    state |= {"big": np.arange(3, dtype=">i4"), "bool": np.array([True]), "zero": np.array(3, "f2")}
    path = written(tmp_path / "model.pkl", pickle.dumps(state, protocol))
    found = read_torch(path)
    assert found.format == "pickle"
    for key, value in state.items():
        array = found.tensors[key].numpy()
        assert array.tobytes() == value.astype(value.dtype.newbyteorder("<")).tobytes(), key
        assert array.shape == value.shape


def test_without_checksums(tmp_path: Path) -> None:
    config = torch.utils.serialization.config.save
    config.compute_crc32 = False
    try:
        path = saved(tmp_path / "model.pt", {"w": torch.ones(2)})
    finally:
        config.compute_crc32 = True
    assert_same(read_torch(path), {"w": torch.ones(2)})


def test_archive_with_64_bit_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in files over 4 GB."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 4)
    content = archive(mapping(w=tensor()))
    assert struct.pack("<Q", len(FOUR)) * 2 in content
    assert_same(
        read_torch(written(tmp_path / "model.ckpt", content)), {"w": torch.tensor([1.0, 2, 3, 4])}
    )


# ---- recognition and speed


def test_recognised_by_content(tmp_path: Path) -> None:
    for number, content in enumerate([
        archive(mapping(w=tensor())), archive(mapping(w=tensor()))[:-30], legacy(mapping(w=tensor())), b"(dp0\n.",
        tarred(b"N"), program(b"N"), pickle.dumps({}, 4), b"cposix\nsystem\n(S'x'\ntR.", pickle.dumps({"a": 1}, 0),
    ]):  # fmt: skip
        assert is_torch(SourceFile(written(tmp_path / f"{number}.weird", content))), number
    strangers = [
        b"",
        b"PK\x03\x04",
        b"text.",
        b"{}",
        b"\x89HDF\r\n\x1a\n",
        b"\x80\2\0\0\0\0\0\0{}" * 99,
    ]
    for number, content in enumerate(strangers):
        assert not is_torch(SourceFile(written(tmp_path / f"not {number}", content))), number


def test_full_size_pickle_is_quick(tmp_path: Path) -> None:
    state = {f"model.diffusion_model.input_blocks.{i}.weight": torch.zeros(1) for i in range(4000)}
    path = saved(tmp_path / "model.ckpt", {"state_dict": state})
    start = time.process_time()
    read_torch(path)
    assert time.process_time() - start < 5


def test_no_module_of_the_reader_can_unpickle() -> None:
    folder = Path(pickle_machine.__file__).parent
    for path in [*folder.glob("torch_*.py"), *folder.glob("pickle_*.py"), folder / "archives.py"]:
        source = path.read_text()
        for word in (
            "import pickle",
            "from pickle",
            "import torch",
            "importlib",
            "__import__",
            "eval(",
        ):
            assert word not in source, f"{path.name} has {word}"
