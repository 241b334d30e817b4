"""Containers that lead elsewhere or disagree with themselves: HDF5 links, archives, shards, repos.

Another file of the machine must never be read: a canary with a known content must turn up nowhere.
"""

from __future__ import annotations

import json
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ..support.command import assert_refused, edited, listing, refused, run
from ..support.synthetic import STEMS, write_repo

KERNEL, BIAS = "layers/padded_conv2d/conv2d/vars/0", "layers/padded_conv2d/conv2d/vars/1"

# ---- HDF5 that leads elsewhere


CANARY = np.frombuffer(b"CANARY: a secret of this machine" * 4096, "f4")


@pytest.fixture
def canary(place: Path) -> Iterator[Path]:
    """A file outside the input whose content must not appear anywhere."""
    file = place / "secret.h5"
    with h5py.File(file, "w") as secret:
        secret["kernel"] = CANARY
        secret["vars/0"] = CANARY
    yield file
    for path in place.rglob("*"):
        if path.is_file() and not path.is_symlink() and path != file:
            assert b"CANARY" not in path.read_bytes(), path


def replaced(file: h5py.File, name: str) -> tuple[int, ...]:
    shape: tuple[int, ...] = file[name].shape
    del file[name]
    return shape


def external_dataset(file: h5py.File, secret: Path) -> None:
    replaced(file, KERNEL)
    file[KERNEL] = h5py.ExternalLink(str(secret), "/kernel")


def external_relative(file: h5py.File, secret: Path) -> None:
    replaced(file, KERNEL)
    file[KERNEL] = h5py.ExternalLink(secret.name, "/kernel")


def external_group(file: h5py.File, secret: Path) -> None:
    del file["layers/padded_conv2d/conv2d"]
    file["layers/padded_conv2d/conv2d"] = h5py.ExternalLink(str(secret), "/")


def external_root_child(file: h5py.File, secret: Path) -> None:
    file["optimizer"] = h5py.ExternalLink(str(secret), "/vars")


def external_storage(file: h5py.File, secret: Path) -> None:
    shape = replaced(file, KERNEL)
    file.create_dataset(
        KERNEL, shape, "f4", external=[(str(secret), 2048, int(np.prod(shape)) * 4)]
    )


def virtual_dataset(file: h5py.File, secret: Path) -> None:
    shape = replaced(file, KERNEL)
    layout = h5py.VirtualLayout((int(np.prod(shape)),), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "kernel", CANARY.shape)[: int(np.prod(shape))]
    file.create_virtual_dataset(KERNEL, layout)


def soft_link(file: h5py.File, secret: Path) -> None:
    replaced(file, KERNEL)
    file[KERNEL] = h5py.SoftLink("/" + BIAS)


def soft_loop(file: h5py.File, secret: Path) -> None:
    file["layers/loop"] = h5py.SoftLink("/layers/loop")


def hard_cycle(file: h5py.File, secret: Path) -> None:
    file["layers/padded_conv2d/again"] = file["layers"]


def shared_dataset(file: h5py.File, secret: Path) -> None:
    del file[BIAS]
    file[BIAS] = file[KERNEL]


LEADS: dict[Callable[[Any, Path], None], str] = {
    external_dataset: "external link",
    external_relative: "external link",
    external_group: "external link",
    external_root_child: "external link",
    external_storage: "data in other files",
    virtual_dataset: "virtual",
    soft_link: "soft link",
    soft_loop: "soft link",
    hard_cycle: "second link",
    shared_dataset: "second link",
}


@pytest.mark.parametrize("lead", LEADS, ids=lambda lead: lead.__name__)
def test_hdf5_that_leads_elsewhere(
    place: Path, sd1_keras: dict[str, Path], canary: Path, lead: Callable[[h5py.File, Path], None]
) -> None:
    file = edited(sd1_keras["image_encoder"], place, lambda opened: lead(opened, canary))
    refused(place, file, names=file, reason=LEADS[lead])
    assert run("inspect", file).status == 1


# ---- .keras archives


