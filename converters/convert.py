"""The conversion itself: sources -> parts -> plan -> a staged output that appears whole or not at
all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import ConversionError, printable
from ..io.atomic import check_apart
from ..io.collector import collector_paused
from ..io.dtypes import EIGHT_BITS, KEEP, WORDS
from ..mappings.families import Family, families, halves, halves_of
from ..mappings.layouts import layouts
from .checkpoint import Checkpoint
from .conversion import Conversion
from .hashing import hash_beside_readers
from .layouts.folders import is_hub_cache, located
from .layouts.source import Source
from .layouts.sources import open_source
from .outputs import OUTPUTS
from .planning.family import choose_family, shared
from .planning.heads import choose_heads
from .planning.plan import PlannedComponent, plan
from .planning.recognise import Recognition, complete, recognise
from .planning.strays import without_strays
from .repeats import check_repeats
from .repo.carried import Carried, carried_from
from .repo.index import lacking
from .repo.tokenizer import named_placeholders, placeholder_notes
from .settings import Settings

_MOST_OF_WORDS = 64 << 20  # bytes of a file of them


def convert(
    sources: Sequence[Path],
    output: Path,
    base: Path | None,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> Conversion:
    """Convert sources, filled up from a base, into a diffusers repo or Keras files.

    Args:
        progress: called with (bytes just written, bytes in all).

    Raises:
        ConversionError: anything a user can act on; nothing is left behind.
    """
    named = as_sources(sources, settings)
    if settings.is_of_adapters:
        return _adapters(named, base, output, settings, progress)
    if _are_words(named, settings) or settings.is_of_embeddings:
        return _embeddings(named, base, output, settings)
    others = [path for path in (base, settings.vae) if path]
    check_apart(output, [*sources, *_changes(settings), *others])
    writer = OUTPUTS[settings.to]
    with planned(named, base, settings) as (conversion, settings):
        if settings.dry_run:
            writer.describe(conversion, settings)
        else:
            conversion.output = output
            writer.layout.write(conversion, output, settings, progress)
            if conversion.baking and not writer.is_repo:
                conversion.report["adapters"] = conversion.baking.report(settings.hashes)
                conversion.notes += conversion.baking.notes()
    return conversion


@contextmanager
def planned(
    sources: Sequence[Source],
    base: Path | None,
    settings: Settings,
) -> Iterator[tuple[Conversion, Settings]]:
    """A conversion that is planned, and not written yet; and the settings that it is to be written
    with. At the end the sources must be what they were.

    Raises:
        ConversionError: anything a user can act on.
    """
    with collector_paused():
        conversion, settings, parts = _plan(sources, base, settings)
    yield conversion, settings
    checkpoints = [part.checkpoint for part in parts]
    checkpoints += [one for taught in conversion.taught for one in taught.checkpoints]
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()


def _plan(
    sources: Sequence[Source], base: Path | None, settings: Settings
) -> tuple[Conversion, Settings, list[Recognition]]:
    writer = OUTPUTS[settings.to]
    _check_revision(sources, settings.revision)
    opened = open_sources(sources)
    if not settings.dry_run:
        hashed = writer.is_repo and settings.hashes
        files = list(dict.fromkeys(file for one in opened for file in one.files))
        for file in files:
            file.pass_through(readers=2 if hashed else 1)
        if hashed:
            hash_beside_readers(files)
    parts = recognised(opened)
    if settings.ema and not any(checkpoint.average for checkpoint in opened):
        raise ConversionError(f"{sources[0].path}: --ema, but the file holds no moving average")
    if settings.vae is not None:
        parts = _with_vae(parts, settings.vae, settings)
    family, parts, components = _planned(parts, base, settings)
    choose_heads(components, family, settings.heads)
    conversion = Conversion(family.name, components, None, base=base)
    if settings.lora:
        from .baking import bake

        conversion.baking = bake(components, family, settings)
    carried = None
    if writer.is_repo:
        settings = _with_tokens(conversion, settings)
        carried = carried_from(family, components, settings.component is None, base)
        _take_notes(conversion, parts, carried, settings)
    if settings.embedding:
        from .vocabulary import teach

        conversion.taught = teach(components, family, settings)
        conversion.notes += [note for one in conversion.taught for note in one.notes]
    conversion.notes += _left_out(parts, carried)
    conversion.notes += _eight_bit_notes(components, settings.dtype)
    return conversion, settings, parts


def _planned(
    parts: list[Recognition], base: Path | None, settings: Settings
) -> tuple[Family, list[Recognition], dict[str, PlannedComponent]]:
    """The family, the parts with those of a base, and the components that they make."""
    family, parts = _with_base(parts, base, settings)
    components = plan(parts, family)
    check_repeats(components.values(), read=not settings.dry_run)
    if settings.component is not None:
        components = _only(components, settings.component)
    return family, parts, components


# --- what few ask for: each imports its own road --------------------------------------------------


def _adapters(
    sources: Sequence[Source],
    base: Path | None,
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> Conversion:
    """Adapters, or the factors of LoRA beside a model's weights, written as one."""
    from .adapters import are_adapters, convert_adapters, convert_factors

    if are_adapters(sources, settings):
        return convert_adapters(sources, output, settings, progress)
    check_apart(output, [*(one.path for one in sources), *([base] if base else [])])
    parts = recognised(open_sources(sources))
    family, _, components = _planned(parts, base, settings)
    return convert_factors(components, family, output, settings, progress)


