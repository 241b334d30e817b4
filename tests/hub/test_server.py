"""The real `huggingface_hub` client, unmodified, downloads from and uploads to the Hub that the
tests bring along."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ..support.forks import run_python
from ..support.hub_server import TOKEN, Fault, HubServer

WEIGHTS = os.urandom(3_000_000)  # needs several parts, and several reads
FILES = {"config.json": b'{"a": 1}\n', "unet/model.safetensors": WEIGHTS, "unet/config.json": b"{}"}


_CLIENT = """
import json, sys
from huggingface_hub import CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
names = {**globals(), 'api': HfApi()}
try:
    exec(sys.argv[1], names)
    print(json.dumps({'result': names.get('result')}))
except Exception as error:
    print(json.dumps({'error': type(error).__name__}))
"""


def client(
    hub: HubServer, home: Path, code: str, token: str | None = TOKEN, **more: str
) -> dict[str, Any]:
    """Run code that uses `api`, a HfApi, and may set `result`: that, or the name of the error it
    ended in."""
    ended = run_python(_CLIENT, code, environment=hub.environment(home, token) | more)
    assert ended.status == 0, ended.err
    return dict(json.loads(ended.out))


def result(hub: HubServer, home: Path, code: str, **more: Any) -> Any:
    """What the code puts into `result`."""
    return client(hub, home, code, **more)["result"]


def failure(hub: HubServer, home: Path, code: str, **more: Any) -> str:
    """The name of the exception in which the code ends."""
    return str(client(hub, home, code, **more)["error"])


def complete(home: Path) -> dict[str, bytes]:
    """What a reader of the cache sees: the files of every snapshot, by name."""
    return {
        path.name: path.read_bytes() for path in home.glob("hub/*/snapshots/**/*") if path.is_file()
    }


SNAPSHOT = "result = snapshot_download('org/model')"
DOWNLOAD = "result = hf_hub_download('org/model', 'model.safetensors', subfolder='unet')"
UPLOAD = (
    "result = api.upload_folder(repo_id='org/model', folder_path={folder!r}, commit_message='all of"
    " it').oid"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files, on the disk."""
    for name, content in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path / "folder"


# ---- reading


