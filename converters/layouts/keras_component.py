"""From the layers of one save to a `Checkpoint` for each component in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConversionError, printable
from ...io.dtypes import ITEMSIZES
from ..checkpoint import Checkpoint, SourceFile, Tensor
from .keras_leaves import leaf_tensors
from .keras_names import Leaves, Paths

OPTIMIZER = "optimizer state (and moving averages), not weights"
MAX_COMPONENTS = 16
"""Of one save, each of which is compared with every part of every model; a trainer's has four."""

OTHER = "a variable of the saved object itself, not of a component's layer"


@dataclass(frozen=True)
class Save:
    """A save of models of Keras.

    Attributes:
        layout: whose names their layers have.
        path: what the user named.
        form: a human name of the file format.
        files: every file that was opened.
        lora_alpha: LoRA factors are merged with it, or refused where it is None.
    """

    layout: str
    path: Path
    form: str
    files: list[SourceFile]
    lora_alpha: float | None

    def check_number(self, components: int) -> None:
        """Raise ConversionError if a save seems to hold more components than any does."""
        if components > MAX_COMPONENTS:
            raise ConversionError(
                f"{self.path}: more than {MAX_COMPONENTS} groups in it look like components"
            )

    def placed(self, place: Callable[[Paths], Leaves], paths: Paths) -> Leaves:
        """Canonical layer paths of a component's weights.

        Raises:
            ConversionError: two weights have one place.
        """
        leaves = place(paths)
        names = {tensor.name for variables in leaves.values() for tensor in variables.values()}
        for tensor in paths.values():
            if tensor.name not in names:
                raise ConversionError(
                    f"{self.path}: `{printable(tensor.name)}` has the place of another weight"
                )
        return leaves

    def component(self, root: str, leaves: Leaves, skipped: Mapping[str, str]) -> Checkpoint:
        """One component.

        Args:
            root: where in the save it lies.
            skipped: names that were left out -> the reason.

        Raises:
            ConversionError: the variables of a layer are no weights.
        """
        tensors: dict[str, Tensor] = {}
        for layer, variables in leaves.items():
            for tensor in variables.values():
                if tensor.dtype not in ITEMSIZES:
                    raise ConversionError(
                        f"{self.path}: `{printable(tensor.name)}` holds {tensor.dtype}, which is"
                        " not a weight"
                    )
            try:
                found = leaf_tensors(layer, variables, self.lora_alpha)
            except ConversionError as error:
                raise ConversionError(f"{self.path}: {error}") from None
            tensors |= {f"{layer}.{name}": tensor for name, tensor in found.items()}
        return self.checkpoint(tensors, skipped, root)

    def checkpoint(
        self, tensors: Mapping[str, Tensor], skipped: Mapping[str, str], root: str = ""
    ) -> Checkpoint:
        """The tensors of a component, by canonical key."""
        return Checkpoint(
            path=self.path,
            format=self.form,
            tensors=tensors,
            skipped=dict(skipped),
            files=self.files,
            layout=self.layout,
            root=root,
        )
