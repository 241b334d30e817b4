"""A recipe is all that an image depends on. It is stored in the PNG, so that the image can be made
again.

The bits are the same on the same machine with the same repository and the same torch; the recipe
notes its version.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConversionError
from .io import atomic
from .io.documents import parse_json
from .io.regular import read_regular

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = "weightport"  # the name of the PNG's text chunk
_MAX_IMAGE = 256 << 20  # bytes of an image file
ARGUMENTS = {  # of a recipe -> of a pipeline's call
    "prompt": "prompt",
    "negative": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "strength": "strength",
}

SEVERAL = ("lora", "embedding")
"""Options that may be given several times."""


@dataclass(frozen=True)
class Recipe:
    """How to make one image. None stands for the default of the pipeline or of the repository.

    Attributes:
        repo: a folder, as an absolute path, or a Hub id.
        prompt: what to draw.
        revision: of the repository on the Hub.
        negative: what not to draw.
        scheduler: a name that `named_scheduler` knows.
        steps: of the scheduler.
        seed: of the generator, which draws on the CPU.
        guidance: weight of the prompt.
        size: width and height in pixels.
        image: the image to start from or, for a ControlNet, to follow.
        mask: white where to paint.
        strength: how much of the image to replace, from 0 to 1.
        controlnet: a folder or Hub id.
        lora: adapters, `FILE` or `FILE@STRENGTH`, in their order.
        embedding: files of textual inversion.
        dtype: what to compute in.
        device: where to.
        sha256: of the files of `image` and `mask`, of adapters (`lora 1`, ...) and of embeddings.
        torch: the version that made the image.
    """

    repo: str
    prompt: str
    revision: str | None = None
    negative: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    size: tuple[int, int] | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    controlnet: str | None = None
    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    sha256: dict[str, str] | None = None
    torch: str | None = None


def read_recipe(path: Path) -> Recipe:
    """The recipe in a PNG.

    Raises:
        ConversionError: it has none, or a damaged one.
    """
    from PIL import Image

    data = read_regular(path, _MAX_IMAGE)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            text = image.info.get(CHUNK)  # stands before the pixels, which stay where they are
    except (OSError, ValueError, Image.DecompressionBombError):
        raise ConversionError(f"{path}: not a PNG") from None
    if text is None:
        raise ConversionError(
            f"{path}: holds no settings of weightport; give the repo and the prompt instead"
        )
    content = parse_json(str(text), f"{path}: the settings in it are damaged", "recipe")
    size = content.get("size")
    several = {name: tuple(content.get(name, ())) for name in SEVERAL}
    return Recipe(**{**content, **several, "size": size and (size[0], size[1])})


def write_image(image: Image, recipe: Recipe, path: Path, overwrite: bool = False) -> None:
    """Write a PNG with its recipe, whole or not at all.

    Raises:
        ConversionError: it cannot be written, or is there already and `overwrite` is not set.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(CHUNK, json.dumps(asdict(recipe)))
    with atomic.file(path, overwrite) as beside:
        image.save(beside, "PNG", pnginfo=info)


class Maker:
    """A pipeline that is ready to make the images of a recipe, whatever their seeds.

    Raises:
        ConversionError: the recipe does not fit the repository, or a file is not what it was.
        OSError, ValueError: the repository cannot be loaded.
    """

    def __init__(self, recipe: Recipe, quiet: bool = False) -> None:
        import torch

        from .runtime.loading.source import open_source
        from .runtime.pipelines.base import DiffusionPipeline
        from .runtime.schedulers.names import named_scheduler

        self.images = {
            name: _open(recipe, name) for name in ("image", "mask") if getattr(recipe, name)
        }
        dtype = getattr(torch, recipe.dtype)
        source = open_source(recipe.repo, revision=recipe.revision)
        if source.commit:  # a branch may move, its commit does not
            recipe = replace(recipe, revision=source.commit)
        pipe: Any = DiffusionPipeline.from_pretrained(source, dtype=dtype)
        pipe = _for_task(pipe, recipe, dtype)
        if recipe.scheduler:
            pipe.scheduler = named_scheduler(recipe.scheduler, pipe.scheduler.config)
        changes = _apply(pipe, recipe)
        pipe.set_progress_bar_config(**({"disable": True} if quiet else {"leave": False}))
        self.pipe = pipe.to(recipe.device)
        sha256 = {name: digest for name, (_, digest) in self.images.items()} | changes
        self.recipe = replace(
            recipe,
            scheduler=recipe.scheduler or type(pipe.scheduler).__name__,
            sha256=sha256 or None,
            torch=torch.__version__,
        )
        self.arguments = self._arguments(recipe)

    def _arguments(self, recipe: Recipe) -> dict[str, Any]:
        """The arguments of the pipeline's call, but for the generator."""
        known = inspect.signature(type(self.pipe).__call__).parameters
        given = {argument: getattr(recipe, name) for name, argument in ARGUMENTS.items()}
        given |= {
            "mask_image" if name == "mask" else name: image
            for name, (image, _) in self.images.items()
        }
        if recipe.size and "height" in known:
            given |= {"width": recipe.size[0], "height": recipe.size[1]}
        elif recipe.size and "image" in given:
            given["image"] = given["image"].resize(recipe.size)
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in known:
                raise ConversionError(
                    f"{recipe.repo}: its {type(self.pipe).__name__} takes no {name}"
                )
        return given

    def make(self, seed: int) -> tuple[Image, Recipe]:
        """Make the image of one seed, and the recipe for just this one."""
        import torch

        generator = torch.Generator("cpu").manual_seed(seed)
        image = self.pipe(**self.arguments, generator=generator).images[0]
        return image, replace(self.recipe, seed=seed)


