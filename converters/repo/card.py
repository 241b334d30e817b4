"""The model card of a converted repo, `README.md`.

It is made from `conversion.json` and `parity.json` alone. The metadata is laid out as
`huggingface_hub.ModelCardData` does, so that both write the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import ConversionError, printable
from ...mappings.facts import facts
from ...mappings.families import families

START = "<!-- weightport: written anew by `weightport push`; what is above or below stays -->"
END = "<!-- /weightport -->"
_CELL = 500  # characters of a cell at most


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
    """What the Hub reads at the top of the card, sorted.

    Args:
        report: the content of `conversion.json`.
        class_name: the pipeline's; None for a ControlNet alone.
    """
    options = report["options"]
    task: str | None = (
        "image-to-image" if class_name and _images_of(class_name) else "text-to-image"
    )
    if not _is_known(class_name):
        task = None
    data = {
        "base_model": options.get("base_model"),
        "base_model_relation": "merge" if report.get("adapters") else None,
        "library_name": "diffusers",
        "license": options.get("license"),
        "pipeline_tag": task,
        "tags": [*_origins(report), families()[report["family"]].tag, "weightport"],
    }
    return {key: value for key, value in data.items() if value is not None}


def _origins(report: Mapping[str, Any]) -> list[str]:
    """Tags that say where a model comes from."""
    tags: dict[str, str] = facts("card")["tags"]
    names = list(report["tables"])
    return [
        tag for beginning, tag in tags.items() if any(name.startswith(beginning) for name in names)
    ]


def _is_known(class_name: str | None) -> bool:
    """Whether a pipeline is one that we know how to call; a ControlNet alone has none."""
    classes: set[str | None] = {None}
    for family in families().values():
        classes |= {*family.pipelines.values()}
        for component in family.components.values():
            classes |= {*component.pipelines.values()}
    return class_name in classes


def _images_of(class_name: str) -> list[str]:
    """The images that a pipeline is called with, beside the prompt."""
    known: dict[str, list[str]] = facts("card")["images"]
    return known.get(class_name, [])


def model_card(report: Mapping[str, Any], class_name: str | None) -> str:
    """The card as `convert` writes it into the repo."""
    return f"---\n{front_matter(metadata(report, class_name))}---\n\n{body(report, class_name)}\n"


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


def front_matter(data: Mapping[str, Any]) -> str:
    """Metadata as `huggingface_hub` writes it."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list):
            lines.append(f"{key}:")
            lines += [f"- {item}" for item in value]
        else:
            lines.append(f"{key}: {value}")
    return "".join(f"{line}\n" for line in lines)


# --- sections -------------------------------------------------------------------------------------


def _usage(
    report: Mapping[str, Any], class_name: str | None, place: str, revision: str | None
) -> Iterator[str]:
    gaps = [note.removeprefix("lacks ") for note in report["notes"] if note.startswith("lacks ")]
    if gaps:
        yield f"Not a whole pipeline: it lacks {'; '.join(map(cell, gaps))}."
        return
    keywords = {"variant": report["options"].get("variant"), "revision": revision}
    given = [f'{name}="{value}"' for name, value in keywords.items() if value]
    where = ", ".join([f'"{place}"', *given])
    if not _is_known(class_name):
        yield f"A `{class_name}`, which its own documentation says how to call:"
        yield f"```python\n{_loading(where)}\n```"
        return
    if families()[report["family"]].runs:
        yield f"```python\n{_snippet(class_name, 'weightport', where)}\n```"
    told = ", ".join([where, *(f"{name}=None" for name in _absent(report))])
    yield f"```python\n{_snippet(class_name, 'diffusers', told)}\n```"


def _absent(report: Mapping[str, Any]) -> list[str]:
    """What diffusers loads a pipeline without only if it is told so."""
    family = families()[report["family"]]
    absent = [name for name in family.optional if name not in report["components"]]
    tokenizers = family.tokenizers.items()
    return absent + [name for name, tokenizer in tokenizers if tokenizer.encoder in absent]