def zipped(place: Path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    path = place / "model.keras"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # duplicate names are the point
        for name, content in members:
            archive.writestr(name, content)
    return path


INSIDE = "model.weights.h5"


@pytest.mark.parametrize(
    "name", [f"../{INSIDE}", f"/{INSIDE}", f"..\\{INSIDE}", "other.h5", f"{INSIDE}/x"]
)
def test_archive_without_weights(place: Path, sd1_keras: dict[str, Path], name: str) -> None:
    file = zipped(place, (name, sd1_keras["image_encoder"].read_bytes()))
    refused(place, file, names=file, reason=f"without `{INSIDE}`")


def test_archive_of_a_pickle(place: Path) -> None:
    file = zipped(place, ("archive/data.pkl", b"\x80\x02}."))
    refused(place, file, names=file, reason="no named tensors")


def test_empty_archive(place: Path) -> None:
    file = zipped(place)
    refused(place, file, names=file, reason="")


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"\x89HDF\r\n\x1a\n"], ids=["empty", "html", "signature"]
)
def test_archive_of_something_else(place: Path, content: bytes) -> None:
    file = zipped(place, (INSIDE, content))
    refused(place, file, names=file, reason="not an HDF5 file|truncated")


def test_archive_that_is_compressed(place: Path) -> None:
    bomb = b"\x89HDF\r\n\x1a\n" + bytes(64 << 20)
    file = zipped(place, (INSIDE, bomb), compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 20
    refused(place, file, names=file, reason="compressed")


def test_archive_with_its_weights_twice(place: Path, sd1_keras: dict[str, Path]) -> None:
    content = sd1_keras["image_encoder"].read_bytes()
    file = zipped(place, (INSIDE, content), (INSIDE, content))
    refused(place, file, names=file, reason="twice")


def patched(file: Path, old: bytes, new: bytes, which: int) -> None:
    """Replace one occurrence of some bytes, counted from the front or (negative) from the back."""
    content = file.read_bytes()
    start = content.find(old) if which == 0 else content.rfind(old)
    assert start >= 0
    file.write_bytes(content[:start] + new + content[start + len(old) :])


def test_archive_whose_directory_lies_about_the_name(place: Path, sd1_archive: Path) -> None:
    file = place / "model.keras"
    shutil.copyfile(sd1_archive, file)
    patched(file, INSIDE.encode(), b"other.weights.h5", which=0)
    refused(place, file, names=file, reason="disagree")


@pytest.mark.parametrize(
    ("offset", "value"), [(24, 1 << 31), (20, 1 << 31), (42, 1 << 31), (24, 100), (42, 7)]
)
def test_archive_whose_directory_lies_about_sizes(
    place: Path, sd1_archive: Path, offset: int, value: int
) -> None:
    """24: size, 20: stored size, 42: where the member begins (PKWARE APPNOTE 4.3.12)."""
    file = place / "model.keras"
    shutil.copyfile(sd1_archive, file)
    content = bytearray(file.read_bytes())
    entry = content.rfind(INSIDE.encode()) - 46
    struct.pack_into("<I", content, entry + offset, value)
    file.write_bytes(content)
    refused(place, file, names=file, reason="disagree|truncated|damaged|needed")


def test_archive_that_is_encrypted(place: Path, sd1_archive: Path) -> None:
    file = place / "model.keras"
    shutil.copyfile(sd1_archive, file)
    content = bytearray(file.read_bytes())
    content[content.rfind(INSIDE.encode()) - 46 + 8] |= 1
    file.write_bytes(content)
    refused(place, file, names=file, reason="encrypted")


def test_archive_whose_hdf5_leads_elsewhere(
    place: Path, sd1_keras: dict[str, Path], canary: Path
) -> None:
    inside = edited(
        sd1_keras["image_encoder"], place, lambda opened: external_group(opened, canary)
    )
    file = zipped(place, (INSIDE, inside.read_bytes()))
    refused(place, file, names=file, reason=LEADS[external_group])


# ---- sharded Keras weights


@pytest.fixture
def shards(place: Path, sd1_keras: dict[str, Path]) -> Path:
    """The image encoder in two shards; the path of its `.weights.json`."""
    folder = place / "sharded"
    folder.mkdir()
    weight_map: dict[str, str] = {}
    with h5py.File(sd1_keras["image_encoder"]) as whole:
        for number, name in enumerate(whole["layers"]):
            shard = f"model_{number % 2:05d}.weights.h5"
            with h5py.File(folder / shard, "a") as part:
                whole.copy(f"layers/{name}", part, f"layers/{name}")
            weight_map[f"/layers/{name}"] = shard
    index = folder / "model.weights.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def reindexed(index: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(index.read_text(encoding="utf-8"))
    change(document["weight_map"])
    index.write_text(json.dumps(document), encoding="utf-8")


def test_shards_are_read(place: Path, shards: Path) -> None:
    assert run("convert", shards, "-o", place / "out").status == 0


@pytest.mark.parametrize(
    "name",
    [
        "../secret.h5",
        "/etc/hostname",
        "sub/x.h5",
        "..",
        ".",
        "",
        "a\x00b.h5",
        "../cwd/../secret.h5",
    ],
)
def test_shard_names_lead_nowhere(place: Path, shards: Path, canary: Path, name: str) -> None:
    reindexed(shards, lambda weights: weights.update({next(iter(weights)): name}))
    refused(place, shards, names=shards, reason="not a plain file name")


def test_shard_that_is_missing(place: Path, shards: Path) -> None:
    (shards.parent / "model_00001.weights.h5").unlink()
    refused(
        place,
        shards,
        names="model_00001.weights.h5",
        reason="cannot be opened|missing|no such file",
    )


def test_shard_that_is_truncated(place: Path, shards: Path) -> None:
    shard = shards.parent / "model_00001.weights.h5"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(place, shards, names=shard, reason="truncated")


def test_shard_that_is_not_listed(place: Path, shards: Path) -> None:
    reindexed(
        shards,
        lambda weights: [
            weights.pop(key) for key, shard in list(weights.items()) if "00001" in shard
        ],
    )
    refused(place, shards, names=shards, reason="missing")


def test_shard_without_what_the_index_says(place: Path, shards: Path) -> None:
    reindexed(shards, lambda weights: weights.update({"/layers/dense": "model_00000.weights.h5"}))
    refused(place, shards, names=shards, reason="/layers/dense")


def test_shards_that_overlap(place: Path, shards: Path) -> None:
    shutil.copyfile(shards.parent / "model_00000.weights.h5", shards.parent / "again.weights.h5")
    reindexed(shards, lambda weights: weights.update({"/layers/again": "again.weights.h5"}))
    refused(place, shards, names=shards, reason="in two shards")


def test_shard_that_leads_elsewhere(place: Path, shards: Path, canary: Path) -> None:
    shard = shards.parent / "model_00000.weights.h5"
    with h5py.File(shard, "r+") as opened:
        opened["elsewhere"] = h5py.ExternalLink(str(canary), "/vars")
    refused(place, shards, names=shard, reason="external link")


# ---- diffusers repos, as a source and as a base


@pytest.fixture
def repo(place: Path) -> Path:
    return write_repo(place / "repo", "sd1", components=("vae",))


VAE = f"vae/{STEMS['vae']}.safetensors"


def resaved(repo: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    state = load_file(repo / VAE)
    change(state)
    save_file(state, repo / VAE)


def as_base(place: Path, base: Path, half: Path, names: str | Path, reason: str) -> None:
    """Refused as a base, and as a source."""
    refused(place, half, "--base", base, names=names, reason=reason)
    refused(place, base, names=names, reason=reason)


def test_base_with_two_tensors(place: Path, repo: Path, sd1_keras: dict[str, Path]) -> None:
    def keep_two(state: dict[str, np.ndarray]) -> None:
        for key in list(state)[2:]:
            del state[key]

    resaved(repo, keep_two)
    as_base(place, repo, sd1_keras["decoder"], names=repo, reason="not recognised.*missing")


def test_base_that_lacks_a_tensor(place: Path, repo: Path, sd1_keras: dict[str, Path]) -> None:
    resaved(repo, lambda state: state.pop("encoder.conv_in.bias"))
    as_base(place, repo, sd1_keras["decoder"], names=repo, reason="missing: encoder.conv_in.bias")


def test_base_with_one_tensor_more(place: Path, repo: Path, sd1_keras: dict[str, Path]) -> None:
    resaved(repo, lambda state: state.update({"discriminator.weight": np.zeros(3, "f4")}))
    as_base(
        place, repo, sd1_keras["decoder"], names=repo, reason="not part of .*discriminator.weight"
    )


def test_base_with_a_wrong_shape(place: Path, repo: Path, sd1_keras: dict[str, Path]) -> None:
    resaved(repo, lambda state: state.update({"encoder.conv_in.bias": np.zeros(3, "f4")}))
    as_base(
        place,
        repo,
        sd1_keras["decoder"],
        names=repo,
        reason=r"encoder.conv_in.bias.* wrong shape \[3\]",
    )


def test_base_of_integers(place: Path, repo: Path, sd1_keras: dict[str, Path]) -> None:
    resaved(repo, lambda state: state.update({"encoder.conv_in.bias": np.zeros(32, "i8")}))
    as_base(place, repo, sd1_keras["decoder"], names=repo, reason="encoder.conv_in.bias.*I64")


def test_base_of_another_family(place: Path, sd1_keras: dict[str, Path], sd2_repo: Path) -> None:
    file = sd1_keras["text_encoder"]
    refused(place, file, "--base", sd2_repo, names=file, reason="not of one family")


def test_base_that_is_a_git_lfs_pointer(
    place: Path, repo: Path, sd1_keras: dict[str, Path]
) -> None:
    (repo / VAE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 334643268\n"
    )
    as_base(place, repo, sd1_keras["decoder"], names=repo / VAE, reason="git-lfs")


def refused_when_written(place: Path, *sources: str | Path, names: Path, reason: str) -> None:
    """Like `refused`, for what only a real run looks at."""
    before = listing(place)
    assert_refused(run("convert", *sources, "-o", place / "out"), names, reason)
    assert listing(place) == before


JSONS = {
    "cut": "{", "list": "[]", "nan": '{"a": NaN}', "deep": '{"a":' * 100_000, "nul": "\x00", "text": '"text"',
    "twice": '{"a": 1, "a": 2}', "empty": "", "huge": '{"a": "' + "x" * (2 << 20) + '"}',
}  # fmt: skip


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize(
    "config", ["vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_repo_whose_config_is_damaged(place: Path, sd1_repo: Path, config: str, name: str) -> None:
    component = "vae" if config.startswith("vae") else "unet"
    repo = place / "repo"
    shutil.copytree(
        sd1_repo,
        repo,
        ignore=shutil.ignore_patterns(*({"vae", "unet", "text_encoder"} - {component})),
    )
    (repo / "scheduler").mkdir()
    (repo / config).write_text(JSONS[name])
    refused_when_written(place, repo, names=repo / config, reason="JSON|there twice|at most")


def test_repo_whose_config_disagrees_with_its_weights(place: Path, repo: Path) -> None:
    path = repo / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"block_out_channels": [128, 256, 512, 512]}))
    reason = (
        r"`block_out_channels` is \[128, 256, 512, 512\], but the weights have \[32, 64, 96, 96\]"
    )
    refused_when_written(place, repo, names=path, reason=reason)


@pytest.mark.parametrize(
    "name", ["os.system", "EulerDiscreteScheduler; x", "", 5, ["x"], "UNet2DConditionModel"]
)
def test_repo_whose_scheduler_is_none(place: Path, sd1_repo: Path, name: object) -> None:
    repo = place / "repo"
    shutil.copytree(sd1_repo, repo, ignore=shutil.ignore_patterns("vae", "text_encoder"))
    path = repo / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"_class_name": name}))
    refused_when_written(place, repo, names=path, reason="which is no scheduler")


