"""Builds PyTorch checkpoints from bytes: a small pickle assembler, the three containers, and saves
like a trainer's."""

from __future__ import annotations

import enum
import io
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# ---- the assembler: every function gives the instructions that push one value

PROTO2, STOP, MARK = b"\x80\x02", b".", b"("
TRUE, NONE, EMPTY_DICT, EMPTY_LIST = b"\x88", b"N", b"}", b"]"


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def several(*values: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(values) + b"t"


def sizes(*values: int) -> bytes:
    return several(*map(number, values))


def name(dotted: str) -> bytes:
    """GLOBAL; `package.module:name.of.part` where the last dot is not what separates them."""
    module, colon, part = dotted.partition(":")
    module, part = (module, part) if colon else tuple(dotted.rpartition(".")[::2])
    return f"c{module}\n{part}\n".encode()


def call(function: bytes | str, *args: bytes) -> bytes:
    """REDUCE."""
    return (name(function) if isinstance(function, str) else function) + several(*args) + b"R"


def mapping(**entries: bytes) -> bytes:
    return pairs(*((text(key), value) for key, value in entries.items()))


def pairs(*entries: tuple[bytes, bytes]) -> bytes:
    return EMPTY_DICT + MARK + b"".join(key + value for key, value in entries) + b"u"


def storage(key: str = "0", numel: int = 4, kind: str = "torch.FloatStorage") -> bytes:
    return several(text("storage"), name(kind), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(
    shape: Sequence[int] = (4,),
    stride: Sequence[int] = (1,),
    offset: int = 0,
    store: bytes = storage(),
) -> bytes:
    rest = b"\x89" + call("collections.OrderedDict")
    return call(
        "torch._utils._rebuild_tensor_v2",
        store,
        number(offset),
        sizes(*shape),
        sizes(*stride),
        rest,
    )


def program(value: bytes) -> bytes:
    """A whole pickle."""
    return PROTO2 + value + STOP


# ---- containers

FOUR = struct.pack("<4f", 1, 2, 3, 4)
SYSTEM = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}
MAGIC = 0x1950A86A20F9469CFC6C


def archive(value: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """A zip checkpoint around the pickle of a value; `more` are members beside it."""
    members = {"data.pkl": program(value), "byteorder": b"little"}
    members |= {f"data/{key}": data for key, data in (storages or {"0": FOUR}).items()}
    return zipped(
        {
            f"model/{key}": data for key, data in (members | more | {"version": b"3\n"}).items()
        }.items()
    )


def zipped(
    members: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED, before: bytes = b""
) -> bytes:
    """A zip archive of (name, content) pairs, behind some bytes."""
    buffer = io.BytesIO(before)
    buffer.seek(len(before))
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        for member, content in members:
            opened.writestr(zipfile.ZipInfo(member), content, compression)
    return buffer.getvalue()


def legacy(
    value: bytes, storages: dict[str, bytes] | None = None, itemsize: int = 4, **headers: Any
) -> bytes:
    """The format before torch 1.6; `headers` replace whole pickles: magic, protocol, system,
    keys."""
    storages = {"0": FOUR} if storages is None else storages
    parts = {
        "magic": MAGIC,
        "protocol": 1001,
        "system": SYSTEM,
        "object": None,
        "keys": list(storages),
    }
    pickles = (
        {key: pickle.dumps(part, 2) for key, part in parts.items()}
        | {"object": program(value)}
        | headers
    )
    data = [struct.pack("<q", len(data) // itemsize) + data for data in storages.values()]
    return b"".join([*pickles.values(), *data])


def tarred(value: bytes, **members: bytes) -> bytes:
    """The format before torch 0.2: one float storage of four, tensor 7 over it; `members` are
    replaced."""
    store = several(number(5), text("cpu"), name("torch.FloatStorage"))
    view = several(number(7), number(5), name("torch.FloatTensor"))
    parts = {
        "sys_info": pickle.dumps(SYSTEM, 2),
        "pickle": program(value),
        "tensors": pickle.dumps(1, 2) + program(view) + struct.pack("<ii3q", 1, 0, 4, 1, 0),
        "storages": pickle.dumps(1, 2) + program(store) + struct.pack("<q", 4) + FOUR + pickle.dumps([], 2),
    }  # fmt: skip
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as opened:
        for member, content in (parts | members).items():
            info = tarfile.TarInfo(member)
            info.size, info.mtime = len(content), 1.5  # a fraction: written as an extended record
            opened.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# ---- a trainer's classes


@contextmanager
def trainer_classes() -> Iterator[types.SimpleNamespace]:
    """Classes named like those of training libraries, importable only while their objects are
    pickled."""
    modules: dict[str, dict[str, Any]] = {
        "pytorch_lightning.callbacks.model_checkpoint": {
            "ModelCheckpoint": type("ModelCheckpoint", (), {})
        },
        "pytorch_lightning.utilities.parsing": {
            "AttributeDict": type("AttributeDict", (dict,), {})
        },
        "omegaconf.dictconfig": {"DictConfig": type("DictConfig", (), {})},
        "omegaconf.nodes": {"AnyNode": type("AnyNode", (), {})},
        "ldm.kinds": {"Kind": enum.Enum("Kind", ["EPS", "V"])},
        "ldm.model": {"net": type("net", (), {}), "Box": type("Box", (list,), {})},
    }
    made = types.SimpleNamespace()
    for path, classes in modules.items():
        module = types.ModuleType(path)
        for title, cls in classes.items():
            cls.__module__, cls.__qualname__ = path, title
            setattr(module, title, cls)
            setattr(made, title, cls)
        for depth in range(1, path.count(".") + 1):
            parent = ".".join(path.split(".")[:depth])
            sys.modules.setdefault(parent, types.ModuleType(parent))
        sys.modules[path] = module
    before = {
        key for key in sys.modules if key.split(".")[0] in ("pytorch_lightning", "omegaconf", "ldm")
    }
    try:
        yield made
    finally:
        for key in before:
            del sys.modules[key]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
