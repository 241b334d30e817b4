"""Reads PyTorch checkpoints (`.ckpt`, `.pt`, `.pth`, `.bin`) without torch and without executing
anything in them.

Three containers, told apart by content: zip (torch 1.6 and later), a stream of pickles and storages
(before), and tar (before 0.2); and a bare pickle of numpy arrays. Storages are read in place, and
must all be there with the size that the pickle says. Formats: `torch/serialization.py`.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConversionError, printable
from ...io.weight_files import index_suffix
from ..checkpoint import Checkpoint, SourceFile
from .archives import Member, tar_members, zip_members
from .pickle_globals import Global, PickleError, is_standard
from .pickle_machine import read_pickle
from .shards import read_shards
from .signatures import is_tar, is_zip
from .torch_state import find_weights
from .torch_tensors import RANK, Storage, Storages, View, understood, view_of

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_SMALL = 1 << 12  # bytes: the pickles of a tar that describe one storage or tensor
_TAR_MEMBERS = {"sys_info", "pickle", "tensors", "storages"}


@dataclass(frozen=True)
class _Content:
    format: str
    value: object
    names: frozenset[Global]


def read_torch(path: Path) -> Checkpoint:
    """Read a PyTorch checkpoint, or the index of its shards; no tensor is read yet.

    Raises:
        ConversionError: it is damaged, ambiguous or malicious, or holds no tensors that can be
            converted.
    """
    if index_suffix(path.name):
        return read_shards(path, "bin", _read_file)
    return _read_file(path)


def _read_file(path: Path) -> Checkpoint:
    file = SourceFile(path)
    storages = Storages(file)
    try:
        read = _read_zip if is_zip(file) else _read_tar if is_tar(file) else _read_stream
        content = read(file, storages)
        storages.check_complete()
        weights = find_weights(content.value, storages)
    except PickleError as error:
        file.close()
        raise ConversionError(f"{path}: {error}") from None
    except BaseException:
        file.close()
        raise
    unknown = {
        str(name) for name in content.names - understood(content.names) if not is_standard(name)
    }
    return Checkpoint(
        path,
        content.format,
        weights.tensors,
        skipped=weights.skipped,
        files=[file],
        metadata=weights.metadata,
        beside=weights.beside,
        ignored_classes=sorted(unknown),
    )


# ---- zip: <root>/data.pkl and <root>/data/<key>


def _read_zip(file: SourceFile, storages: Storages) -> _Content:
    members = zip_members(file)
    roots = {name.partition("/")[0] for name in members}
    if len(roots) != 1:
        listed = ", ".join(map(printable, sorted(roots)[:3]))
        raise PickleError(
            f"the zip archive has {len(roots)} folders at its top ({listed}), where PyTorch"
            " writes one"
        )
    inside = {name.partition("/")[2]: member for name, member in members.items()}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise PickleError(
            "a TorchScript archive, which holds a program; save the model's state_dict instead"
        )
    if "data.pkl" not in inside:
        raise PickleError("a zip archive without `data.pkl`, so not a PyTorch checkpoint")
    if "byteorder" in inside and _content(file, inside["byteorder"]) != b"little":
        raise PickleError("its numbers are big-endian, which is not supported")
    pickle = inside["data.pkl"]
    found = read_pickle(file, pickle.offset, pickle.offset + pickle.size, storages.persistent)
    if found.end != pickle.offset + pickle.size:
        raise PickleError("bytes follow the end of the pickle in it")
    if pickle.crc32 and pickle.crc32 != zlib.crc32(file.read(pickle.offset, pickle.size)):
        raise PickleError("`data.pkl` does not match its checksum; the file is damaged")
    for name, member in inside.items():
        if name.startswith("data/"):
            storages.place(name.removeprefix("data/"), member.offset, member.size)
        elif name not in ("data.pkl", "byteorder", "version") and not name.startswith("."):
            raise PickleError(
                f"the zip archive has a member `{printable(name)}`, which PyTorch never writes"
            )
    return _Content("PyTorch checkpoint (zip)", found.value, found.names)


def _content(file: SourceFile, member: Member) -> bytes:
    return file.read(member.offset, min(member.size, _SMALL))


# ---- a stream of pickles: magic number, protocol, system, object, storage keys; then each
# storage after its length


def _read_stream(file: SourceFile, storages: Storages) -> _Content:
    magic = read_pickle(file, 0, file.size)
    if magic.value != _MAGIC:
        if magic.end != file.size:
            raise PickleError("bytes follow the end of the pickle in it")
        return _Content("pickle", magic.value, magic.names)
    protocol = read_pickle(file, magic.end, file.size)
    if protocol.value != _PROTOCOL:
        raise PickleError("the version of its format is not known")
    system = read_pickle(file, protocol.end, file.size)
    _check_system(system.value)
    found = read_pickle(file, system.end, file.size, storages.persistent)
    keys = read_pickle(file, found.end, file.size)
    if not isinstance(keys.value, list):
        raise PickleError("its list of storages is damaged")
    at = keys.end
    for key in keys.value:
        if not isinstance(key, str):
            raise PickleError("its list of storages is damaged")
        at = _place_next(file, storages, key, at)
    if at != file.size:
        raise PickleError(f"its storages end at byte {at}, the file at {file.size}; is it damaged?")
    return _Content("PyTorch checkpoint (before 1.6)", found.value, found.names)


def _check_system(system: object) -> None:
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise PickleError("its numbers are big-endian, which is not supported")


def _place_next(file: SourceFile, storages: Storages, key: str, at: int) -> int:
    """Place the storage whose length stands at `at`; returns where it ends."""
    declared = storages.declared.get(key)
    numel = int.from_bytes(file.read(at, 8), "little", signed=True)
    nbytes = numel * (declared.itemsize if declared else 1)
    storages.place(key, at + 8, nbytes)
    if at + 8 + nbytes > file.size:
        raise PickleError(
            f"storage `{key}` ends at byte {at + 8 + nbytes}, the file at {file.size}; is it"
            " truncated?"
        )
    return at + 8 + nbytes


# ---- tar: members for storages, tensors and the object


def _read_tar(file: SourceFile, storages: Storages) -> _Content:
    members = tar_members(file)
    if members.keys() != _TAR_MEMBERS:
        listed = ", ".join(map(printable, sorted(members)[:5]))
        raise PickleError(f"a tar archive of {listed}; unpack it if a checkpoint is inside")
    system = members["sys_info"]
    _check_system(read_pickle(file, system.offset, system.offset + system.size).value)
    known: dict[object, Storage | View] = {}
    _tar_storages(file, members["storages"], storages, known)
    _tar_tensors(file, members["tensors"], known)

    def persistent(identity: object) -> object:
        match identity:
            case (Global() as cls, _, _):
                return cls
            case str() | int() if str(identity)[:40] in known:
                return known[str(identity)]
        raise PickleError(
            "a reference of the pickle to its data leads nowhere; the file is damaged"
        )

    pickle = members["pickle"]
    found = read_pickle(file, pickle.offset, pickle.offset + pickle.size, persistent)
    return _Content("PyTorch checkpoint (tar, before 0.2)", found.value, found.names)


def _tar_storages(
    file: SourceFile, member: Member, storages: Storages, known: dict[object, Storage | View]
) -> None:
    """A count; then of each storage a description, its length and its elements; then views of
    storages."""
    end = member.offset + member.size
    count, at = _small_pickle(file, member.offset, end)
    for _ in range(_number(count)):
        described, at = _small_pickle(file, at, end)
        match described:
            case (int() | str() as key, _, Global() as cls):
                numel = int.from_bytes(file.read(at, 8), "little", signed=True)
                known[str(key)] = storages.declare(cls, key, numel)
                at = _place_next(file, storages, str(key), at)
            case _:
                raise PickleError("its list of storages is damaged")
    views = read_pickle(file, at, end).value
    for view in views if isinstance(views, list) else []:
        match view:
            case (
                int() | str() as key,
                int() | str() as root,
                int(first),
                int(numel),
            ) if isinstance(whole := known.get(str(root)), Storage):
                known[str(key)] = view_of(whole, first, numel)
            case _:
                raise PickleError("its list of views is damaged")


def _tar_tensors(file: SourceFile, member: Member, known: dict[object, Storage | View]) -> None:
    """A count; then of each tensor a description, its rank, shape, stride and offset."""
    end = member.offset + member.size
    count, at = _small_pickle(file, member.offset, end)
    for _ in range(_number(count)):
        described, at = _small_pickle(file, at, end)
        match described:
            case (int() | str() as key, int() | str() as root, Global()):
                storage = known.get(str(root))
            case _:
                storage = None
        if not isinstance(storage, Storage):
            raise PickleError("its list of tensors is damaged")
        rank = int.from_bytes(file.read(at, 4), "little")
        if rank > RANK:
            raise PickleError("its list of tensors is damaged")
        values = struct.unpack(f"<{2 * rank + 1}q", file.read(at + 8, 16 * rank + 8))
        shape = values[:rank]
        stride = values[rank:-1]
        offset = values[-1]
        known[str(key)] = View(storage, offset, shape, stride)
        at += 8 + 8 * len(values)


def _small_pickle(file: SourceFile, at: int, end: int) -> tuple[object, int]:
    found = read_pickle(file, at, min(end, at + _SMALL))
    return found.value, found.end


def _number(count: object) -> int:
    if not isinstance(count, int) or not 0 <= count < 1 << 20:
        raise PickleError("a count in it is damaged")
    return count
