"""A server that lies, echoes and stalls: nothing outside the cache, no token in any text, and calls
that end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weightport.hub.secrets import HIDDEN, hide, remember

from ..support.forks import run_python
from ..support.hub_server import TOKEN, Fault, HubServer

UP = "../../../../../../outside"

# Asks for each repo, and says what came of it and how long that took.
_CHILD = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import weightport.hub.client
from weightport.errors import ConversionError
weightport.hub.client.LONGEST_SILENCE = 1
from weightport.hub.upload import upload
from weightport.pull import fetch
from weightport.runtime.loading.source import open_source
how, *names = sys.argv[1:]


def ask(name):
    begin = time.monotonic()
    try:
        if how == "open":
            said = open_source(f"org/{name}").path("config.json").read_text()
        elif how == "fetch":
            said = str(fetch(f"hub:org/{name}/config.json"))
        else:
            files = {"config.json": b"{}", "model.safetensors": name.encode()}
            said = upload(files, f"org/{name}", message="all of it")
    except (ConversionError, OSError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    return name, said, time.monotonic() - begin


with ThreadPoolExecutor() as pool:  # most of the time they wait
    for answer in pool.map(ask, names):
        print(json.dumps(answer), flush=True)
"""


def asked(
    hub: HubServer, home: Path, how: str, names: list[str], **more: str
) -> tuple[dict[str, Any], str]:
    """What a process says that asks for repos, and all that it printed."""
    environment = hub.environment(home / "deep" / "below" / "home") | more
    ended = run_python(_CHILD, how, *names, environment=environment)
    assert ended.status == 0, ended.err
    lines = [json.loads(line) for line in ended.out.splitlines()]
    return {name: (said, seconds) for name, said, seconds in lines}, ended.out + ended.err


def answers(hub: HubServer) -> dict[str, str]:
    """Repos whose server lies -> what is said of it."""
    cases = {
        "etag": ("HEAD", {"ETag": f'"{UP}"'}, "ETag"),
        "linked": ("HEAD", {"X-Linked-ETag": f'"{UP}"'}, "ETag"),
        "commit": ("HEAD", {"X-Repo-Commit": UP}, "commit"),
        "redirect": ("HEAD", {"Location": "file:///etc/passwd"}, "redirect"),
        "elsewhere": ("GET", {"Location": "file:///etc/passwd"}, "redirect"),
    }
    for name, (method, headers, _) in cases.items():
        hub.add(f"org/{name}", {"config.json": b"{}"})
        hub.faults.append(Fault(method, f"org/{name}/resolve", 99, headers=headers))
    hub.add("org/name", {"config.json": b"{}", f"{UP}.json": b"{}"})
    commit = hub.add("org/hash", {"config.json": b"{}"})
    repo = hub.repos["org/hash"]
    repo.commits[UP] = repo.commits.pop(commit)
    repo.refs["main"] = UP
    return {
        **{name: reason for name, (_, _, reason) in cases.items()},
        "name": "file name",
        "hash": "commit",
    }


@pytest.mark.parametrize("how", ["open", "fetch"])
def test_what_makes_paths_is_checked(hub: HubServer, tmp_path: Path, how: str) -> None:
    reasons = answers(hub)
    hub.add("org/honest", {"config.json": b"{}"})
    said, _ = asked(hub, tmp_path, how, ["honest", *reasons])
    assert "Error" not in said["honest"][0]
    for name, reason in reasons.items():
        assert f"answers with a {reason} that is none" in said[name][0].replace("an ETag", "a ETag")
        assert "\n" not in said[name][0]
    cache = tmp_path / "deep" / "below" / "home"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert all(path.is_relative_to(cache) for path in written)
    assert not any("outside" in path.name for path in tmp_path.rglob("*"))


