"""`weightport compare-schedulers`: what it measures, that it resumes, what its report shows."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import weightport
from weightport.comparison.metrics import installed_metrics
from weightport.comparison.report import fronts, means, write_report
from weightport.comparison.schedulers import Experiment, compare, pareto_front
from weightport.runtime.pipelines.base import DiffusionPipeline
from weightport.runtime.schedulers.names import named_scheduler

from ..support.browser import laid_out, photographed
from ..support.command import run

EXPERIMENT = Experiment(
    ("a red fox",),
    ("euler", "heun", "euler-a", "dpm++2m"),
    (4, 8),
    size=(64, 64),
    reference_steps=32,
)


@pytest.fixture(scope="module")
def model(sd1_keras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow text-to-image model, complete with tokenizer and scheduler."""
    repo = tmp_path_factory.mktemp("model") / "repo"
    weightport.convert(list(sd1_keras.values()), repo)
    return repo


@pytest.fixture(scope="module")
def pipe(model: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def compared(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("compared")
    return compare(pipe, EXPERIMENT, output), output


def test_every_scheduler_runs_with_every_number_of_steps(compared: tuple[Any, Path]) -> None:
    comparison, output = compared
    runs = {(run.scheduler, run.steps): run for run in comparison.runs}
    assert list(runs) == [
        (name, steps) for name in EXPERIMENT.schedulers for steps in EXPERIMENT.steps
    ]
    assert {
        run.model_calls for (name, steps), run in runs.items() if (name, steps) == ("euler", 8)
    } == {8}
    assert runs["heun", 8].model_calls == 15  # two a step, but for the last
    assert [name for name in EXPERIMENT.schedulers if runs[name, 4].stochastic] == ["euler-a"]
    assert all(run.seconds > 0 and (output / run.image).is_file() for run in runs.values())


def test_errors_shrink_with_the_steps_and_vanish_at_the_reference(
    pipe: Any, tmp_path: Path
) -> None:
    experiment = Experiment(
        ("a red fox",), ("dpm++2m",), (4, 8, 16, 32), size=(64, 64), reference_steps=32
    )
    comparison = compare(pipe, experiment, tmp_path)
    errors = [run.rmse for run in comparison.runs]
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0
    assert comparison.runs[-1].psnr == float("inf")
    assert comparison.uncertainty["a red fox"] == pytest.approx(errors[2])


def test_whatever_timesteps_the_repo_asks_for_all_approach_one_image(
    model: Path, tmp_path: Path
) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, timestep_spacing="leading"
    )
    names = ("dpm++2m-karras", "unipc")
    experiment = Experiment(("a red fox",), names, (2, 8), size=(64, 64), reference_steps=20)
    comparison = compare(pipe, experiment, tmp_path)
    for few, many in zip(comparison.runs[::2], comparison.runs[1::2], strict=True):
        assert many.rmse < few.rmse / 2 < 0.05, many.scheduler


def test_the_scheduler_of_the_pipeline_stays(pipe: Any, compared: tuple[Any, Path]) -> None:
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def made(pipe: Any, experiment: Experiment, output: Path) -> int:
    """How many images a comparison makes, not counting those it finds."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    counting = pipe.vae.decoder.register_forward_hook(count)
    try:
        compare(pipe, experiment, output)
    finally:
        counting.remove()
    return calls


def test_an_interrupted_comparison_goes_on(pipe: Any, tmp_path: Path) -> None:
    experiment = Experiment(
        ("a red fox",), ("euler", "dpm++2m"), (2, 3), size=(64, 64), reference_steps=10
    )
    seen: list[int] = []

    def interrupt(count: int, total: int) -> None:
        seen.append(count)
        if sum(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(pipe, experiment, tmp_path, progress=interrupt)
    warm = 1
    assert made(pipe, experiment, tmp_path) == 3 + warm
    assert made(pipe, experiment, tmp_path) == 0


@pytest.mark.parametrize("change", ["seed", "weights"])
def test_nothing_is_taken_from_another_experiment(model: Path, tmp_path: Path, change: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    experiment = Experiment(("a red fox",), ("euler",), (2,), size=(64, 64), reference_steps=2)
    first = made(pipe, experiment, tmp_path)
    if change == "seed":
        experiment = Experiment(
            ("a red fox",), ("euler",), (2,), seed=1, size=(64, 64), reference_steps=2
        )
    else:
        with torch.no_grad():
            pipe.unet.conv_out.bias[0] += 1
    assert made(pipe, experiment, tmp_path) == first


@pytest.mark.browser
def test_a_browser_shows_grid_plots_and_table(compared: tuple[Any, Path], tmp_path: Path) -> None:
    comparison, output = compared
    write_report(comparison, output)
    page, rows = (output / "report.html").read_text(), means(comparison)
    boxes = laid_out(page, tmp_path)
    plots = [box for box in boxes if box.tag == "svg"]
    assert len(plots) == 2
    assert all(box.width > 900 and box.height > 300 for box in plots)
    marked = [box for box in boxes if box.id == "front"]
    assert len(marked) == 2
    assert all(box.width > 10 and box.height > 10 for box in marked)
    images = [box for box in boxes if box.tag == "img"]
    assert len(images) == 1 + len(rows)
    assert all(box.pixels == 64 and box.width == box.height >= 150 for box in images)
    assert len([box for box in boxes if box.tag == "tr"]) == 1 + len(rows) + 1 + len(
        EXPERIMENT.schedulers
    )
    assert page.count("Pareto front</span>") == len(fronts(rows)[0]) > 0

    image = pytest.importorskip("PIL.Image").open(photographed(page, tmp_path)).convert("RGB")
    seen = {colour: count for count, colour in image.getcolors(2**24)}
    for colour in ((37, 99, 235), (217, 119, 6), (5, 150, 105), (190, 24, 93)):  # a scheduler each
        assert seen.get(colour, 0) > 50


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("EULER", "EulerDiscreteScheduler"),
        ("eulerDiscrete", "EulerDiscreteScheduler"),
        ("dpm++2m-karras", "DPMSolverMultistepScheduler"),
        ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
        ("kerascv", "KerasCVScheduler"),
    ],
)
def test_schedulers_by_name(name: str, found: str) -> None:
    scheduler = named_scheduler(name, {"beta_end": 0.012})
    assert type(scheduler).__name__ == found
    assert scheduler.config.beta_end == 0.012
    assert bool(scheduler.config.get("use_karras_sigmas")) == name.endswith("karras")


def test_which_schedulers_are_stochastic() -> None:
    names = (
        "ddim",
        "DDPMScheduler",
        "dpm++2m",
        "dpm++2m-sde",
        "dpm++2s",
        "euler-a",
        "tcd",
        "unipc",
    )
    assert [name for name in names if named_scheduler(name, {}).stochastic] == [
        "DDPMScheduler",
        "dpm++2m-sde",
        "euler-a",
        "tcd",
    ]


def test_pareto_front() -> None:
    assert pareto_front([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (5, 2)]) == [0, 1, 4]
    assert pareto_front([]) == []


def test_command(model: Path, tmp_path: Path) -> None:
    arguments = [
        "compare-schedulers",
        model,
        "-p",
        "a <b>red</b> fox",
        "-o",
        tmp_path,
        "--size",
        "64x64",
    ]
    arguments += ["--schedulers", "euler,dpm++2m", "--steps", "2,4", "--reference-steps", "8"]
    ended = run(*map(str, arguments))
    assert ended.status == 0, ended.err
    assert "dpm++2m" in ended.out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(run["scheduler"], run["steps"]) for run in results["runs"]] == [
        ("euler", 2),
        ("euler", 4),
        ("dpm++2m", 2),
        ("dpm++2m", 4),
    ]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [float(row["rmse"]) for row in rows] == [run["rmse"] for run in results["runs"]]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("<img") == 5  # four runs and the reference
    assert "a &lt;b&gt;red&lt;/b&gt; fox" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)  # nothing to fetch


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--schedulers", "eular"], "did you mean euler?"),
        (["--schedulers", "EDMEulerScheduler", "--steps", "x"], "--steps"),
        (["--size", "large"], "--size"),
    ],
)
def test_wrong_usage(model: Path, tmp_path: Path, more: list[str], message: str) -> None:
    ended = run("compare-schedulers", str(model), "-p", "a", "-o", str(tmp_path / "out"), *more)
    assert ended.status in (1, 2)
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_scores_of_installed_packages_are_used(
    monkeypatch: pytest.MonkeyPatch, pipe: Any, tmp_path: Path
) -> None:
    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, a: Any, b: Any) -> Any:
            assert a.shape == b.shape == (1, 3, 64, 64)
            assert -1 <= a.min() < 0 < a.max() <= 1
            return (a - b).abs().mean()

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    metrics, reasons = installed_metrics()
    assert [metric.name for metric in metrics] == ["LPIPS"]
    assert len(reasons) == 1
    assert "weightport[quality]" in reasons[0]
    experiment = Experiment(
        ("a red fox",), ("dpm++2m", "euler"), (8,), size=(64, 64), reference_steps=8
    )
    same, other = compare(pipe, experiment, tmp_path, metrics).runs
    assert same.scores == {"LPIPS": 0}
    assert other.scores["LPIPS"] > 0