def test_a_snapshot_and_its_cache(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("org/model", FILES)
    snapshot = Path(result(hub, tmp_path, SNAPSHOT))
    assert snapshot.name == commit
    assert {name: (snapshot / name).read_bytes() for name in FILES} == FILES
    assert hub.downloads() == {name: len(content) for name, content in FILES.items()}
    blob = (snapshot / "unet/model.safetensors").resolve()
    assert blob.name == hashlib.sha256(WEIGHTS).hexdigest()

    hub.requests.clear()
    assert result(hub, tmp_path, SNAPSHOT) == str(snapshot)
    assert hub.downloads() == {}

    hub.requests.clear()
    assert result(hub, tmp_path, SNAPSHOT, HF_HUB_OFFLINE="1") == str(snapshot)
    assert hub.requests == []


def test_revisions(hub: HubServer, tmp_path: Path) -> None:
    first = hub.add("org/model", {"a.txt": b"old"})
    second = hub.add("org/model", {"a.txt": b"new"})
    hub.repos["org/model"].refs |= {"v1.0": first, "refs/pr/7": second}
    code = (
        "result = {r: open(hf_hub_download('org/model', 'a.txt', revision=r)).read() for r in %r}"
    )
    revisions = {"main": "new", "v1.0": "old", "refs/pr/7": "new", first: "old"}
    assert result(hub, tmp_path, code % list(revisions)) == revisions


def test_what_is_there(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("org/model", FILES)
    code = """
info = api.model_info('org/model')
tree = {f.path: f.size for f in api.list_repo_tree('org/model', recursive=True)}
root = [f.path for f in api.list_repo_tree('org/model')]
paths = [f.path for f in api.get_paths_info('org/model', ['config.json', 'nothing'])]
exists = [api.file_exists('org/model', 'config.json'), api.repo_exists('org/nothing')]
result = [info.sha, sorted(s.rfilename for s in info.siblings), tree, root, paths, exists, api.whoami()['name']]
"""
    sizes = {name: len(content) for name, content in FILES.items()}
    assert result(hub, tmp_path, code) == [
        commit, sorted(FILES), sizes, ["config.json"], ["config.json"], [True, False], "tester",
    ]  # fmt: skip


def test_who_may_read(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/private", FILES, private=True)
    hub.add("org/gated", FILES, gated=True, granted={"tester"})
    one = "result = hf_hub_download(%r, 'config.json')"
    for repo in ("org/private", "org/gated"):
        assert result(hub, tmp_path / "mine", one % repo)
    for token in (None, "hf_other"):
        assert (
            failure(hub, tmp_path / "other", one % "org/private", token=token)
            == "RepositoryNotFoundError"
        )
        assert failure(hub, tmp_path / "other", one % "org/gated", token=token) == "GatedRepoError"
    assert complete(tmp_path / "other") == {}
    assert failure(hub, tmp_path, one % "org/nothing") == "RepositoryNotFoundError"
    assert (
        failure(hub, tmp_path, "hf_hub_download('org/gated', 'nothing')")
        == "RemoteEntryNotFoundError"
    )
    code = "hf_hub_download('org/gated', 'config.json', revision='nothing')"
    assert failure(hub, tmp_path, code) == "RevisionNotFoundError"


# ---- writing


def test_an_upload_is_one_commit(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    code = "api.create_repo('org/model', private=True, exist_ok=True)\n" + UPLOAD.format(
        folder=str(folder)
    )
    commit = result(hub, tmp_path, code)
    repo = hub.repos["org/model"]
    assert repo.private
    assert [entry.title for entry in repo.history()] == ["all of it", "initial commit"]
    assert repo.refs == {"main": commit}
    assert repo.files() == FILES | {".gitattributes": repo.files()[".gitattributes"]}
    assert [r.received for r in hub.requests if r.method == "PUT"] == [
        1 << 20,
        1 << 20,
        len(WEIGHTS) - (2 << 20),
    ]

    hub.requests.clear()
    assert result(hub, tmp_path, code) == commit, "nothing new, no commit"
    assert all(request.method != "PUT" for request in hub.requests)


def test_branches_pull_requests_and_deletions(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    base = hub.add(
        "tester/model", {"old.txt": b"old", "README.md": b"---\nlicense: mit\n---\n# Mine\n"}
    )
    code = f"""
where = dict(repo_id='tester/model', folder_path={str(folder)!r})
api.create_branch('tester/model', branch='next', exist_ok=True)
api.create_branch('tester/model', branch='next', exist_ok=True)
api.upload_folder(**where, revision='next')
opened = api.upload_folder(**where, create_pr=True)
api.create_commit('tester/model', [CommitOperationDelete('old.txt')], commit_message='away', revision='next')
result = [opened.pr_url, opened.pr_revision]
"""
    url, revision = result(hub, tmp_path, code)
    repo = hub.repos["tester/model"]
    assert (url, revision) == (f"{hub.endpoint}/tester/model/discussions/1", "refs/pr/1")
    assert repo.refs["main"] == base
    assert repo.files("refs/pr/1").keys() == {"old.txt", "README.md", *FILES}
    assert repo.files("next").keys() == {"README.md", *FILES}


def test_who_may_write(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.add("org/model", {"old.txt": b"old"})
    upload = UPLOAD.format(folder=str(folder))
    assert failure(hub, tmp_path, upload, token="hf_other") == "HfHubHTTPError"
    assert (
        failure(hub, tmp_path, "api.create_repo('org/new')", token="hf_other") == "HfHubHTTPError"
    )
    assert failure(hub, tmp_path, "api.create_repo('org/new')", token=None) == "HfHubHTTPError"
    assert failure(hub, tmp_path, "api.create_repo('org/model')") == "HfHubHTTPError"
    broken = (
        "api.upload_file(repo_id='org/model', path_in_repo='README.md',"
        " path_or_fileobj=b'---\\n{\\n---\\n')"
    )
    assert failure(hub, tmp_path, broken) == "ValueError"
    assert set(hub.repos) == {"org/model"}
    assert len(hub.repos["org/model"].history()) == 1


# ---- what goes wrong


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "model.safetensors", cut=1_000_000),
        Fault("GET", "model.safetensors", cut=0),
        Fault("GET", "model.safetensors", status=429, headers={"Retry-After": "0"}),
        Fault("HEAD", "model.safetensors", status=500),
        Fault("HEAD", "model.safetensors", status=503, headers={"Retry-After": "0"}),
        Fault("GET", "model.safetensors", delay=0.2),
    ],
    ids=["dropped-midway", "dropped-at-once", "429", "500", "503", "slow"],
)
def test_a_download_gets_over(hub: HubServer, tmp_path: Path, fault: Fault) -> None:
    hub.add("org/model", FILES)
    hub.faults.append(fault)
    assert Path(result(hub, tmp_path, DOWNLOAD)).read_bytes() == WEIGHTS
    assert fault.times == 0, "the fault was met"


def test_a_download_goes_on_where_it_broke_off(hub: HubServer, tmp_path: Path) -> None:
    weights = WEIGHTS * 4  # the client writes blocks of 10 MiB
    hub.add("org/model", {"unet/model.safetensors": weights})
    hub.faults.append(Fault("GET", "model.safetensors", cut=11_000_000))
    assert Path(result(hub, tmp_path, DOWNLOAD)).read_bytes() == weights
    broken, resumed = [r for r in hub.requests if r.method == "GET" and "resolve" in r.path]
    assert (broken.status, broken.sent, resumed.status) == (200, 11_000_000, 206)
    assert resumed.sent < len(weights) / 4


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("GET", "model.safetensors", short=1), "OSError"),
        (Fault("GET", "model.safetensors", status=500), "HfHubHTTPError"),
        (Fault("GET", "model.safetensors", status=403), "HfHubHTTPError"),
        (Fault("HEAD", "model.safetensors", status=401), "HfHubHTTPError"),
    ],
    ids=["truncated", "500", "403", "401"],
)
def test_a_download_fails_and_leaves_nothing(
    hub: HubServer, tmp_path: Path, fault: Fault, error: str
) -> None:
    hub.add("org/model", FILES)
    hub.faults.append(fault)
    assert failure(hub, tmp_path, DOWNLOAD) == error
    assert complete(tmp_path) == {}
    assert Path(result(hub, tmp_path, DOWNLOAD)).read_bytes() == WEIGHTS, "and the next one works"