@pytest.mark.parametrize(
    "name", ["vae/config.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json", VAE]
)
def test_repo_that_links_elsewhere(place: Path, sd1_repo: Path, canary: Path, name: str) -> None:
    """A cloned repo can hold links; what they lead to must not end up in the output, which may be
    published."""
    repo = place / "repo"
    shutil.copytree(sd1_repo, repo)
    file = repo / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if name == VAE:
        canary = place / "secret.safetensors"
        shutil.copyfile(sd1_repo / VAE, canary)
    file.symlink_to(canary)
    refused_when_written(place, repo, names=file, reason="a link that leads out of the repo")


def test_hub_cache_is_read(place: Path, repo: Path) -> None:
    """There, every file is a link to a blob beside the snapshots."""
    model = place / "models--org--name"
    snapshot = model / "snapshots" / "0123abcd"
    (model / "blobs").mkdir(parents=True)
    for number, file in enumerate([path for path in repo.rglob("*") if path.is_file()]):
        link = snapshot / file.relative_to(repo)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(model / "blobs" / str(number))
        link.symlink_to(
            Path("../" * len(link.parent.relative_to(model).parts)) / "blobs" / str(number)
        )
    assert run("convert", snapshot, "-o", place / "out").status == 0


@pytest.mark.parametrize("folder", ["missing", "empty", "file"])
def test_base_that_is_nothing(place: Path, sd1_keras: dict[str, Path], folder: str) -> None:
    (place / "empty").mkdir()
    (place / "file").write_bytes(b"")
    refused(
        place,
        sd1_keras["decoder"],
        "--base",
        place / folder,
        names=place / folder,
        reason="no such folder|neither",
    )


