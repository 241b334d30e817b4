"""diffusers' own tests, run on the classes of this project: diffusers_tests.py CLONE [GROUP...].

CLONE is a clone of https://github.com/huggingface/diffusers of about the version that is installed.
Each test runs twice, with diffusers' classes and with ours in their place; what counts is a test
that passes with diffusers' own. Nothing is downloaded: where tests want a small tokenizer of the
Hub, one of the same size is made, and what else they want of the Hub fails for both.

Prints a table in Markdown, then every test that fails with ours, with the first line of its error.
diffusers' tests themselves need accelerate, parameterized and requests_mock.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SCHEDULERS = (  # whose classes we have
    *("consistency_model", "ddim", "ddim_inverse", "ddpm", "deis", "dpm_multi"),
    *("dpm_multi_inverse", "dpm_sde", "dpm_single", "edm_dpmsolver_multistep", "edm_euler"),
    *("euler", "euler_ancestral", "heun", "ipndm", "kdpm2_ancestral", "kdpm2_discrete"),
    *("lcm", "lms", "pndm", "sasolver", "tcd", "unipc"),
)
PIPELINES = {  # folder of the clone's tests -> those of pipelines that we have
    "stable_diffusion": ("", "_img2img", "_inpaint", "_instruction_pix2pix"),
    "stable_diffusion_2": ("", "_depth", "_inpaint", "_upscale", "_v_pred"),
    "stable_diffusion_xl": ("", "_img2img", "_inpaint", "_instruction_pix2pix"),
}


def _pipelines(folder: str) -> tuple[str, ...]:
    stem = "stable_diffusion" if folder == "stable_diffusion_2" else folder
    return tuple(f"pipelines/{folder}/test_{stem}{task}.py" for task in PIPELINES[folder])


GROUPS: dict[str, tuple[str, ...]] = {  # what is run -> files and folders of the clone's tests
    "schedulers": tuple(f"schedulers/test_scheduler_{name}.py" for name in SCHEDULERS),
    "pipelines of SD": (*_pipelines("stable_diffusion"), *_pipelines("stable_diffusion_2")),
    "pipelines of SDXL": _pipelines("stable_diffusion_xl"),
    "pipelines with ControlNets": ("pipelines/controlnet",),
    "pipelines of LCM": ("pipelines/latent_consistency_models",),
    "models": (
        "models/unets/test_models_unet_2d_condition.py",
        "models/autoencoders/test_models_autoencoder_kl.py",
        "models/autoencoders/test_models_autoencoder_tiny.py",
        "models/autoencoders/test_models_asymmetric_autoencoder_kl.py",
    ),
    "transformers": (
        "models/transformers/test_models_transformer_sd3.py",
        "models/transformers/test_models_transformer_flux.py",
    ),
}
TOKENIZER = "hf-internal-testing/tiny-random-clip"
ON_OURS = "WEIGHTPORT_IN_PLACE_OF_DIFFUSERS"
RESULTS = "WEIGHTPORT_RESULTS_OF_TESTS"
OUT_OF_SCOPE = re.compile(
    "ip.?adapter|attn_proc|attention_processor|training|gradient|xformers|offload|device_map|lora"
    "|parallel|compile|quant|layerwise|_cache|flash|_deprecated_kwargs|custom_diffusion",
    re.IGNORECASE,
)


class Outcome(NamedTuple):
    """What became of a test, and if it failed the first line of its error."""

    passed: bool
    error: str = ""


# --- inside pytest: this file is its plugin -------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Put our classes in the place of diffusers', before a test is imported."""
    import diffusers  # before the conftest of the clone puts its own in front

    _stand_in_for_the_hub()
    if os.environ.get(ON_OURS):
        import weightport
        from weightport.runtime.registry import PIPELINES as OURS
        from weightport.runtime.registry import PUBLIC

        for name in PUBLIC:
            if not hasattr(diffusers, name):
                continue
            theirs = getattr(diffusers, name)
            setattr(diffusers, name, getattr(weightport, name))
            if name in OURS:  # some tests import them from where they are
                setattr(sys.modules[theirs.__module__], name, getattr(weightport, name))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down what became of a test."""
    if report.skipped or (report.passed and report.when != "call"):
        return
    lines = str(report.longrepr or "").strip().splitlines()
    told = [line[1:].strip() for line in lines if line.startswith("E ")]
    entry = {"test": report.nodeid, "passed": report.passed, "error": told[0] if told else ""}
    with Path(os.environ[RESULTS]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _stand_in_for_the_hub() -> None:
    """A tokenizer of so many tokens, under the name that the tests ask the Hub for."""
    import transformers

    folder = tempfile.mkdtemp()
    _write_tokenizer(Path(folder))
    known = transformers.CLIPTokenizer.from_pretrained

    def from_pretrained(name: Any, *arguments: Any, **named: Any) -> Any:
        return known(folder if name == TOKENIZER else name, *arguments, **named)

    transformers.CLIPTokenizer.from_pretrained = from_pretrained


def _write_tokenizer(folder: Path) -> None:
    """A vocabulary of bytes, without merges."""
    codes = (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))
    letters = [chr(code) for code in codes]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: place for place, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# --- outside --------------------------------------------------------------------------------------


def run(clone: Path, paths: tuple[str, ...], select: str, ours: bool) -> dict[str, Outcome]:
    """The tests of some paths, with ours or diffusers' classes: test -> outcome."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results")
        results.touch()
        here = Path(__file__).resolve()
        paths_of_python = [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths_of_python)),
            "HF_HUB_OFFLINE": "1",
            RESULTS: str(results),
            ON_OURS: "1" if ours else "",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", here.stem, "-p", "no:cacheprovider"]
        command += ["-c", os.devnull, "--rootdir", str(clone), "--no-header", "--tb=short"]
        command += ["-k", select] if select else []
        command += [str(clone / "tests" / path) for path in paths]
        subprocess.run(command, cwd=clone, env=environment, stdout=subprocess.DEVNULL, check=False)
        return dict(_read(results))


def _read(results: Path) -> Iterator[tuple[str, Outcome]]:
    for line in results.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        yield entry["test"], Outcome(entry["passed"], entry["error"])


def main() -> int:
    """Run the groups that are asked for and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clone", type=Path)
    parser.add_argument("groups", nargs="*", default=list(GROUPS))
    parser.add_argument("-k", dest="select", default="", help="only tests like this, as in pytest")
    arguments = parser.parse_args()
    failures: dict[str, str] = {}
    print("| tests of | diffusers passes | ours pass | out of scope |")
    print("|---|---|---|---|")
    for group in arguments.groups:
        theirs = run(arguments.clone, GROUPS[group], arguments.select, ours=False)
        ours = run(arguments.clone, GROUPS[group], arguments.select, ours=True)
        counted = [test for test, outcome in theirs.items() if outcome.passed]
        failing = [test for test in counted if test not in ours or not ours[test].passed]
        beyond = [test for test in failing if OUT_OF_SCOPE.search(test)]
        good = len(counted) - len(failing)
        print(f"| {group} | {len(counted)} | {good} | {len(beyond)} |", flush=True)
        for test in failing:
            failures[test] = ours[test].error if test in ours else "not run"
    for test, error in failures.items():
        print(f"{test}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
