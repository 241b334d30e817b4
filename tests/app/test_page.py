"""The page in a real browser, as its Space serves it to strangers: what a person without a terminal
does with it, and what others try."""

from __future__ import annotations

import re
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from safetensors.numpy import save_file

from ..support.command import run
from ..support.hub_server import TOKEN, HubServer
from ..support.page_server import ROOT, Page, Served, chromium, chromium_beside, space

pytestmark = pytest.mark.browser

TABS = ("Inspect", "Convert", "Compare", "Parity", "Try it", "Schedulers")
UNET = "model.unet.weights.h5"
SECRET = "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"


@dataclass
class Place:
    """Where all of this happens."""

    hub: HubServer
    server: Served
    browser: Any


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sd1_repo: Path) -> Iterator[Place]:
    """A Space, a Hub with the base that visitors name, and a browser."""
    folder = tmp_path_factory.mktemp("space")
    with HubServer() as hub:
        hub.add_folder("org/base", sd1_repo)
        hub.add("server/private", {"model.safetensors": b"x"}, private=True)
        hub.tokens[SECRET] = "server"
        environment = hub.environment(folder / "home", SECRET)
        with space(folder, **environment) as server, chromium() as browser:
            yield Place(hub, server, browser)
        errors = (folder / "errors").read_text()
        unexpected = [
            line for line in errors.splitlines() if re.match(r"[\w.]+(Error|Exception)", line)
        ]
        assert [line for line in unexpected if "InvalidPathError" not in line] == []
        assert TOKEN not in errors


@pytest.fixture
def page(place: Place) -> Iterator[Page]:
    """A visit."""
    with Page.visit(place.browser, place.server.url) as page:
        yield page


def plan(page: Page, base: str = "org/base") -> str:
    """Ask for the plan of the UNet with a base; what it says."""
    page.tab("Convert")
    page.tick("convert", UNET)
    page.fill("convert-base", base)
    page.click("convert-plan")
    return page.text("convert-evidence")


@pytest.mark.full
def test_a_unet_is_uploaded_looked_at_converted_downloaded_and_pushed(
    page: Page, place: Place, sd1_keras: dict[str, Path], sd1_repo: Path, tmp_path: Path
) -> None:
    page.upload(sd1_keras["unet"])
    page.tab("Inspect")
    page.tick("inspect", UNET)
    page.click("inspect-run")
    evidence = page.text("inspect-result")
    assert "686 of the 686 tensors of the KerasCV diffusion model v1 are there" in evidence
    assert "unet/ (UNet2DConditionModel) by the table kerascv_unet" in evidence
    page.photograph("inspect")
    page.tab("Convert")
    page.tick("convert", UNET)
    page.click("convert-run")
    assert "look at the plan of just these choices first" in page.text("convert-status")
    planned = plan(page)
    assert "unet 686 tensors from model.unet.weights.h5" in planned
    assert "It would write 50.01 MB of weights. Nothing is written yet." in planned
    page.click("convert-run")
    page.photograph("convert")
    archive = page.download(".wp-download", tmp_path)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    loaded_strictly(tmp_path / "converted" / "unet", sd1_repo / "unet")

    page.choose("convert-where", "Hugging Face Hub")
    page.fill("convert-repo", "org/made")
    page.choose("convert-unverified", "Push although parity has not been run")
    page.fill("convert-token", TOKEN)
    page.click("convert-run")
    pushed = place.hub.repos["org/made"]
    assert pushed.private
    state = (tmp_path / "converted" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert pushed.files()["unet/diffusion_pytorch_model.safetensors"] == state
    assert "Pushed" in page.text("convert-result")
    assert page.shown.locator("#convert-token input").input_value() == ""
    page.choose("convert-pr", "Open a pull request instead of committing")
    page.fill("convert-repo", "org/base")
    page.fill("convert-token", TOKEN)
    page.click("convert-run")
    base = place.hub.repos["org/base"]
    assert base.refs.keys() == {"main", "refs/pr/1"}, page.text("convert-status")
    kept = [path for path in place.server.kept if path.suffix not in {".safetensors", ".lock"}]
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)

    assert page.other_hosts == []
    page.close()
    assert place.server.kept == [], "a visit leaves nothing"