def _loading(where: str) -> str:
    """How diffusers loads a pipeline, whatever its class."""
    return "\n".join(
        [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({where})",
        ]
    )


def _snippet(class_name: str | None, library: str, where: str) -> str:
    if class_name is None:
        return "\n".join(
            [
                f"from {library} import ControlNetModel",
                "",
                f"controlnet = ControlNetModel.from_pretrained({where})",
            ]
        )
    images = _images_of(class_name)
    arguments = [f'"{facts("card")["prompt"]}"']
    arguments += [f'{name}=Image.open("{name}.png")' for name in images]
    lines = [f"from {library} import DiffusionPipeline"]
    if images:
        lines.append("from PIL import Image")
    lines += [
        "",
        f"pipe = DiffusionPipeline.from_pretrained({where})",
        f"image = pipe({', '.join(arguments)}).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def _conversion(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"By weightport {report['weightport_version']}, every tensor accounted for:"
        " [`conversion.json`](conversion.json) has the source and the operation of each, what was"
        " left out and why, and the sha256 of every file."
    )
    yield table(("part", "source", "format", "sha256"), list(_sources(report)))
    if report.get("adapters"):
        yield table(
            ("adapter", "component", "strength", "modules", "relative change", "sha256"),
            list(_adapters(report)),
        )
    tables = [(name, f"`{sha256}`") for name, sha256 in report["tables"].items()]
    yield table(("table", "sha256"), tables)
    said = [f"`{name}`: {value}" for name, value in _options(report).items()]
    said += report["notes"]
    if said:
        yield "\n".join(f"- {cell(one)}" for one in said)


def _sources(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """A row for each file that was read."""
    for source in report["sources"]:
        files = source["files"] or {source["path"]: "not recorded"}
        for name, sha256 in files.items():
            yield source["part"], name, source["format"], f"`{sha256}`"


def _adapters(report: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each component that an adapter changed."""
    for adapter in report["adapters"]:
        hashes = ", ".join(f"`{sha256}`" for sha256 in adapter["files"].values())
        for component, entry in adapter["components"].items():
            modules = ", ".join(f"{count} {title}" for title, count in entry["modules"].items())
            yield (
                adapter["path"],
                component,
                f"{entry['strength']:g}",
                modules,
                f"{entry['relative_change']:.1%}",
                hashes or "not recorded",
            )


def _options(report: Mapping[str, Any]) -> dict[str, Any]:
    """The options that changed what was written; those of the card are at its top."""
    return {
        name: value
        for name, value in report["options"].items()
        if value is not False and name not in ("license", "base_model")
    }


def _parity(parity: Mapping[str, Any] | None) -> Iterator[str]:
    if parity is None:
        yield (
            "Not checked: `weightport parity` compares the outputs with those of the source"
            " framework."
        )
        return
    verdict = "All checks passed" if parity["passed"] else "**Failed**"
    yield f"{verdict}, in {parity['dtype']}; the whole report is [`parity.html`](parity.html)."
    head = (
        "model",
        "against",
        "relative L2",
        "tolerance",
        "max abs",
        "relative L2 as diffusers runs it",
        "",
    )
    yield table(head, [_checked(check) for check in parity["checks"]])


def _checked(check: Mapping[str, Any]) -> list[str]:
    """The row of a check."""
    error = check["matched"]
    other = check["as_diffusers"]
    return [
        check["name"],
        check["against"],
        _number(error["relative_l2"]),
        _number(check["tolerance"]),
        _number(error["max_abs"]),
        _number(other["relative_l2"]) if other else "the same",
        "passed" if check["passed"] else "**failed**",
    ]


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.1e}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head), ["---"] * len(head)]
    lines += [[cell(text) for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Text that cannot end a cell or a line, nor become HTML or a link."""
    return re.sub(r"[|<]|(?<=\])\(", r"\\\g<0>", printable(text, limit=_CELL))