def sharded(repo: Path) -> Path:
    """Put the VAE of a repo into two shards; the path of their index."""
    state = load_file(repo / VAE)
    (repo / VAE).unlink()
    names = [f"{STEMS['vae']}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {key: names[number % 2] for number, key in enumerate(state)}
    for name in names:
        save_file(
            {key: state[key] for key in state if weight_map[key] == name}, repo / "vae" / name
        )
    index = repo / "vae" / f"{STEMS['vae']}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.safetensors",
        "/etc/hostname",
        "..\\x.safetensors",
        "sub/x.safetensors",
        "x\ny.safetensors",
    ],
)
def test_index_that_leads_elsewhere(
    place: Path, repo: Path, sd1_keras: dict[str, Path], name: str
) -> None:
    index = sharded(repo)
    reindexed(index, lambda weights: weights.update(dict.fromkeys(weights, name)))
    as_base(
        place, repo, sd1_keras["decoder"], names=index, reason="not a plain .safetensors file name"
    )


def test_index_that_names_an_absent_shard(
    place: Path, repo: Path, sd1_keras: dict[str, Path]
) -> None:
    index = sharded(repo)
    reindexed(index, lambda weights: weights.update({"encoder.conv_in.bias": "other.safetensors"}))
    as_base(
        place, repo, sd1_keras["decoder"], names=index, reason="missing|does not hold|also holds"
    )


def test_index_that_disagrees_with_its_shards(
    place: Path, repo: Path, sd1_keras: dict[str, Path]
) -> None:
    index = sharded(repo)
    reindexed(index, lambda weights: weights.pop("encoder.conv_in.bias"))
    as_base(
        place, repo, sd1_keras["decoder"], names=index, reason="also holds `encoder.conv_in.bias`"
    )


# ---- TensorFlow folders


def saved_model(place: Path, **files: str) -> Path:
    folder = place / "model"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"")
    for name, content in files.items():
        (folder / "variables" / f"variables.{name}").write_text(content)
    return folder


@pytest.mark.parametrize(
    "files", [{}, {"index": "version https://git-lfs.github.com/spec/v1\noid"}, {"index": ""}]
)
def test_saved_model_without_an_index(place: Path, files: dict[str, str]) -> None:
    folder = saved_model(place, **files)
    refused(place, folder, names=folder, reason="variables.index")