def _changes(settings: Settings) -> list[Path]:
    """The adapters and embeddings that change a model."""
    adapters = []
    if settings.lora:
        from .baking import parse_lora

        adapters = [Path(parse_lora(text)[0]) for text in settings.lora]
    return [*adapters, *map(Path, settings.embedding)]


def _are_words(sources: Sequence[Source], settings: Settings) -> bool:
    """Whether the source is a file of words, or a LoRA from which they are asked for."""
    if len(sources) != 1 or settings.embedding:
        return False
    source = sources[0]
    path = source.path
    if path.is_file() and path.stat().st_size > _MOST_OF_WORDS and not settings.extract_embeddings:
        return False
    if not path.exists():
        return False
    is_bundle = settings.extract_embeddings and path.is_file() and source.is_adapter
    return is_bundle or source.is_embedding


def _embeddings(
    sources: Sequence[Source], base: Path | None, output: Path, settings: Settings
) -> Conversion:
    """Words, or those that a model was taught, written as a file of them."""
    from .embeddings import convert_embeddings
    from .layouts.embeddings import open_embeddings
    from .vocabulary import words_of

    if _are_words(sources, settings):
        return convert_embeddings(open_embeddings(sources[0]), output, settings)
    parts = recognised(open_sources(sources))
    family, _, components = _planned(parts, base, settings)
    words = words_of([one.path for one in sources], components, family, settings)
    settings = replace(settings, placeholder_tokens=())  # they have their names
    return convert_embeddings(words, output, settings)


def _check_revision(sources: Sequence[Source], revision: str | None) -> None:
    if revision is not None and not any(is_hub_cache(one.path) for one in sources):
        raise ConversionError(
            f"--revision {printable(revision)}: no source is the folder of a Hub cache"
        )


# --- what is said of a repo -----------------------------------------------------------------------


def _with_tokens(conversion: Conversion, settings: Settings) -> Settings:
    """The settings with a name for each token row that textual inversion added."""
    given = settings.placeholder_tokens
    tokens = named_placeholders(conversion.architecture, conversion.components, given)
    return replace(settings, placeholder_tokens=tokens)


def _take_notes(
    conversion: Conversion,
    parts: Sequence[Recognition],
    carried: Carried | None,
    settings: Settings,
) -> None:
    """What the user should know of the repo, and what it lacks."""
    family = conversion.architecture
    if not settings.family:
        conversion.notes += _choice_notes(family, parts)
    conversion.notes += _width_notes(conversion.components)
    conversion.notes += placeholder_notes(settings.placeholder_tokens)
    if carried is not None:
        conversion.notes += carried.notes
    if settings.component is None:
        conversion.lacks = lacking(family, conversion.components, carried)


def _left_out(parts: Sequence[Recognition], carried: Carried | None) -> list[str]:
    """The folders of repositories that are neither converted nor taken over, and why."""
    notes = []
    for part in parts:
        checkpoint = part.checkpoint
        taken = carried.folders if carried and carried.repo == checkpoint.path else ()
        for name, reason in checkpoint.skipped.items():
            if name.endswith("/") and name.removesuffix("/") not in taken:
                notes.append(f"left out: {reason}")
    return notes


def _eight_bit_notes(components: Mapping[str, PlannedComponent], wanted: str) -> list[str]:
    """Which components hold floats of eight bits, and what becomes of them."""
    notes = []
    for name, component in components.items():
        small = [tensor for tensor in component.tensors.values() if tensor.dtype in EIGHT_BITS]
        if small and wanted == KEEP:
            kinds = " and ".join(sorted({WORDS[tensor.dtype] for tensor in small}))
            notes.append(
                f"{name}: {len(small)} tensors of {kinds} become bfloat16, which holds them"
                " exactly; --dtype chooses another"
            )
    return notes


def _choice_notes(family: Family, parts: Sequence[Recognition]) -> list[str]:
    """Which families the sources fit as well."""
    others = [families()[name].title for name in shared(parts) if name != family.name]
    if not others:
        return []
    return [
        f"configured for {family.title}, but the weights fit {', '.join(others)} as well: --family"
        " chooses"
    ]


