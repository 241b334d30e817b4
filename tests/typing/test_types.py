"""What type checkers and `inspect.signature` say of public calls."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from PIL import Image

pytest.importorskip("torch")

import weightport
from weightport.runtime.registry import PIPELINES, PUBLIC
from weightport.runtime.sampling import arguments

ROOT = Path(__file__).resolve().parents[2]
CASES = sorted(Path(__file__).parent.glob("cases_*.py"))
SD3: dict[str, Any] = {"guidance_scale": 7.0, "max_sequence_length": 256}
FLUX_PARTLY: dict[str, Any] = {"guidance_scale": 7.0, "num_inference_steps": 28, "strength": 0.6}
# pipeline -> what diffusers gives other defaults than others have
OTHER_DEFAULTS: dict[str, dict[str, Any]] = {
    "StableDiffusionInpaintPipeline": {"strength": 1.0},
    "StableDiffusionInstructPix2PixPipeline": {"num_inference_steps": 100},
    "LatentConsistencyModelPipeline": {"num_inference_steps": 4, "guidance_scale": 8.5},
    "LatentConsistencyModelImg2ImgPipeline": {"num_inference_steps": 4, "guidance_scale": 8.5},
    "StableDiffusionUpscalePipeline": {"num_inference_steps": 75, "guidance_scale": 9.0},
    "StableDiffusionControlNetImg2ImgPipeline": {"controlnet_conditioning_scale": 0.8},
    "StableDiffusionControlNetInpaintPipeline": {
        "controlnet_conditioning_scale": 0.5,
        "strength": 1.0,
    },
    "StableDiffusionXLPipeline": {"guidance_scale": 5.0},
    "StableDiffusionXLImg2ImgPipeline": {"guidance_scale": 5.0, "strength": 0.3},
    "StableDiffusionXLInpaintPipeline": {"guidance_scale": 7.5, "strength": 0.9999},
    "StableDiffusionXLInstructPix2PixPipeline": {
        "guidance_scale": 5.0,
        "num_inference_steps": 100,
    },
    "StableDiffusionXLControlNetPipeline": {"guidance_scale": 5.0},
    "StableDiffusionXLControlNetImg2ImgPipeline": {
        "guidance_scale": 5.0,
        "controlnet_conditioning_scale": 0.8,
    },
    "StableDiffusionXLControlNetInpaintPipeline": {"guidance_scale": 5.0, "strength": 0.9999},
    "StableDiffusion3Pipeline": {**SD3, "num_inference_steps": 28},
    "StableDiffusion3Img2ImgPipeline": {**SD3, "strength": 0.6},
    "StableDiffusion3InpaintPipeline": {**SD3, "strength": 0.6},
    "FluxPipeline": {"guidance_scale": 3.5, "num_inference_steps": 28},
    "FluxImg2ImgPipeline": FLUX_PARTLY,
    "FluxInpaintPipeline": FLUX_PARTLY,
    "FluxFillPipeline": {"guidance_scale": 30.0, "strength": 1.0},
    "FluxControlPipeline": {"guidance_scale": 3.5, "num_inference_steps": 28},
    "FluxKontextPipeline": {"guidance_scale": 3.5, "num_inference_steps": 28},
}


@pytest.fixture(scope="module")
def said() -> dict[str, dict[int, list[str]]]:
    """File -> line -> what mypy says of it; one process for all files, with the project's cache."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-pretty", "--no-error-summary"]
    paths = [str(path.relative_to(ROOT)) for path in CASES]
    ran = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    found: dict[str, dict[int, list[str]]] = {}
    for file, line, message in re.findall(r"^(.+?):(\d+): (.*)$", ran.stdout, re.MULTILINE):
        found.setdefault(Path(file).name, {}).setdefault(int(line), []).append(message)
    return found


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_mypy_says_what_the_comments_say(path: Path, said: dict[str, Any]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    mine = said.get(path.name, {})
    for number, line in enumerate(lines, 1):
        messages = mine.pop(number, [])
        _, _, expected = line.partition("  # ")
        if expected.startswith("error: "):
            assert any(expected in message for message in messages), (line, messages)
        elif "reveal_type(" in line:
            (message,) = messages
            assert plain(message) == expected, (line, message)
        else:
            assert messages == [], (line, messages)
    assert mine == {}


def plain(message: str) -> str:
    """The type in mypy's note, without modules and marks of older versions."""
    revealed = message.partition('"')[2].rpartition('"')[0]
    revealed = re.sub(r"^tuple\[.* fallback=(.*)\]$", r"\1", revealed)  # a named one
    return re.sub(r"(\w+\.)+", "", revealed).replace("builtins.", "")


def test_type_checkers_see_every_public_class() -> None:
    from weightport.runtime import public

    assert set(public.__all__) == set(PUBLIC)
    assert all(getattr(public, name) is getattr(weightport, name) for name in PUBLIC)


def hints_of(described: Any) -> dict[str, Any]:
    """Its hints, with what is imported for type checkers alone."""
    return get_type_hints(described, localns={"Image": Image})


def parts() -> dict[str, tuple[Any, Any]]:
    """Name -> type and default of every argument that sampling knows."""
    known: dict[str, tuple[Any, Any]] = {}
    for part in hints_of(arguments.Arguments).values():
        hints = hints_of(part)
        known |= {one.name: (hints[one.name], one.default) for one in fields(part)}
    known["return_dict"] = (bool, True)  # of the call alone, as the next
    known["cross_attention_kwargs"] = (dict[str, float] | None, None)
    known["joint_attention_kwargs"] = (dict[str, float] | None, None)
    return known | dict.fromkeys(arguments.REFUSED, (type(None), None))


def test_arguments_have_one_part_each() -> None:
    kinds: Sequence[Any] = list(hints_of(arguments.Arguments).values())
    names = [one.name for kind in kinds for one in fields(kind)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", PIPELINES)
def test_calls_have_the_arguments_of_sampling(name: str) -> None:
    known = parts()
    kind = getattr(weightport, name)
    hints = hints_of(kind.__call__)
    others = OTHER_DEFAULTS.get(name, {})
    for argument, parameter in list(inspect.signature(kind.__call__).parameters.items())[1:]:
        is_control = argument == "image" == kind.control_argument
        hint, default = known["control_image" if is_control else argument]
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert hints[argument] == hint, argument
        assert parameter.default == others.get(argument, default), argument


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_are_encoded_by_the_arguments_of_sampling(name: str) -> None:
    known = parts()
    method = getattr(weightport, name).encode_prompt
    hints = hints_of(method)
    own = {"device": None, "do_classifier_free_guidance": True, "lora_scale": None}
    others = OTHER_DEFAULTS.get(name, {})
    for argument, parameter in list(inspect.signature(method).parameters.items())[1:]:
        if argument in own:
            assert parameter.default == own[argument]
        else:
            hint, default = known[argument]
            expected = (hint, others.get(argument, default))
            assert (hints[argument], parameter.default) == expected, argument
