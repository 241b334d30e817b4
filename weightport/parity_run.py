"""Runs a source framework and our runtime on the same inputs, one process after the other, and judges the results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .converters.conversion import HALVES, Settings
from .converters.convert import gather
from .converters.errors import ConversionError, printable
from .converters.plan import PlannedComponent, StateDictShapes, choose_family, plan
from .converters.recognise import Recognition
from .mappings.families import Family
from .parity_inputs import inputs, pipeline_inputs
from .parity_layers import Fault, Layer, compare_layers, first_fault, watched
from .parity_measure import Error, measure, tolerance
from .parity_weights import Weights, compare_weights
from .runners.exchange import MISSING

RUNNERS = Path(__file__).resolve().parent / "runners"
EXTRAS = {"weightport": "torch", "kerascv": "keras", "ldm": "ldm", "diffusers": "oracle"}
TITLES = {"kerascv": "KerasCV", "ldm": "the original modules", "diffusers": "diffusers"}
LDM = {"sd1": ("unet", "decoder", "image_encoder", "text_encoder"), "sd2": ("unet", "decoder", "image_encoder")}
PIPELINE = ("text_encoder", "unet", "decoder")
STEPS, GUIDANCE_SCALE = 5, 7.5
PIPELINE_TOLERANCE = 3e-5  # guidance multiplies the rounding of the UNet by 14, and every step builds on the last
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Check:
    """One model, run by both sides.

    Attributes:
        name: `text_encoder`, `unet`, `controlnet`, or a half of the VAE, `decoder` or `image_encoder`.
        against: the runner of the other side: `kerascv`, `ldm` or `diffusers`.
        weights: of the source against the repo; None where both sides read the repo.
        matched: the error with the source's maths in our runtime.
        as_diffusers: the error as diffusers runs the same weights; None where that is the same.
        layers: errors by module, if they were recorded; `diffusers_layers` those as diffusers runs it.
        fault: where it goes wrong, if it does and one module is to blame.
    """

    name: str
    component: str
    against: str
    source: str
    weights: Weights | None
    tolerance: float
    matched: Error
    as_diffusers: Error | None
    layers: tuple[Layer, ...] = ()
    diffusers_layers: tuple[Layer, ...] = ()
    fault: Fault | None = None

    @property
    def passed(self) -> bool:
        """Whether the weights are those of the source and the outputs agree."""
        return not (self.weights and self.weights.wrong) and self.matched.relative_l2 <= self.tolerance


@dataclass(frozen=True)
class Images:
    """Both sides from the same token ids and noise to an image; errors are those of the decoder's output.

    Attributes:
        differing: share of the image's uint8 values that are not the same.
        levels: by how much at most, of 255.
        pictures: title -> uint8 (h, w, 3).
    """

    steps: int
    sampler: str
    tolerance: float
    matched: Error
    as_diffusers: Error
    differing: float
    levels: int
    pictures: Mapping[str, np.ndarray[Any, Any]] = field(repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the outputs agree."""
        return self.matched.relative_l2 <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the pictures."""
        return {**asdict(replace(self, pictures={})), "passed": self.passed}


@dataclass(frozen=True)
class Parity:
    """The answer of `weightport.parity`.

    Attributes:
        images: of the pipelines; None where the sources do not make one of KerasCV.
        environment: machine, versions, seconds and peak memory of each process.
        files: path of a source or repo file -> its sha256.
    """

    repo: str
    family: str
    dtype: str
    checks: tuple[Check, ...]
    images: Images | None
    environment: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether every check passed, and the images agree."""
        return all(check.passed for check in self.checks) and (self.images is None or self.images.passed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        images = self.images and self.images.to_dict()
        return {**asdict(replace(self, images=None)), "passed": self.passed, "checks": checks, "images": images}


@dataclass(frozen=True)
class Pair:
    """One model of the repo, and where the other side finds it."""

    name: str
    component: PlannedComponent
    family: Family
    part: Recognition | None  # of a source; None to read the repo
    watch: Mapping[str, str]  # their module -> ours
    rows: Mapping[str, str]

    @property
    def against(self) -> str:
        """The runner of the other side; where there are no original modules to run, diffusers loads the file."""
        layout = self.part.checkpoint.layout if self.part else "diffusers"
        return "diffusers" if layout == "ldm" and self.name not in LDM.get(self.family.name, ()) else layout

    @property
    def config(self) -> dict[str, Any]:
        """The stock config with what the repo's own says."""
        repo, root = self.folder
        return {**self.family.components[self.component.name].config, **_read_json(repo / root / "config.json")}

    @property
    def folder(self) -> tuple[Path, str]:
        """The repo, and the component's folder in it."""
        checkpoint = self.component.parts[0].checkpoint
        return checkpoint.path, checkpoint.root


def parity(
    repo: Path,
    sources: Sequence[Path],
    state_dict_shapes: StateDictShapes,
    progress: Progress,
    *,
    component: str | None = None,
    source_python: str = sys.executable,
    layers: bool = False,
    dtype: str = "float32",
    latent_side: int = 16,
    images: bool = True,
) -> Parity:
    """Compare a repo with its sources, or with what diffusers makes of it where none is given.

    Raises:
        ConversionError: a file that cannot be read, a framework that is not installed or does not take the file.
    """
    pairs = [pair for pair in pairs_of(repo, sources, state_dict_shapes) if _asked(pair, component)]
    if not pairs:
        raise ConversionError(f"--component {component}: not in the sources, or not in {repo}")
    with tempfile.TemporaryDirectory(prefix="weightport-parity-") as folder:
        bench = Bench(Path(folder), dtype, latent_side, source_python, progress)
        checks = bench.judge(pairs, layers)
        failed = [pair for pair, check in zip(pairs, checks, strict=True) if not check.passed]
        if failed and not layers:
            again = {check.name: check for check in bench.judge(failed, True)}
            checks = [again.get(check.name, check) for check in checks]
        parts = {pair.name: pair for pair in pairs if pair.against == "kerascv" and pair.name in PIPELINE}
        pictures = bench.images(parts) if images and len(parts) == len(PIPELINE) and dtype == "float32" else None
    files = [file for pair in pairs for part in _parts(pair) for file in part.checkpoint.files]
    hashes = {str(file.path): file.sha256() for file in {file.path: file for file in files}.values()}
    machine = {"machine": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    return Parity(str(repo), pairs[0].family.name, dtype, tuple(checks), pictures, machine | bench.reports, hashes)


def _asked(pair: Pair, component: str | None) -> bool:
    return component in (None, pair.name, pair.component.name)


def _parts(pair: Pair) -> list[Recognition]:
    return [*pair.component.parts, *([pair.part] if pair.part else [])]


def weights_of(pair: Pair) -> Weights | None:
    """The comparison of the source with the repo, if both sides do not read the repo."""
    return compare_weights(pair.part, pair.family.name, pair.component.tensors) if pair.part else None


def pairs_of(repo: Path, sources: Sequence[Path], state_dict_shapes: StateDictShapes) -> list[Pair]:
    """What can be compared, in the family's order."""
    mine, theirs = gather([repo], Settings()), gather(sources, Settings())
    family = choose_family([*mine, *theirs], None)
    components = plan(mine, family, state_dict_shapes)
    plan(theirs, family, state_dict_shapes)  # refuses what does not fit
    pairs = []
    for name, component in components.items():
        if not sources:
            modules = {key.rpartition(".")[0] for key in component.tensors}
            pairs += [Pair(check, component, family, None, {m: m for m in modules}, {}) for check in _names(name)]
        for part in theirs:
            candidate = part.of_family(family.name)
            if candidate.component.name == name:
                watch, rows = watched(dict.fromkeys(candidate.links.values()), candidate.table.prefix)
                pairs += [Pair(check, component, family, part, watch, rows) for check in _names(part.part)]
    return pairs


def _names(part: str) -> list[str]:
    """The checks that a part takes: two for a whole VAE."""
    return list(HALVES) if part == "vae" else [part]


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: not a config")
    return content


@dataclass
class Bench:
    """Where the runs take place: a folder for their files, and what they reported."""

    folder: Path
    dtype: str
    latent_side: int
    source_python: str
    progress: Progress
    reports: dict[str, Any] = field(default_factory=dict)

    def judge(self, pairs: Sequence[Pair], layers: bool) -> list[Check]:
        """Run all pairs on both sides, the source's first, and compare."""
        total = sum(1 + len(_semantics(pair)) for pair in pairs)
        step = partial(self.progress, 1, total)
        self.run_theirs(pairs, layers, step)
        self.run_ours(pairs, layers, step)
        return [self.check(pair) for pair in pairs]

    def run_theirs(self, pairs: Sequence[Pair], layers: bool, step: Callable[[], None]) -> None:
        """Run the other side of pairs, one framework after the other."""
        for pair in pairs:
            given = inputs(pair.name, pair.config, self.latent_side, self.dtype)
            np.savez(self.folder / f"{pair.name}.inputs.npz", allow_pickle=False, **given)
        for runner in dict.fromkeys(pair.against for pair in pairs):
            checks = [_their_check(pair, self.latent_side) for pair in pairs if pair.against == runner]
            self._run(runner, runner, checks, layers, step)

    def run_ours(self, pairs: Sequence[Pair], layers: bool, step: Callable[[], None]) -> None:
        """Run our side of pairs, once with the source's maths and once with that of diffusers."""
        for semantics in ("kerascv", "diffusers"):
            checks = [_our_check(pair, semantics) for pair in pairs if semantics in _semantics(pair)]
            if checks:
                self._run("weightport", f"weightport, {semantics} semantics", checks, layers, step)

    def check(self, pair: Pair) -> Check:
        """The verdict, from what both sides wrote."""
        semantics, weights = _semantics(pair), weights_of(pair)
        allowed = tolerance(pair.name, self.dtype, list(weights.rounded) if weights else [])
        errors, layers = [], []
        for ours in semantics:
            label = f"weightport, {ours} semantics"
            expected = self._outputs(pair.against, pair.name)
            errors.append(measure(self._outputs(label, pair.name)[: len(expected)], expected))
            layers.append(self._layers(label, pair))
        return Check(
            name=pair.name,
            component=pair.component.name,
            against=pair.against,
            source=str((pair.part or pair.component.parts[0]).checkpoint.path),
            weights=weights,
            tolerance=allowed,
            matched=errors[0],
            as_diffusers=errors[1] if len(errors) > 1 else None,
            layers=layers[0],
            diffusers_layers=layers[1] if len(layers) > 1 else (),
            fault=None if errors[0].relative_l2 <= allowed else first_fault(layers[0], allowed, pair.rows),
        )

    def images(self, parts: Mapping[str, Pair]) -> Images:
        """Run both pipelines from the same token ids and noise."""
        side = -(-self.latent_side // 16) * 16  # KerasCV makes sizes multiples of 128 pixels
        encoder, unet = parts["text_encoder"].config, parts["unet"].config
        given = pipeline_inputs(encoder["vocab_size"], unet["in_channels"], side)
        np.savez(self.folder / "pipeline.inputs.npz", allow_pickle=False, **given)
        common = {"name": "pipeline", "watch": {}, "steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
        theirs = {name: _their_check(pair, side) for name, pair in parts.items()}
        family = parts["unet"].family.name
        step = partial(self.progress, 1, 3)
        check = {**common, "family": family, "image_size": 8 * side, "parts": theirs}
        self._run("kerascv", "KerasCV, generate_image", [check], False, step)
        version = self.reports["KerasCV, generate_image"]["versions"]["keras-cv"]
        generation = "0.7" if tuple(map(int, version.split(".")[:2])) < (0, 8) else "0.8"
        labels = {}
        for semantics in ("kerascv", "diffusers"):
            ours = {name: _our_check(pair, semantics) for name, pair in parts.items()}
            labels[semantics] = f"weightport, pipeline, {semantics} semantics"
            check = {**common, "semantics": semantics, "generation": generation, "parts": ours}
            self._run("weightport", labels[semantics], [check], False, step)
        expected, theirs_uint8 = self._outputs("KerasCV, generate_image", "pipeline")
        (matched, pixels), (diffusers, diffusers_pixels) = (
            self._outputs(labels[semantics], "pipeline") for semantics in ("kerascv", "diffusers")
        )
        distance = np.abs(pixels.astype(int) - theirs_uint8)
        return Images(
            steps=STEPS,
            sampler=f"keras-cv {version}",
            tolerance=PIPELINE_TOLERANCE,
            matched=measure([matched], [expected]),
            as_diffusers=measure([diffusers], [expected]),
            differing=float((distance > 0).mean()),
            levels=int(distance.max()),
            pictures={
                "KerasCV": _picture(theirs_uint8),
                "weightport, KerasCV's maths": _picture(pixels),
                "difference, 100 times": _picture(_magnified(matched - expected)),
                "weightport, as diffusers runs it": _picture(diffusers_pixels),
                "its difference, 100 times": _picture(_magnified(diffusers - expected)),
            },
        )

    def _outputs(self, label: str, name: str) -> list[np.ndarray[Any, Any]]:
        with np.load(self._file(label, name, "outputs")) as arrays:
            return [arrays[f"output {i}"] for i in range(len(arrays.files))]

    def _layers(self, label: str, pair: Pair) -> tuple[Layer, ...]:
        paths = self._file(label, pair.name, "layers"), self._file(pair.against, pair.name, "layers")
        if not all(path.exists() for path in paths):
            return ()
        with np.load(paths[0]) as ours, np.load(paths[1]) as theirs:
            return tuple(compare_layers(ours, theirs))

    def _file(self, label: str, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{label}.{kind}.npz"

    def _run(
        self, runner: str, label: str, checks: Sequence[dict[str, Any]], layers: bool, step: Callable[[], None]
    ) -> None:
        """Run a framework on checks, in a process of its own."""
        for check in checks:
            name = check["name"]
            check |= {kind: str(self._file(label, name, kind)) for kind in ("outputs", "layers")}
            check |= {"inputs": str(self.folder / f"{name}.inputs.npz"), "dtype": self.dtype}
            check["watch"] = check["watch"] if layers else {}
        report = self.folder / "report.json"
        (self.folder / "job.json").write_text(json.dumps({"checks": checks, "report": str(report)}))
        run_process(runner, self.folder / "job.json", self.source_python, step)
        self.reports[label] = json.loads(report.read_text())


def _picture(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The first of (b, 3, h, w) as (h, w, 3)."""
    return np.ascontiguousarray(images[0].transpose(1, 2, 0))


def _magnified(difference: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A difference of images in [-1, 1], 100 times as large, around grey."""
    return np.clip(127.5 + 100 * 127.5 * difference, 0, 255).astype(np.uint8)


def _semantics(pair: Pair) -> tuple[str, ...]:
    """Whose maths our runtime follows: first the source's, then diffusers' if that may differ."""
    if pair.against != "kerascv":
        return ("diffusers",)
    return ("kerascv",) if pair.name == "text_encoder" else ("kerascv", "diffusers")


def _our_check(pair: Pair, semantics: str) -> dict[str, Any]:
    repo, root = pair.folder
    modules = dict.fromkeys(pair.watch.values())
    return {
        "name": pair.name,
        "folder": str(repo / root),
        "class": pair.family.components[pair.component.name].class_name,
        "semantics": semantics,
        "watch": {module: module for module in modules},
    }


def _their_check(pair: Pair, latent_side: int) -> dict[str, Any]:
    repo, root = pair.folder
    described = pair.family.components[pair.component.name]
    return {
        "name": pair.name,
        "component": pair.component.name,
        "family": pair.family.name,
        "class": described.class_name,
        "config": pair.config,
        "source": str(pair.part.checkpoint.path if pair.part else repo),
        "repo": str(repo),
        "subfolder": root,
        "prefix": pair.part.of_family(pair.family.name).table.prefix if pair.part else "",
        "watch": dict(pair.watch) if pair.against != "diffusers" else {m: m for m in pair.watch.values()},
        "image_size": 8 * latent_side,
        "vocab": pair.config.get("vocab_size"),
        "features": pair.config.get("block_out_channels", [0])[0],
        "widths": _kerascv_widths(pair),
    }


def _kerascv_widths(pair: Pair) -> dict[str, dict[int, int]]:
    """Stock width -> the repo's, for each kind of model, or nothing for a stock one."""
    config, stock = pair.config, pair.family.components[pair.component.name].config
    context: Any = config.get("cross_attention_dim", config.get("hidden_size"))
    widths: dict[str, dict[int, int]] = {
        "unet": {320: 320, 640: 640, 1280: 1280},
        "vae": {128: 128, 256: 256, 512: 512},
        "context": {768: context, 1024: context},
    }
    if pair.component.name in widths:
        levels = zip(stock["block_out_channels"], config["block_out_channels"], strict=True)
        widths[pair.component.name] = dict(levels)
    keys = ("block_out_channels", "cross_attention_dim", "hidden_size")
    return widths if any(config.get(key) != stock.get(key) for key in keys) else {}


def run_process(runner: str, job: Path, source_python: str, step: Callable[[], None]) -> None:
    """Start a runner and wait for it; `step` is called for each check that is done.

    Raises:
        ConversionError: its framework is not installed, or it ended with an error.
    """
    ours = runner == "weightport"
    python = sys.executable if ours else source_python
    environment = dict(os.environ)
    if ours:
        environment["PYTHONPATH"] = os.pathsep.join([str(RUNNERS.parent.parent), environment.get("PYTHONPATH", "")])
    log = job.with_suffix(".log")
    command = [python, str(RUNNERS / f"run_{runner}.py"), str(job)]
    try:
        with (
            log.open("w") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
        ):
            try:
                for line in process.stdout or ():
                    if line.startswith("done "):
                        step()
            except BaseException:
                process.kill()
                raise
    except OSError as error:
        raise ConversionError(f"--source-python {python}: cannot be started ({error.strerror})") from None
    if process.returncode:
        raise ConversionError(_why(runner, python, process.returncode, log.read_text(errors="replace")))


def _why(runner: str, python: str, status: int, log: str) -> str:
    """One line for a runner that failed."""
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")
    if status == MISSING:
        other = "" if runner == "weightport" else ", or name another interpreter with --source-python"
        return f'{last}; run `{python} -m pip install "weightport[{EXTRAS[runner]}]"`{other}'
    if status < 0:
        return f"the {runner} process was killed by signal {-status}: is there enough memory?"
    return printable(last, limit=600)
