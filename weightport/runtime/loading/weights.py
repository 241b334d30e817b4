"""Weights from files into models and back, in as little memory as possible.

Models are built on the meta device, without memory and without initialisation. Files are mapped
privately: what needs no cast is used in place and read when it is first touched, and stays writable
without touching the file. A cast goes tensor by tensor and gives the pages of its source back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...io.pages import drop_file_pages
from ...io.weight_files import shard_name, weights_name, write_index

_TOLD = 3  # faults that a message names
_MANY = 5_000  # names; a known model has fewer
_LONGEST = 200  # characters of a name that are compared
_INITIALISERS = {
    value for name, value in vars(nn.init).items() if name.endswith("_") and callable(value)
}


class NoInit(TorchFunctionMode):
    """Within it, initialisation does nothing: on the meta device it would only take time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func in _INITIALISERS else func(*args, **(kwargs or {}))


def load_weights(
    model: nn.Module,
    files: list[Path],
    rename: Callable[[str], str | None],
    dtype: torch.dtype | None,
    device: torch.device | None = None,
    use_mmap: bool = True,
    unfit: list[str] | None = None,
    wide: Collection[str] = (),
) -> list[str]:
    """Fill a model that is on the meta device.

    Args:
        model: the model; its state dict tells which keys and shapes are expected.
        files: `.safetensors` or `.bin`, which together hold every tensor.
        rename: the model's name for a key of a file, or None if the model has no use for it.
        dtype: what floating-point tensors are cast to; None leaves them as they are.
        device: where they go; None leaves them in the mapped file.
        use_mmap: False reads files into memory first.
        unfit: gets the keys of another shape, which stay on the meta device; without it that is an
            error.
        wide: names of parts whose weights are float32 where those of others become float16.

    Returns:
        The keys that the model has no use for.

    Raises:
        ValueError: a key is missing, unexpected or has the wrong shape, or a file is damaged.
    """

    def tensors() -> Iterator[tuple[str, Tensor, bool]]:
        for path in files:
            is_mapped = use_mmap and path.suffix == ".safetensors"
            for key, tensor in read_tensors(path, use_mmap):
                yield key, tensor, is_mapped

    where = files[0] if len(files) == 1 else files[0].parent
    return fill(model, tensors(), str(where), rename, dtype, device, unfit, wide)


def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor, bool]],
    where: str,
    rename: Callable[[str], str | None],
    dtype: torch.dtype | None,
    device: torch.device | None = None,
    unfit: list[str] | None = None,
    wide: Collection[str] = (),
) -> list[str]:
    """Fill a model that is on the meta device.

    Args:
        model: as of `load_weights`.
        tensors: keys, tensors, and whether a tensor lies in a mapped file that nobody wrote to.
        where: they come from, for messages.
        rename: as of `load_weights`.
        dtype: likewise.
        device: likewise.
        unfit: likewise.
        wide: likewise.

    Returns:
        The keys that the model has no use for.

    Raises:
        ValueError: a key is missing, unexpected or has the wrong shape.
    """
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    unused: list[str] = []
    faults: list[str] = []
    for key, tensor, is_mapped in tensors:
        name = rename(key)
        if name is None:
            unused.append(key)
        elif name not in expected:
            close = _nearest(name, expected) if len(faults) < _TOLD else []
            faults.append(f"unexpected {key}" + (f" (nearest: {close[0]})" if close else ""))
        elif name in state:
            faults.append(f"{key} is there twice")
        else:
            state[name] = tensor = _squeezed(tensor, expected[name].shape)
            fits = tensor.shape == expected[name].shape
            if not fits and unfit is not None:
                unfit.append(name)
                state[name] = expected[name]
            elif not fits:
                faults.append(f"{key} has shape {[*tensor.shape]}, not {[*expected[name].shape]}")
            elif not faults:
                state[name] = tensor.to(device, _target(name, tensor, dtype, wide))
                if state[name] is not tensor:
                    drop_file_pages(tensor, unwritten=is_mapped)
    faults += [f"missing {key}" for key in expected if key not in state]
    if faults:
        more = f" and {len(faults) - _TOLD} more" if len(faults) > _TOLD else ""
        raise ValueError(
            f"{where}: does not fit {type(model).__name__}: {'; '.join(faults[:_TOLD])}{more}"
        )
    _assign(model, state)
    return unused


def _assign(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of a model's, as `load_state_dict` does, in a third of the time."""
    parts = dict(model.named_modules(remove_duplicate=False))
    for key, tensor in state.items():
        path, _, name = key.rpartition(".")
        old = getattr(parts[path], name)
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        setattr(parts[path], name, tensor)


def _target(
    name: str, tensor: Tensor, dtype: torch.dtype | None, wide: Collection[str]
) -> torch.dtype:
    """What a tensor is cast to."""
    if not tensor.is_floating_point():
        return tensor.dtype
    target = dtype or tensor.dtype
    is_wide = target is torch.float16 and not set(wide).isdisjoint(name.split("."))
    return torch.float32 if is_wide else target


def _nearest(name: str, expected: Collection[str]) -> list[str]:
    """The expected name that is most like another one; to compare them takes a while."""
    return get_close_matches(name[:_LONGEST], expected, n=1) if len(expected) < _MANY else []


def _squeezed(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A convolution of size 1x1 as the linear layer it is, where that is expected."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape == (*shape, 1, 1) else tensor


# --- reading --------------------------------------------------------------------------------------


def count_tensors(path: Path) -> int:
    """How many tensors a file has.

    Raises:
        ValueError: it is damaged.
    """
    if path.suffix != ".safetensors":
        from .pickles import open_pickle

        return len(open_pickle(path).tensors)
    with _opened(path) as file:
        return len(file.keys())


def read_tensors(path: Path, use_mmap: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file with their names.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    if path.suffix != ".safetensors":
        from .pickles import read_pickle

        yield from read_pickle(path, use_mmap)
        return
    with _opened(path) as file:
        if use_mmap:
            yield from ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
        else:
            yield from load(path.read_bytes()).items()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a safetensors file, truncated or damaged ({error})"
        ) from None


# --- writing --------------------------------------------------------------------------------------


def write_weights(
    folder: Path,
    state: Mapping[str, Tensor],
    library: str,
    variant: str | None,
    max_size: int,
    safe: bool,
) -> None:
    """Write a state dict as one file, or as shards with an index where it has more than `max_size`
    bytes.

    Args:
        folder: an existing folder.
        state: the tensors, on any device.
        library: whose file names to use, see `io.weight_files.STEMS`.
        variant: a part of the file names.
        max_size: bytes of tensors in a file; a single tensor may be larger.
        safe: False writes `.bin`, where the library allows it.
    """
    suffix = "safetensors" if safe or library != "diffusers" else "bin"
    filename = weights_name(library, suffix, variant)
    shards: list[dict[str, Tensor]] = [{}]
    room = max_size
    for key, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_size
        shards[-1][key] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _write(folder / filename, state)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = shard_name(filename, number, len(shards))
        _write(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in state.values())
    write_index(folder, filename, weight_map, total)


def _write(path: Path, state: Mapping[str, Tensor]) -> None:
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        torch.save(
            {key: tensor.clone() for key, tensor in tensors.items()}, path
        )  # else views bring all they are of
