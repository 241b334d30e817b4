"""An option is written once: `weightport.convert`, `Settings` and the command line say the same."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

import weightport
from weightport.api import convert
from weightport.cli import _parser
from weightport.converters import conversion
from weightport.converters.settings import Settings, options

from ..support.command_line import lines

PLACES = {"sources", "output", "base", "progress"}  # where from and where to, no settings
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "command_line.txt"


def command(name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    (actions,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    parser: argparse.ArgumentParser = actions.choices[name]
    return parser


def test_convert_takes_the_settings() -> None:
    parameters = inspect.signature(convert).parameters
    assert parameters.keys() - PLACES == options(Settings).keys()
    for name, option in options(Settings).items():
        assert parameters[name].default == option.typed, name


def test_literal_types_are_the_choices() -> None:
    for name, kind in get_type_hints(convert, localns=vars(conversion)).items():
        literals = [kind] if get_origin(kind) is Literal else list(get_args(kind))
        for literal in literals:
            if get_origin(literal) is Literal:
                assert set(get_args(literal)) == set(options(Settings)[name].choices), name


def test_the_command_takes_the_settings() -> None:
    actions = {action.dest: action for action in command("convert")._actions}
    for name, option in options(Settings).items():
        is_repeated = isinstance(option.typed, tuple) and option.parse is str
        default = list(option.typed) if is_repeated else option.typed
        assert actions[name].default == default, name
        assert tuple(actions[name].choices or ()) == tuple(option.choices), name


def test_every_option_has_words() -> None:
    assert all(option.help for option in options(Settings).values())


def test_the_command_line_is_as_written() -> None:
    """An option appears or vanishes only together with its line, and a line in the changelog."""
    assert lines() == GOLDEN.read_text().splitlines()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"to": "nonsense"},
            "--to nonsense: unknown; one of diffusers, kerascv, kerashub, ldm, kohya, kohya-sgm, peft,"
            " diffusers-processors, original, onetrainer, xlabs, a1111, clip, text-encoders",
        ),
        ({"dtype": "F16"}, "--dtype F16: unknown; one of keep, float32, float16, bfloat16"),
        ({"text_activation": "relu"}, "--text-activation relu: unknown; one of tanh, erf"),
        (
            {"prediction_type": "sample"},
            "--prediction-type sample: unknown; one of epsilon, v_prediction",
        ),
    ],
)
def test_what_an_option_does_not_offer_is_refused(
    given: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(weightport.ConversionError) as error:
        weightport.convert("none.h5", tmp_path / "out", **given)  # type: ignore[arg-type]
    assert str(error.value) == message