def _width_notes(components: Mapping[str, PlannedComponent]) -> list[str]:
    """How the components' configs differ from the stock family's, as their tensors say."""
    notes = []
    for name, component in components.items():
        unusual = component.described.unusual(component.config)
        own = [f"{key} {value} (stock {stock})" for key, (value, stock) in unusual.items()]
        if own:
            notes.append(f"{name} has sizes of its own: {', '.join(own)}")
    return notes


# --- sources --------------------------------------------------------------------------------------


def gather(sources: Sequence[Path], settings: Settings) -> list[Recognition]:
    """Open and recognise every source.

    Raises:
        ConversionError: a source cannot be read, or is not a whole part of a known model.
    """
    return recognised(open_sources(as_sources(sources, settings)))


def as_sources(paths: Sequence[Path], settings: Settings) -> list[Source]:
    """What a user names, to be read as the settings say; each is read once."""
    return [Source(path, settings.lora_alpha, settings.ema, settings.revision) for path in paths]


def open_sources(sources: Sequence[Source]) -> list[Checkpoint]:
    """Open every source; one checkpoint for each part."""
    opened = []
    for source in sources:
        opened += open_source(source)
    return opened


def recognised(checkpoints: Sequence[Checkpoint]) -> list[Recognition]:
    """Recognise every part, less strays of other models in a file.

    Raises:
        ConversionError: one is not a whole part of a known model.
    """
    parts = without_strays([recognise(checkpoint) for checkpoint in checkpoints])
    for part in parts:
        complete(part)
    return parts


def _with_vae(parts: list[Recognition], path: Path, settings: Settings) -> list[Recognition]:
    """The parts with the VAE of another file in place of their own."""
    found = gather([path], replace(settings, ema=False))
    baked = [part for part in found if _is_autoencoder(part)]
    if not baked:
        raise ConversionError(f"--vae {path}: holds no VAE")
    # what else its file holds is not of this model
    alone = [_within(part, None) for part in baked]
    old = [part.checkpoint for part in parts if _is_autoencoder(part)]
    files = {id(one.whole): _without(one.whole, one) for one in old if one.whole is not None}
    kept = []
    for part in parts:
        whole = part.checkpoint.whole
        if not _is_autoencoder(part):
            kept.append(_within(part, files.get(id(whole), whole)))
    return kept + alone


def _within(part: Recognition, whole: Checkpoint | None) -> Recognition:
    """A part as one of another file."""
    return replace(part, checkpoint=replace(part.checkpoint, whole=whole))


def _without(whole: Checkpoint, part: Checkpoint) -> Checkpoint:
    """A file less what one of its parts holds."""
    names = {tensor.name for tensor in part.tensors.values()}
    left = {name: tensor for name, tensor in whole.tensors.items() if name not in names}
    return replace(whole, tensors=left)


def _is_autoencoder(part: Recognition) -> bool:
    first = part.candidates[0]
    return first.component.name == first.family.autoencoder


# --- base -----------------------------------------------------------------------------------------


def _with_base(
    parts: list[Recognition], base: Path | None, settings: Settings
) -> tuple[Family, list[Recognition]]:
    """The family, and the parts with those a base adds."""
    if base is None:
        return choose_family(parts, settings.family), parts
    given = {part.part for part in parts}
    place = located(base)
    if (place / "model_index.json").is_file():
        added = gather([place], settings)
    else:
        family = choose_family(parts, settings.family)
        folder = place if place.is_dir() else base
        added = gather(_stock_files(folder, family), settings)
    new = [part for part in added if not any(map(part.is_also, parts))]
    added = [part for part in new if not _whole(part.part, given)]
    parts = [*added, *parts]
    return choose_family(parts, settings.family), parts


def _stock_files(base: Path, family: Family) -> list[Path]:
    """The files in a folder that a layout's own programs download.

    Raises:
        ConversionError: there is none.
    """
    kinds = ["a diffusers repo"]
    found: list[Path] = []
    for layout in layouts().values():
        names = layout.stock_files.get(family.name, [])
        found += [base / name for name in names if (base / name).is_file()]
        if names:
            kinds.append(f"a folder with {layout.title}'s files ({', '.join(names)})")
    if not found:
        flaw = "neither" if len(kinds) > 1 else "not"
        raise ConversionError(f"{base}: {flaw} {' nor '.join(kinds)}")
    return found


def _whole(part: str, given: set[str]) -> bool:
    """Whether the given parts leave nothing of a base's part to take."""
    rest = halves_of(part)
    return halves().get(part) in given or (bool(rest) and given.issuperset(rest))


def _only(components: dict[str, PlannedComponent], name: str) -> dict[str, PlannedComponent]:
    whole = halves().get(name, name)
    if whole not in components:
        raise ConversionError(f"--component {name}: the sources hold {', '.join(components)} only")
    return {whole: components[whole]}
