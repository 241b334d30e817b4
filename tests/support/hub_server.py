"""A Hub on loopback: the part of the HTTP API that the real `huggingface_hub` client uses, served
from memory.

    with HubServer() as hub:
        subprocess.run([...], env=os.environ | hub.environment(home))

`hub.requests` is the log of what was asked and how many bytes went either way; `hub.faults` are
what goes wrong. Model repos only; no Xet. The API: <https://huggingface.co/docs/hub/api>, git-lfs'
batch.md, and the client's sources.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PurePosixPath
from socketserver import ThreadingTCPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

TOKEN = "hf_test"
_LFS = (".safetensors", ".bin", ".ckpt", ".h5", ".png")
_ATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS
).encode()
_BLOCK = 1 << 16  # bytes sent or received at once


# --- what the Hub keeps ---------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file of a commit; large ones are kept by git-lfs."""

    content: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:
        """What git calls the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What the client compares its own content with, and the ETag."""
        return hashlib.sha256(self.content).hexdigest() if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """One state of a repo."""

    title: str
    parent: str | None
    files: Mapping[str, File]


@dataclass
class Repo:
    """A model repo with its whole history."""

    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)  # users who may read a gated repo
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch, tag or refs/pr/N -> commit id

    def commit(self, ref: str, title: str, files: Mapping[str, File]) -> str:
        """A new commit on a ref; returns its id."""
        parent = self.refs.get(ref)
        text = json.dumps(
            [parent, title, len(self.commits), {path: file.oid for path, file in files.items()}]
        )
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(title, parent, dict(sorted(files.items())))
        self.refs[ref] = oid
        return oid

    def history(self, ref: str = "main") -> list[Commit]:
        """The commits of a ref, newest first."""
        found, oid = [], self.refs.get(ref)
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found

    def files(self, ref: str = "main") -> dict[str, bytes]:
        """Path -> content at a ref."""
        return {path: file.content for path, file in self.commits[self.refs[ref]].files.items()}


@dataclass
class Request:
    """An entry of the log."""

    method: str
    path: str
    status: int = 0  # 0: the connection was dropped before an answer
    sent: int = 0  # bytes of the answer's body
    received: int = 0  # bytes of the request's body


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path a pattern is found in.

    status: answer with this, and do nothing of what was asked.
    headers: set in the answer; a wrong `ETag`, or the `Retry-After` of a status.
    cut: drop the connection after so many bytes of the body: the answer's for a download, the
    request's for an upload. short: leave out so many bytes at the end of the body, with a
    Content-Length that hides it. delay: seconds to wait before answering.
    """

    method: str
    pattern: str
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    short: int = 0
    delay: float = 0


# --- requests and answers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200


def _json(content: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(content).encode(), {"Content-Type": "application/json"}, status)


class Refusal(Exception):
    """An error as the Hub reports it: the client reads the headers."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(json.dumps({"error": message}).encode(), named | headers, status)