def test_no_token_in_any_text(hub: HubServer, tmp_path: Path) -> None:
    echo = {"X-Error-Message": f"Bearer {TOKEN} may not do this", "X-HF-Warning": f"x; {TOKEN}"}
    for name, status in (("echo", 403), ("odd", 418)):
        hub.add(f"org/{name}", {"config.json": b"{}"})
        hub.faults.append(Fault("HEAD", f"org/{name}/", 99, status=status, headers=echo))
        hub.faults.append(Fault("GET", f"org/{name}", 99, status=status, headers=echo))
        hub.faults.append(Fault("POST", f"org/{name}", 99, status=status, headers=echo))
    for how in ("open", "fetch", "push"):
        said, text = asked(hub, tmp_path, how, ["echo", "odd"])
        assert all("Error" in one for one, _ in said.values())
        assert TOKEN not in text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_a_server_that_stalls_or_asks_to_wait_ends_the_call(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/wait", {"config.json": b"{}"})
    hub.faults.append(Fault("HEAD", "org/wait", 99, status=429, headers={"Retry-After": "86400"}))
    hub.faults.append(Fault("POST", "org/wait", 99, status=429, headers={"Retry-After": "86400"}))
    hub.add("org/stall", {"config.json": b"{}"})
    for method in ("GET", "POST"):
        hub.faults.append(Fault(method, "org/stall|repos/create", 99, delay=2))
    limits = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    said, _ = asked(hub, tmp_path, "open", ["wait", "stall"], **limits)
    assert "asks to wait 86400 seconds" in said["wait"][0]
    assert "cannot be reached" in said["stall"][0]
    pushed, _ = asked(hub, tmp_path, "push", ["stall"], **limits)
    assert "connection failed" in pushed["stall"][0]
    for one, seconds in (*said.values(), *pushed.values()):
        assert seconds < 60, one


def test_a_push_to_a_server_that_lies_or_cuts_ends_in_one_line(
    hub: HubServer, tmp_path: Path
) -> None:
    """Whatever goes wrong on the way, no commit is there after it."""
    elsewhere = {"Location": "file:///etc/passwd"}
    cases = {
        "commit": (Fault("POST", "org/commit/", 99, headers={"X-Repo-Commit": UP}), "commit"),
        "etag": (Fault("POST", "org/etag/", 99, headers={"X-Linked-ETag": UP}), "ETag"),
        "moved": (Fault("POST", "org/moved/", 99, status=307, headers=elsewhere), "redirect"),
        "cut": (Fault("POST", "org/cut/", 99, cut=1), "connection failed"),
        "late": (Fault("POST", "org/late/commit", 99, cut=1), "connection failed"),
        "batch": (Fault("POST", "org/batch.git", 99, headers=elsewhere), "redirect"),
    }
    part = Fault("PUT", "/lfs/", 99, status=307, headers=elsewhere), "redirect"
    before = {name: hub.add(f"org/{name}", {"config.json": b"{ }"}) for name in (*cases, "part")}
    hub.faults += [fault for fault, _ in cases.values()]
    said, _ = asked(hub, tmp_path, "push", list(cases))
    hub.faults.append(part[0])
    said |= asked(hub, tmp_path, "push", ["part"])[0]
    for name, (_, reason) in (cases | {"part": part}).items():
        message, seconds = said[name]
        assert reason in message, message
        assert "\n" not in message
        assert seconds < 60
        assert hub.repos[f"org/{name}"].refs["main"] == before[name], name
    cache = tmp_path / "deep" / "below" / "home"
    assert all(path.is_relative_to(cache) for path in tmp_path.rglob("*") if path.is_file())


def test_tokens_are_known_by_form() -> None:
    secret = "hf_" + "a1B2" * 6
    remember("s3cret/token")
    shown = hide(f"{secret}, Bearer abc.def, https://me:pass@hub, s3cret/token, s3cret%2Ftoken")
    assert shown == (f"{HIDDEN}, Bearer {HIDDEN}, https://{HIDDEN}@hub, {HIDDEN}, {HIDDEN}")
    assert hide("hf_hub_download of main") == "hf_hub_download of main"
