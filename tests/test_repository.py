"""What lies beside the code: workflows, hooks, metadata."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_may_do_little(workflow: Path) -> None:
    uses = [line for line in workflow.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert uses
    assert [line for line in uses if not PINNED.search(line)] == []
    document = read(workflow)
    assert document["permissions"] == {}
    for name, job in document["jobs"].items():
        assert job["permissions"], name
        assert job["timeout-minutes"], name


def test_one_version_of_an_action() -> None:
    text = "".join(path.read_text() for path in WORKFLOWS)
    pins = set(re.findall(r"uses: (\S+)@(\S+)", text))
    assert len(dict(pins)) == len(pins)


def test_hooks_are_the_checks() -> None:
    checks = re.search(r"^names=\((.*)\)$", (ROOT / "scripts/check").read_text(), re.MULTILINE)
    assert checks is not None
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    for hook in repository["hooks"]:
        assert hook["entry"] == f"scripts/check {hook['id']}"
    assert [*(hook["id"] for hook in repository["hooks"]), "docs"] == checks[1].split()


@pytest.mark.parametrize("form", ["file", "difference", "other"])
def test_forms_ask_for_the_version_and_the_file(form: str) -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text()
    assert "`weightport --version`" in text
    assert "weightport inspect FILE --json`" in text
    fields = read(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml")["body"]
    assert all(field["type"] in {"markdown", "input", "textarea"} for field in fields)