def _apply(pipe: Any, recipe: Recipe) -> dict[str, str]:
    """Load the adapters and embeddings of a recipe; the sha256 of each file.

    Raises:
        ConversionError: the pipeline takes none, or a file is not what it was.
    """
    from .converters.baking import parse_lora
    from .mappings.families import component_names

    digests = {}
    given = [(recipe.lora, "load_lora_weights"), (recipe.embedding, "load_textual_inversion")]
    for several, method in given:
        if several and not hasattr(pipe, method):
            raise ConversionError(f"{recipe.repo}: its {type(pipe).__name__} has no {method}")
    names = []
    weights = []
    for number, text in enumerate(recipe.lora, 1):
        path, strengths = parse_lora(text)
        digests[f"lora {number}"] = _digest(recipe, f"lora {number}", Path(path))
        names.append(f"lora_{number}")
        weights.append({name: strengths.of(name) for name in component_names()})
        pipe.load_lora_weights(path, adapter_name=names[-1])
    if names:
        pipe.set_adapters(names, weights)
    for number, path in enumerate(recipe.embedding, 1):
        digests[f"embedding {number}"] = _digest(recipe, f"embedding {number}", Path(path))
        pipe.load_textual_inversion(path)
    return digests


def _digest(recipe: Recipe, name: str, path: Path) -> str:
    """The sha256 of a file, which must be the recipe's if that has one."""
    from .converters.checkpoint import SourceFile

    digest = SourceFile(path).sha256()
    if (recipe.sha256 or {}).get(name, digest) != digest:
        raise ConversionError(
            f"{path}: has changed since the image was made; give the old one with"
            f" --{name.partition(' ')[0]}"
        )
    return digest


def _open(recipe: Recipe, name: str) -> tuple[Image, str]:
    """An input image and the sha256 of its file, which must be the recipe's if that has one."""
    from PIL import Image, ImageOps

    path = Path(getattr(recipe, name))
    data = read_regular(path, _MAX_IMAGE)
    digest = hashlib.sha256(data).hexdigest()
    if (recipe.sha256 or {}).get(name, digest) != digest:
        raise ConversionError(
            f"{path}: has changed since the image was made; give the old one with --{name}"
        )
    try:
        image: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        return image.convert("L" if name == "mask" else "RGB"), digest
    except (OSError, ValueError, Image.DecompressionBombError):
        raise ConversionError(f"{path}: not an image") from None


def _for_task(pipe: Any, recipe: Recipe, dtype: Any) -> Any:
    """The pipeline that takes the recipe's images, with the components of another."""
    from .runtime.models.controlnet import ControlNetModel
    from .runtime.pipelines import auto

    known = inspect.signature(type(pipe).__call__).parameters
    if recipe.controlnet:
        net = ControlNetModel.from_pretrained(recipe.controlnet, dtype=dtype)
        return auto.AutoPipelineForText2Image.from_pipe(pipe, controlnet=net)
    if recipe.mask:
        return pipe if "mask_image" in known else auto.AutoPipelineForInpainting.from_pipe(pipe)
    if recipe.image:
        return pipe if "image" in known else auto.AutoPipelineForImage2Image.from_pipe(pipe)
    return pipe if "image" not in known else auto.AutoPipelineForText2Image.from_pipe(pipe)