def loaded_strictly(folder: Path, expected: Path) -> None:
    """diffusers loads a component without a key too many or too few, the same as another one."""
    import torch
    from diffusers import UNet2DConditionModel

    unet, said = UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    other = UNet2DConditionModel.from_pretrained(expected).state_dict()
    state = unet.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_cancelled_in_mid_run_leaves_nothing(
    page: Page, place: Place, sd1_keras: dict[str, Path]
) -> None:
    page.upload(sd1_keras["unet"])
    plan(page)
    page.press("convert-run")
    worker = stopped_while_writing(place.server)
    page.shown.click("#convert-cancel")
    worker.resume()
    page.shown.get_by_text("cancelled; nothing was left behind").wait_for()
    assert not worker.is_running()
    kept = [path.name for path in place.server.kept if "/hub/" not in str(path)]
    assert kept == [UNET]
    page.click("convert-run")
    assert "Converted" in page.text("convert-result"), "the page goes on"


@pytest.mark.full
def test_two_browsers_wait_for_each_other(
    page: Page, place: Place, sd1_keras: dict[str, Path]
) -> None:
    """One conversion runs at a time; the other visitor sees how many come before, and then has the
    turn."""
    page.upload(sd1_keras["unet"])
    plan(page)
    page.press("convert-run")
    worker = stopped_while_writing(place.server)
    with chromium_beside(place.browser) as browser, Page.visit(browser, place.server.url) as other:
        other.upload(sd1_keras["unet"])
        plan(other)
        other.press("convert-run")
        other.shown.get_by_text("Waiting: 1 job comes before yours.").wait_for()
        assert "Converted" not in page.text("convert-result")
        worker.resume()
        for visit in (page, other):
            visit.ended("convert-run")
            assert "Converted" in visit.text("convert-result")