def test_a_wrong_etag_names_a_blob_but_spoils_no_file(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/model", FILES)
    wrong = {"ETag": '"' + "0" * 64 + '"', "X-Linked-Etag": '"' + "0" * 64 + '"'}
    hub.faults.append(Fault("HEAD", "model.safetensors", headers=wrong))
    path = Path(result(hub, tmp_path, DOWNLOAD))
    assert path.resolve().name == "0" * 64
    assert path.read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/lfs/", cut=100_000),
        Fault("PUT", "/lfs/", status=500),
        Fault("POST", "/lfs/", status=503, headers={"Retry-After": "0"}),
        Fault("POST", "objects/batch", status=429, headers={"Retry-After": "0"}),
    ],
    ids=["dropped", "500", "503", "429"],
)
def test_an_upload_gets_over(hub: HubServer, folder: Path, tmp_path: Path, fault: Fault) -> None:
    hub.add("org/model", {"old.txt": b"old"})
    hub.faults.append(fault)
    result(hub, tmp_path, UPLOAD.format(folder=str(folder)))
    assert fault.times == 0, "the fault was met"
    assert hub.repos["org/model"].files() == FILES | {"old.txt": b"old"}


@pytest.mark.parametrize(
    "fault", [Fault("POST", "/commit/", status=500), Fault("POST", "/commit/", cut=1)]
)
def test_an_upload_fails_and_the_repo_stays(
    hub: HubServer, folder: Path, tmp_path: Path, fault: Fault
) -> None:
    hub.add("org/model", {"old.txt": b"old"})
    hub.faults.append(fault)
    upload = UPLOAD.format(folder=str(folder))
    assert failure(hub, tmp_path, upload) in ("HfHubHTTPError", "RemoteProtocolError", "ReadError")
    assert hub.repos["org/model"].files() == {"old.txt": b"old"}
    hub.requests.clear()
    result(hub, tmp_path, upload)
    assert hub.repos["org/model"].files() == FILES | {"old.txt": b"old"}
    assert all(request.method != "PUT" for request in hub.requests), "the content was there already"
