"""The model card of a converted repo, `README.md`, made from `conversion.json` and `parity.json`
alone.

The metadata is laid out as `huggingface_hub.ModelCardData` does, so that both write the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import ConversionError, printable
from ...mappings.families import families

START = "<!-- weightport: written anew by `weightport push`; what is above or below stays -->"
END = "<!-- /weightport -->"
_PROMPT = "a photograph of an astronaut riding a horse"
_IMAGES = {  # what a pipeline is called with beside the prompt, by the end of its class
    "InpaintPipeline": ("image", "mask_image"),
    "ControlNetInpaintPipeline": ("image", "mask_image", "control_image"),
    "InstructPix2PixPipeline": ("image",),
    "2ImgPipeline": ("image",),
    "UpscalePipeline": ("image",),
    "ControlNetPipeline": ("image",),
}
_TEXT_TO_IMAGE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def check_license(license: str) -> str:
    """A licence as the Hub knows it.

    Raises:
        ConversionError: it cannot be one.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ConversionError(
            f"--license {printable(license)}: write it as the Hub does, such as"
            " creativeml-openrail-m"
        )
    return license


def check_base_model(base_model: str) -> str:
    """A Hub id.

    Raises:
        ConversionError: it cannot be one.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model, re.ASCII):
        raise ConversionError(
            f"--base-model {printable(base_model)}: not a Hub id (organisation/name)"
        )
    return base_model


def metadata(report: Mapping[str, Any], class_name: str | None) -> dict[str, Any]:
    """What the Hub reads at the top of the card, sorted; `class_name` is the pipeline's, if there
    is one."""
    options = report["options"]
    kerascv = any(table.startswith("kerascv") for table in report["tables"])
    data = {
        "base_model": options.get("base_model"),
        "library_name": "diffusers",
        "license": options.get("license"),
        "pipeline_tag": (
            "text-to-image" if class_name in (None, *_TEXT_TO_IMAGE) else "image-to-image"
        ),
        "tags": [*(["keras-cv"] if kerascv else []), "stable-diffusion", "weightport"],
    }
    return {key: value for key, value in data.items() if value is not None}


def model_card(report: Mapping[str, Any], class_name: str | None) -> str:
    """The card as `convert` writes it into the repo."""
    return f"---\n{_yaml(metadata(report, class_name))}---\n\n{body(report, class_name)}\n"


def body(
    report: Mapping[str, Any],
    class_name: str | None,
    place: str = ".",
    revision: str | None = None,
    parity: Mapping[str, Any] | None = None,
) -> str:
    """The part of the card that is weightport's.

    Args:
        report: the content of `conversion.json`.
        class_name: the pipeline's; None for a ControlNet alone.
        place: what the usage snippets load: the folder itself, or a Hub id.
        revision: the branch to load from.
        parity: the content of `parity.json`.
    """
    title = families()[report["family"]].title
    sections = [
        START,
        f"# {title}, converted by weightport",
        "## Use",
        *_usage(report, class_name, place, revision),
        "## How it was converted",
        *_conversion(report),
        "## Parity",
        *_parity(parity),
        END,
    ]
    return "\n\n".join(sections)


def refresh(text: str, new_body: str) -> str:
    """A card with weightport's part replaced; one without that part stays as it is."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    return before + new_body + after if start and end else text


def _yaml(data: Mapping[str, Any]) -> str:
    lines = []
    for key, value in data.items():
        lines += (
            [f"{key}:", *(f"- {item}" for item in value)]
            if isinstance(value, list)
            else [f"{key}: {value}"]
        )
    return "".join(f"{line}\n" for line in lines)


# --- sections -------------------------------------------------------------------------------------


def _usage(
    report: Mapping[str, Any], class_name: str | None, place: str, revision: str | None
) -> Iterator[str]:
    gaps = [note.removeprefix("lacks ") for note in report["notes"] if note.startswith("lacks ")]
    if gaps:
        yield "Not a whole pipeline: it lacks " + "; ".join(map(_cell, gaps)) + "."
        return
    variant = report["options"].get("variant")
    keywords = {"variant": variant, "revision": revision}
    where = "".join(
        [f'"{place}"', *(f', {name}="{value}"' for name, value in keywords.items() if value)]
    )
    for library in ("weightport", "diffusers"):
        yield f"```python\n{_snippet(class_name, library, where)}\n```"


def _snippet(class_name: str | None, library: str, where: str) -> str:
    if class_name is None:
        return (
            f"from {library} import ControlNetModel\n\ncontrolnet ="
            f" ControlNetModel.from_pretrained({where})"
        )
    endings = [ending for ending in _IMAGES if class_name.endswith(ending)]
    images = _IMAGES[max(endings, key=len)] if endings else ()
    arguments = "".join(f', {name}=Image.open("{name}.png")' for name in images)
    imports = [
        f"from {library} import DiffusionPipeline",
        *(["from PIL import Image"] if images else []),
    ]
    calls = [
        f"pipe = DiffusionPipeline.from_pretrained({where})",
        f'image = pipe("{_PROMPT}"{arguments}).images[0]',
    ]
    return "\n".join([*imports, "", *calls, 'image.save("image.png")'])


def _conversion(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"By weightport {report['weightport_version']}, every tensor accounted for:"
        " [`conversion.json`](conversion.json) has the source and the operation of each, what was"
        " left out and why, and the sha256 of every file."
    )
    sources = [
        (source["part"], name, source["format"], f"`{sha256}`")
        for source in report["sources"]
        for name, sha256 in (source["files"] or {source["path"]: "not recorded"}).items()
    ]
    yield _table(("part", "source", "format", "sha256"), sources)
    yield _table(
        ("table", "sha256"), [(name, f"`{sha256}`") for name, sha256 in report["tables"].items()]
    )
    options = {
        k: v
        for k, v in report["options"].items()
        if v is not False and k not in ("license", "base_model")
    }
    facts = [*(f"`{name}`: {value}" for name, value in options.items()), *report["notes"]]
    if facts:
        yield "\n".join(f"- {_cell(fact)}" for fact in facts)


def _parity(parity: Mapping[str, Any] | None) -> Iterator[str]:
    if parity is None:
        yield (
            "Not checked: `weightport parity` compares the outputs with those of the source"
            " framework."
        )
        return
    verdict = "All checks passed" if parity["passed"] else "**Failed**"
    yield f"{verdict}, in {parity['dtype']}; the whole report is [`parity.html`](parity.html)."
    rows = []
    for check in parity["checks"]:
        error, as_diffusers = check["matched"], check["as_diffusers"]
        rows.append(
            (
                check["name"],
                check["against"],
                _number(error["relative_l2"]),
                _number(check["tolerance"]),
                _number(error["max_abs"]),
                _number(as_diffusers["relative_l2"]) if as_diffusers else "the same",
                "passed" if check["passed"] else "**failed**",
            )
        )
    head = (
        "model",
        "against",
        "relative L2",
        "tolerance",
        "max abs",
        "relative L2 as diffusers runs it",
        "",
    )
    yield _table(head, rows)


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.1e}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *[[_cell(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot end a cell or a line, nor become HTML or a link."""
    return re.sub(r"[|<]|(?<=\])\(", r"\\\g<0>", printable(text, limit=500))