@dataclass(frozen=True)
class Call:
    """A request to one endpoint."""

    user: str | None
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class HubServer:
    """The server; a context manager that serves in threads of its own.

    Args:
        part_size: larger uploads go up in parts of so many bytes.

    Attributes:
        tokens: access token -> user; a user's own namespace and the organisations named in `orgs`
            are theirs to write.
    """

    def __init__(self, part_size: int = 1 << 20) -> None:
        self.tokens = {TOKEN: "tester", "hf_other": "other"}
        self.orgs = {"org": {"tester"}}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # what git-lfs has, by sha256; complete objects only
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._part_size = part_size
        self._parts: dict[tuple[str, int], bytes] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What makes a client of a new process come here, with its cache below `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
        }

    def add(
        self, repo_id: str, files: Mapping[str, bytes], ref: str = "main", **options: Any
    ) -> str:
        """Make a repo, or a commit in one, without any request; returns the commit's id."""
        repo = self.repos.setdefault(repo_id, Repo(**options))
        new = {path: File(content, path.endswith(_LFS)) for path, content in files.items()}
        self.objects |= {file.oid: file.content for file in new.values() if file.lfs}
        old = repo.commits[repo.refs[ref]].files if ref in repo.refs else {}
        return repo.commit(ref, "add", {**old, **new})

    def add_folder(self, repo_id: str, folder: Path, **options: Any) -> str:
        """`add` every file of a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return self.add(
            repo_id,
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths},
            **options,
        )

    def downloads(self) -> dict[str, int]:
        """Path in its repo -> bytes sent, of every file that was fetched."""
        found: dict[str, int] = {}
        for request in self.requests:
            match = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", request.path)
            if match and request.method == "GET":
                found[match[1]] = found.get(match[1], 0) + request.sent
        return found

    # --- dispatch

    def answer(self, method: str, path: str, headers: Message, body: bytes) -> Answer:
        """The answer to a request. Paths are matched while still quoted: a revision may hold a
        slash."""
        try:
            url = urlsplit(path)
            user = self._user(headers)
            for verb, pattern, endpoint in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and method in verb.split():
                    with self._lock:
                        parts = [unquote(part) if part else "" for part in match.groups()]
                        return endpoint(
                            self, Call(user, parse_qs(url.query), headers, body), *parts
                        )
            raise Refusal(404, f"no such endpoint: {method} {path}")
        except Refusal as refusal:
            return refusal.answer

    def fault(self, method: str, path: str) -> Fault | None:
        """The first fault that applies, used up once."""
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def _user(self, headers: Message) -> str | None:
        kind, _, token = (headers.get("Authorization") or "").partition(" ")
        if kind == "Basic":  # of a Space, not of a user
            return None
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _repo(self, call: Call, repo_id: str, write: bool = False) -> Repo:
        owner = repo_id.split("/")[0]
        member = call.user is not None and call.user in {owner, *self.orgs.get(owner, ())}
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not member):
            raise Refusal(401 if call.user is None else 404, "Repository not found", "RepoNotFound")
        if write and not member:
            raise Refusal(403, f"You have no write access to {repo_id}")
        return repo

    def _at(self, repo: Repo, revision: str) -> str:
        oid = repo.refs.get(revision or "main", revision)
        if oid not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # --- who a visitor of a Space is: OpenID

    def space_environment(self) -> dict[str, str]:
        """What the Hub gives a Space whose visitors may log in."""
        return {
            "SYSTEM": "spaces",
            "OPENID_PROVIDER_URL": self.endpoint,
            "OAUTH_CLIENT_ID": "space",
            "OAUTH_CLIENT_SECRET": "a secret of 32 bytes, at the least",
            "OAUTH_SCOPES": "openid profile contribute-repos",
        }

    def _openid(self, call: Call) -> Answer:
        places = {"authorization": "authorize", "token": "token"}
        return _json(
            {"issuer": self.endpoint, "jwks_uri": f"{self.endpoint}/oauth/keys"}
            | {"id_token_signing_alg_values_supported": ["HS256"]}
            | {f"{name}_endpoint": f"{self.endpoint}/oauth/{at}" for name, at in places.items()}
        )

    def _authorize(self, call: Call) -> Answer:
        """Send the visitor back at once, as one who has said yes."""
        asked = {name: values[0] for name, values in call.query.items()}
        back = {"code": asked["nonce"], "state": asked["state"]}
        joined = "&" if "?" in asked["redirect_uri"] else "?"
        return Answer(
            headers={"Location": f"{asked['redirect_uri']}{joined}{urlencode(back)}"}, status=302
        )

    def _keys(self, call: Call) -> Answer:
        secret = self.space_environment()["OAUTH_CLIENT_SECRET"].encode()
        return _json({"keys": [{"kty": "oct", "k": _base64(secret), "kid": "1", "alg": "HS256"}]})

    def _token(self, call: Call) -> Answer:
        """The token of `tester`, who logs in."""
        given = self.space_environment()
        (nonce,) = parse_qs(call.body.decode())["code"]
        now = int(time.time())
        claims: dict[str, Any] = {"iat": now, "exp": now + 600, "nonce": nonce}
        claims |= {"iss": self.endpoint, "sub": "1", "aud": given["OAUTH_CLIENT_ID"]}
        claims |= {"name": "Tester", "preferred_username": "tester"}
        claims |= {"profile": f"{self.endpoint}/tester", "picture": f"{self.endpoint}/x.png"}
        parts = [{"alg": "HS256", "typ": "JWT", "kid": "1"}, claims]
        signed = ".".join(_base64(json.dumps(part).encode()) for part in parts)
        secret = given["OAUTH_CLIENT_SECRET"].encode()
        signature = _base64(hmac.digest(secret, signed.encode(), "sha256"))
        content = {"access_token": TOKEN, "token_type": "bearer", "expires_in": 600}
        return _json(
            {**content, "scope": given["OAUTH_SCOPES"], "id_token": f"{signed}.{signature}"}
        )

    # --- accounts and repos

    def _whoami(self, call: Call) -> Answer:
        if call.user is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"name": name} for name, members in self.orgs.items() if call.user in members]
        return _json({"type": "user", "name": call.user, "orgs": orgs})

    def _create(self, call: Call) -> Answer:
        asked = call.json
        owner = asked.get("organization") or call.user
        repo_id = f"{owner}/{asked['name']}"
        if call.user not in {owner, *self.orgs.get(owner, ())} or call.user is None:
            raise Refusal(
                401 if call.user is None else 403, f"You may not create a model under {owner}"
            )
        if repo_id in self.repos:
            content = {
                "error": "You already created this model repo",
                "url": f"{self.endpoint}/{repo_id}",
            }
            return _json(content, status=409)
        repo = self.repos[repo_id] = Repo(
            private=bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        repo.commit("main", "initial commit", {".gitattributes": File(_ATTRIBUTES, lfs=False)})
        return _json({"url": f"{self.endpoint}/{repo_id}"})

    def _branch(self, call: Call, repo_id: str, name: str) -> Answer:
        repo = self._repo(call, repo_id, write=True)
        if name in repo.refs:
            raise Refusal(409, f"Reference already exists: {name}")
        repo.refs[name] = self._at(repo, call.json.get("startingPoint", "main"))
        return Answer()

    def _validate_yaml(self, call: Call) -> Answer:
        found = re.match(r"---\n(.*?\n)---\n", call.json["content"], re.DOTALL)
        broken = [
            line
            for line in (found[1].splitlines() if found else [])
            if not re.match(r"[\w-]+:|- |\s*$", line)
        ]
        errors = [{"message": f"not a line of metadata: {line}"} for line in broken]
        return _json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    # --- reading

    def _info(self, call: Call, repo_id: str, revision: str) -> Answer:
        repo = self._repo(call, repo_id)
        oid = self._at(repo, revision)
        content = {
            "id": repo_id,
            "sha": oid,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
        }
        return _json(
            content
            | {"tags": [], "siblings": [{"rfilename": path} for path in repo.commits[oid].files]}
        )

    def _tree(self, call: Call, repo_id: str, revision: str, folder: str) -> Answer:
        repo = self._repo(call, repo_id)
        prefix = folder.rstrip("/") + "/" if folder else ""
        files = repo.commits[self._at(repo, revision)].files
        below = {path: file for path, file in files.items() if path.startswith(prefix)}
        if call.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            below = {
                path: file for path, file in below.items() if "/" not in path.removeprefix(prefix)
            }
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return _json([_entry(path, file) for path, file in below.items()])

    def _paths_info(self, call: Call, repo_id: str, revision: str) -> Answer:
        repo = self._repo(call, repo_id)
        files = repo.commits[self._at(repo, revision)].files
        paths = parse_qs(call.body.decode()).get("paths", [])
        return _json([_entry(path, files[path]) for path in paths if path in files])

    def _resolve(self, call: Call, repo_id: str, revision: str, path: str) -> Answer:
        repo = self._repo(call, repo_id)
        if repo.gated and call.user not in repo.granted:
            status = 401 if call.user is None else 403
            raise Refusal(
                status,
                f"Access to model {repo_id} is restricted: ask for it on its page",
                "GatedRepo",
            )
        oid = self._at(repo, revision)
        file = repo.commits[oid].files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
        if asked is None:
            return Answer(file.content, headers)
        size = len(file.content)
        first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        if first > last:
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return Answer(
            file.content[first : last + 1],
            headers | {"Content-Range": f"bytes {first}-{last}/{size}"},
            status=206,
        )

    # --- writing

    def _preupload(self, call: Call, repo_id: str, revision: str) -> Answer:
        repo = self._repo(call, repo_id, write="create_pr" not in call.query)
        files = repo.commits[self._at(repo, revision)].files
        modes = []
        for file in call.json["files"]:
            lfs = file["path"].endswith(_LFS) or file["size"] > 10_000_000
            oid = files[file["path"]].oid if file["path"] in files else None
            modes.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        return _json({"files": modes})

    def _batch(self, call: Call, repo_id: str) -> Answer:
        self._repo(call, repo_id)
        objects = []
        for wanted in call.json["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            href, header = f"{self.endpoint}/lfs/{oid}", {}
            if size > self._part_size:
                count = -(-size // self._part_size)
                header = {"chunk_size": str(self._part_size)} | {
                    str(n): f"{href}/{n}" for n in range(1, count + 1)
                }
            verify = {"href": f"{self.endpoint}/verify"}
            actions = {"actions": {"upload": {"href": href, "header": header}, "verify": verify}}
            objects.append({"oid": oid, "size": size} | ({} if oid in self.objects else actions))
        return _json({"transfer": "basic", "objects": objects})

    def _put(self, call: Call, oid: str, part: str) -> Answer:
        if part:
            self._parts[oid, int(part)] = call.body
            return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})
        return self._store(oid, call.body)

    def _complete(self, call: Call, oid: str) -> Answer:
        numbers = [part["partNumber"] for part in call.json["parts"]]
        return self._store(oid, b"".join(self._parts.pop((oid, number)) for number in numbers))

    def _store(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, f"the content of {oid} has another sha256")
        self.objects[oid] = content
        return Answer()

    def _verify(self, call: Call) -> Answer:
        if len(self.objects.get(call.json["oid"], b"")) != call.json["size"]:
            raise Refusal(404, "no such object")
        return Answer()

    def _commit(self, call: Call, repo_id: str, revision: str) -> Answer:
        pull_request = "create_pr" in call.query
        repo = self._repo(call, repo_id, write=not pull_request)
        if call.user is None:
            raise Refusal(401, "Invalid username or password.")
        parent = self._at(repo, revision)
        header, *operations = [json.loads(line) for line in call.body.splitlines()]
        asked = header["value"]
        if not parent.startswith(asked.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent].files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        ref, url = revision, {}
        if pull_request:
            number = next(n for n in itertools.count(1) if f"refs/pr/{n}" not in repo.refs)
            ref, url = (
                f"refs/pr/{number}",
                {"pullRequestUrl": f"{self.endpoint}/{repo_id}/discussions/{number}"},
            )
            repo.refs[ref] = parent
        oid = repo.commit(ref, asked["summary"], files)
        return _json(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}",
            }
            | url
        )

    def _apply(self, files: dict[str, File], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise Refusal(400, f"{path}: its content was not uploaded")
            files[path] = File(self.objects[value["oid"]], lfs=True)
        else:  # deletedFile, deletedFolder
            for gone in [name for name in files if PurePosixPath(name).is_relative_to(path)]:
                del files[gone]


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _entry(path: str, file: File) -> dict[str, Any]:
    size = len(file.content)
    entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": file.blob_id}
    return entry | (
        {"lfs": {"oid": file.oid, "size": size, "pointerSize": 134}} if file.lfs else {}
    )


_ID, _REV = r"([^/]+/[^/]+)", r"([^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/\.well-known/openid-configuration", HubServer._openid),
    ("GET", r"/oauth/authorize", HubServer._authorize),
    ("GET", r"/oauth/keys", HubServer._keys),
    ("POST", r"/oauth/token", HubServer._token),
    ("GET", r"/api/whoami-v2", HubServer._whoami),
    ("POST", r"/api/repos/create", HubServer._create),
    ("POST", r"/api/validate-yaml", HubServer._validate_yaml),
    ("GET", rf"/api/models/{_ID}(?:/revision/{_REV})?", HubServer._info),
    ("GET", rf"/api/models/{_ID}/tree/{_REV}(?:/(.+))?", HubServer._tree),
    ("POST", rf"/api/models/{_ID}/paths-info/{_REV}", HubServer._paths_info),
    ("POST", rf"/api/models/{_ID}/branch/{_REV}", HubServer._branch),
    ("POST", rf"/api/models/{_ID}/preupload/{_REV}", HubServer._preupload),
    ("POST", rf"/api/models/{_ID}/commit/{_REV}", HubServer._commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", HubServer._batch),
    ("PUT", r"/lfs/(\w+)(?:/(\d+))?", HubServer._put),
    ("POST", r"/lfs/(\w+)", HubServer._complete),
    ("POST", r"/verify", HubServer._verify),
    ("GET HEAD", rf"/{_ID}/resolve/{_REV}/(.+)", HubServer._resolve),
]


# --- the wire -------------------------------------------------------------------------------------


class _Server(ThreadingTCPServer):
    hub: HubServer
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away, or a connection dropped on purpose


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the hub answer it, and plays the faults."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        hub, entry = self.server.hub, Request(self.command, unquote(urlsplit(self.path).path))
        hub.requests.append(entry)
        fault = hub.fault(self.command, entry.path) or Fault("", "")
        body = b""
        for block in self._body():
            body += block
            entry.received = len(body)
            if fault.cut is not None and entry.received >= fault.cut and self.command != "GET":
                return self._drop()
        time.sleep(fault.delay)
        if fault.status is not None:
            answer = Answer(b"", fault.headers, fault.status)
        else:
            answer = hub.answer(self.command, self.path, self.headers, body)
            answer = Answer(answer.body, {**answer.headers, **fault.headers}, answer.status)
        content = answer.body[: len(answer.body) - fault.short]
        entry.status = answer.status
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        kept = content if fault.cut is None else content[: fault.cut]
        for start in range(0, len(kept), _BLOCK):
            block = kept[start : start + _BLOCK]
            self.wfile.write(block)
            entry.sent += len(block)
        return self._drop() if len(kept) < len(content) else None

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self) -> Iterator[bytes]:
        """The blocks of the request's body, of a stated length or in chunks."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            block = self.rfile.read(min(left, _BLOCK))
            if not block:
                raise ConnectionError("the client went away")
            left -= len(block)
            yield block

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
