"""Pages: by templates alone, with every name escaped, and nothing drawn without its packages."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from weightport.errors import ConversionError
from weightport.reports import page
from weightport.reports.plots import Line, Series, log_plot, scatter_plot

pytest.importorskip("jinja2")

ROOT = Path(__file__).resolve().parents[2]
TAGS = (
    "a|abbr|article|b|blockquote|body|br|button|caption|code|details|div|em|figcaption|figure"
    "|form|h[1-6]|head|hr|html|i|iframe|img|input|li|link|main|meta|nav|ol|p|pre|section|script"
    "|small|span|strong|style|summary|sub|sup|svg|table|tbody|td|tfoot|th|thead|title|tr|u|ul"
    "|video"
)
TAG = re.compile(rf"</?({TAGS})(?=[\s/>])", re.IGNORECASE)
HOSTILE = "<script>alert('1')</script>\"'&amp;<img src=x onerror=alert(2)>$x^$"


def strings(source: str) -> list[str]:
    """Every string constant of a module, the parts of f-strings among them; no docstrings."""
    nodes = list(ast.walk(ast.parse(source)))
    documentation = [node.value for node in nodes if isinstance(node, ast.Expr)]
    constants = [node for node in nodes if isinstance(node, ast.Constant)]
    values = [node.value for node in constants if node not in documentation]
    return [value for value in values if isinstance(value, str)]


@pytest.mark.parametrize("folder", ["weightport", "converters", "mappings"])
def test_no_html_in_python(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for text in strings(path.read_text()):
            assert not TAG.search(text), f"{path.relative_to(ROOT)}: {text!r}"


@pytest.mark.parametrize("source", ["'<p>'", "f'<div class={x}>'", "'a</td>'", "'<br/>'"])
def test_the_rule_sees_html(source: str) -> None:
    assert any(TAG.search(text) for text in strings(f"x = {source}"))


class Seen(HTMLParser):
    """What a browser would take a page for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.values: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append(name)
            self.values.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_harmless(html: str, times: int) -> None:
    """A hostile name is text and nothing else, at least so many times."""
    seen = Seen(html)
    assert "script" not in seen.tags
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert seen.text.count(HOSTILE) + seen.values.count(HOSTILE) >= times


def test_hostile_names_in_a_parity_report() -> None:
    from weightport.parity.layers import Fault, Layer
    from weightport.parity.measure import Error
    from weightport.parity.report import html
    from weightport.parity.result import Check, File, Images, Parity
    from weightport.parity.weights import Weights, WrongTensor

    error = Error(max_abs=1.0, relative_l2=1.0, cosine=0.5, psnr=20.0)
    check = Check(
        name=HOSTILE,
        component=HOSTILE,
        against="kerascv",
        source=HOSTILE,
        weights=Weights(1, {HOSTILE: 2}, (WrongTensor(HOSTILE, (HOSTILE,), HOSTILE, 1.0),)),
        tolerance=1e-6,
        matched=error,
        as_diffusers=error,
        layers=(Layer(HOSTILE, HOSTILE, 1.0, 1.0),),
        fault=Fault(HOSTILE, HOSTILE, HOSTILE, 1.0, 0.0),
    )
    picture = np.zeros((2, 2, 3), np.uint8)
    images = Images(1, HOSTILE, 1.0, error, error, 0.0, 0, {HOSTILE: picture})
    environment = {HOSTILE: HOSTILE}
    files = (File(HOSTILE, "0" * 64),)
    found = Parity(HOSTILE, HOSTILE, HOSTILE, (check,), images, environment, files)
    assert_harmless(html(found), times=20)


def test_hostile_names_in_a_comparison_of_schedulers(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from PIL import Image

    from weightport.comparison.report import html
    from weightport.comparison.schedulers import Experiment, Run, SchedulerComparison

    Image.new("RGB", (2, 2)).save(tmp_path / "image.png")
    experiment = Experiment((HOSTILE,), (HOSTILE,), (1, 2))
    runs = [
        Run(HOSTILE, HOSTILE, steps, False, 1.0, 1, 0.1, 20.0, {HOSTILE: 1.0}, "image.png")
        for steps in experiment.steps
    ]
    images = {HOSTILE: "image.png"}
    found = SchedulerComparison(HOSTILE, experiment, runs, images, {HOSTILE: 0.01})
    assert_harmless(html(found, tmp_path, [HOSTILE]), times=10)


def test_nothing_is_exempt_from_escaping() -> None:
    for template in (page.FOLDER / "templates").glob("*.html"):
        assert not re.search(r"\bsafe\b|autoescape", template.read_text()), template.name


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        page.render("parity.html")


def draw() -> None:
    log_plot([Line("a", [1.0, 2.0])], ["first", "last"])


@pytest.mark.parametrize(
    ("module", "name", "use"),
    [("jinja2", "Jinja2", lambda: page.render("base.html")), ("matplotlib", "matplotlib", draw)],
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, use: Callable[[], object]
) -> None:
    page._environment.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConversionError) as told:
        use()
    assert str(told.value) == f'a report needs {name}; run `pip install "weightport[report]"`'


def test_colours_follow_the_theme_and_are_there_without_it() -> None:
    plot = scatter_plot([Series("a", [(1, 2, "b")])], "x", "y", [(1, 2, "b")], None)
    style = (page.FOLDER / "style.css").read_text()
    found = set(re.findall(r"var\(--([\w-]+), (#[0-9a-f]{6})\)", plot))
    assert {"ink", "soft", "series-0"} <= {name for name, _ in found}
    for name, colour in found:
        assert f"--{name}: {colour};" in style
        assert style.count(f"--{name}: ") == 2, "light and dark"