def stopped_while_writing(server: Served) -> psutil.Process:
    """The process of a conversion, stopped once it has begun to write its output."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(server.temporary.glob("weightport-app-*/sessions/*/out/.*partial/*/*")):
            (worker,) = psutil.Process(server.process.pid).children()
            worker.send_signal(signal.SIGSTOP)
            return worker
        time.sleep(0.002)
    raise AssertionError("nothing was written")


@pytest.mark.full
def test_two_visits_do_not_see_each_other(
    page: Page, place: Place, sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    with Page.visit(place.browser, place.server.url) as other:
        page.upload(sd1_keras["unet"])
        save_file({"mine": np.ones(3)}, tmp_path / "mine.safetensors")
        both = shutil.copyfile(sd1_keras["unet"], tmp_path / UNET)
        other.upload(tmp_path / "mine.safetensors", both)
        assert page.shown.locator("#inspect-uploads label").all_inner_texts() == [UNET]
        assert len(place.server.folders) == 2
        other.tab("Inspect")
        other.tick("inspect", UNET)
        other.click("inspect-run")
        assert "686 of the 686" in other.text("inspect-result")
        other.close()
        assert len(place.server.folders) == 1
    page.tab("Inspect")
    page.tick("inspect", UNET)
    page.click("inspect-run")
    assert "686 of the 686" in page.text("inspect-result"), "its own copy is still there"


def test_hostile_files_give_the_lines_of_the_command(
    page: Page, sd1_keras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hostile(tmp_path / "hostile", sd1_keras["decoder"].read_bytes())
    assert len(files) == 30
    page.shown.on("dialog", lambda dialog: pytest.fail(f"a file spoke: {dialog.message}"))
    page.upload(*files)
    page.tab("Inspect")
    for file in files:
        page.tick("inspect", file.name)
    page.click("inspect-run")
    said = page.text("inspect-result")
    monkeypatch.chdir(tmp_path / "hostile")
    for file in files:
        ended = run("inspect", file.name)
        line = ended.err.removeprefix("error: ").strip()
        if ended.status:
            assert f"Error: {line}" in said, file.name
    markup = "<img src=x onerror=alert(1)>${alert(2)}{{value}}"
    assert markup in said
    assert page.shown.locator("#inspect-result img").count() == 0
    assert page.other_hosts == []


def hostile(folder: Path, whole: bytes) -> list[Path]:
    """Thirty files that no honest program writes."""
    folder.mkdir()
    contents = {f"cut-{size}.h5": whole[:size] for size in (0, 1, 8, 100, 1000, 10_000)}
    for at in range(8, 8 + 10 * 16, 16):
        contents[f"flipped-{at}.h5"] = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
    lengths = {"none": 0, "huge": 2**63 - 1, "beyond": 10**9, "short": 1}
    for name, length in lengths.items():
        contents[f"{name}.safetensors"] = length.to_bytes(8, "little") + b"{}"
    contents |= {
        "list.safetensors": (2).to_bytes(8, "little") + b"[]",
        "deep.safetensors": (40_000).to_bytes(8, "little") + b"[" * 40_000,
        "global.ckpt": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00exitq\x00\x85R.",
        "endless.ckpt": b"\x80\x02" + b"(" * 100_000,
        "text.ckpt": b"this is no checkpoint",
        "bomb.keras": b"PK\x05\x06" + b"\xff" * 18,
        "empty.zip": b"PK\x05\x06" + b"\0" * 18,
        "json.py": b"raise SystemExit('executed')",
        "numpy.py": b"raise SystemExit('executed')",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    name = "<img src=x onerror=alert(1)>${alert(2)}{{value}}"
    save_file({name: np.ones(2), f"a.{name}": np.ones(2)}, folder / "markup.safetensors")
    return sorted(folder.iterdir())


PATHS = ("/etc/passwd", "../../../etc/passwd", "~/.ssh/id_rsa", "pyproject.toml", str(ROOT))


def test_no_path_of_the_server_is_read(page: Page, place: Place) -> None:
    page.tab("Inspect")
    for path in PATHS:
        page.fill("inspect-elsewhere", path)
        page.click("inspect-run")
        assert "files of this server are not read" in page.text("inspect-status"), path
    page.tab("Convert")
    page.fill("convert-elsewhere", "org/base")
    page.fill("convert-base", "/etc")
    page.click("convert-plan")
    assert "files of this server are not read" in page.text("convert-planned")
    assert page.shown.locator("#convert-where").get_by_text("Folder on this machine").count() == 0
    page.tab("Inspect")
    page.fill("inspect-elsewhere", "server/private/model.safetensors")
    page.click("inspect-run")
    assert "server/private" in page.text("inspect-result")
    assert "no such repo" in page.text("inspect-result"), "the server's own token is not used"


def test_nothing_else_is_served(page: Page, place: Place, sd1_keras: dict[str, Path]) -> None:
    page.upload(sd1_keras["unet"])
    (upload,) = (path for path in place.server.kept if path.name == UNET)
    results = "results/x/../../../../../etc"
    own = ROOT / "pyproject.toml"
    refused = [
        *(f"gradio_api/file={path}" for path in ("/etc/passwd", upload, own, "http://127.0.0.1/")),
        *(f"gradio_api/file/{path}" for path in ("/etc/passwd", upload)),
        f"gradio_api/proxy={place.hub.endpoint}/api/models/org/base",
        f"gradio_api/file%3D{upload}",
        f"file={upload}",
        "results/a/b/c",
        f"results/{upload.parts[-3]}/..%2Fuploads/{UNET}",
        f"results/{upload.parts[-3]}/uploads/{UNET}",
        f"{results}/passwd",
        "static/../../../../etc/passwd",
        "assets/..%2F..%2F..%2F..%2F..%2Fetc%2Fpasswd",
        "svelte/..%2F..%2F..%2F..%2Fetc%2Fpasswd",
        "custom_component/x/client/component/../../../etc/passwd",
        "monitoring",
        "gradio_api/info",
        "gradio_api/openapi.json",
        "gradio_api/mcp/sse",
    ]
    for address in refused:
        answer = page.shown.request.get(place.server.url + address)
        assert answer.status in (403, 404), (address, answer.status)
        assert b"root:" not in answer.body()


@pytest.mark.full
@pytest.mark.parametrize("path", ["/etc/passwd", "{upload}", "{arrivals}/x/model.h5"])
def test_an_event_cannot_name_a_file(
    page: Page, place: Place, sd1_keras: dict[str, Path], path: str
) -> None:
    """What the page's own events say of uploads is checked, too: a path outside, or another's."""
    with Page.visit(place.browser, place.server.url) as other:
        other.upload(sd1_keras["unet"])
        (upload,) = (one for one in place.server.kept if one.name == UNET)
        arrivals = upload.parents[3] / "arrivals"
        assert arrivals.is_dir()
        stolen = path.format(upload=upload, arrivals=arrivals)
        config = page.shown.request.get(f"{place.server.url}config").json()
        ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
        (event,) = (
            one for one in config["dependencies"] if one["targets"] == [[ids["upload"], "upload"]]
        )
        file = {"path": stolen, "meta": {"_type": "gradio.FileData"}, "orig_name": "x"}
        said = page.shown.evaluate(SEND, [event["id"], [file]])
        assert '"success":false' in said or "did not arrive; upload it again" in said
        assert UNET not in said
        assert upload.is_file()


SEND = """async ([event, files]) => {
    const session_hash = "stranger";
    const data = {data: [files], fn_index: event, session_hash, trigger_id: null, event_data: null};
    await fetch("gradio_api/queue/join", {
        method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(data),
    });
    const stream = await fetch("gradio_api/queue/data?session_hash=" + session_hash);
    const reader = stream.body.getReader();
    let said = "";
    while (!said.includes("process_completed")) {
        const {value, done} = await reader.read();
        if (done) break;
        said += new TextDecoder().decode(value);
    }
    return said;
}"""


@pytest.mark.full
def test_the_keyboard_reaches_everything_and_labels_say_what_it_is(page: Page) -> None:
    unnamed = page.shown.evaluate(UNNAMED)
    assert unnamed == []
    page.shown.locator("body").click(position={"x": 1, "y": 1})
    reached = []
    for _ in range(60):
        page.shown.keyboard.press("Tab")
        reached.append(
            page.shown.evaluate("() => (document.activeElement.textContent || '').trim()")
        )
    wanted = ["Delete all that I keep here", "Inspect"]
    assert [one for one in wanted if one not in reached] == []
    page.shown.get_by_role("tab", name="Inspect", exact=True).focus()
    page.shown.keyboard.press("ArrowRight")
    for tab in TABS:
        page.tab(tab)
        assert page.shown.evaluate(UNNAMED) == [], tab
        assert page.shown.locator("[role=tabpanel] [role=status][aria-live=polite]").count()
    assert page.shown.evaluate("() => document.documentElement.lang") != ""


UNNAMED = """() => [...document.querySelectorAll('input, textarea, select, button')]
    .filter(one => one.offsetParent !== null && one.type !== 'hidden')
    .filter(one => !(one.getAttribute('aria-label') || one.textContent.trim() || one.title
        || [...(one.labels || [])].some(label => label.textContent.trim())))
    .map(one => one.outerHTML.slice(0, 200))"""


@pytest.mark.full
def test_it_fits_a_narrow_window(place: Place) -> None:
    with Page.visit(place.browser, place.server.url, width=360) as page:
        for tab in TABS:
            page.tab(tab)
            assert page.shown.evaluate("() => document.documentElement.scrollWidth") <= 360, tab


def test_a_status_is_read_out(page: Page) -> None:
    """The element that screen readers watch stays; only what it says changes."""
    page.tab("Inspect")
    region = page.shown.locator("#inspect-status [role=status]")
    region.evaluate("one => { window.watched = one; }")
    page.press("inspect-run")
    region.get_by_text("Error:").wait_for()
    assert page.shown.evaluate(
        "() => window.watched.isConnected && window.watched.innerText !== ''"
    )


@pytest.mark.full
def test_who_logs_in_pushes_without_a_token(
    place: Place, sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    """As on the Hub: the Space sends the visitor there, who comes back known."""
    environment = place.hub.environment(tmp_path / "home", None) | place.hub.space_environment()
    with (
        space(tmp_path / "space", **environment) as server,
        Page.visit(place.browser, server.url) as page,
    ):
        page.shown.get_by_text("what you keep here is deleted, so do it first").wait_for()
        page.shown.locator("#login").click()
        page.shown.get_by_role("button", name="Logout (tester)").wait_for()
        page.upload(sd1_keras["unet"])
        plan(page)
        page.choose("convert-where", "Hugging Face Hub")
        page.fill("convert-repo", "tester/mine")
        page.choose("convert-unverified", "Push although parity has not been run")
        page.click("convert-run")
        assert "Pushed" in page.text("convert-result"), page.text("convert-status")
        assert "unet/config.json" in place.hub.repos["tester/mine"].files()
        page.shown.locator("#login").click()
        page.shown.get_by_role("button", name="Sign in with Hugging Face").wait_for()
        assert not any(TOKEN.encode() in path.read_bytes() for path in server.kept)
