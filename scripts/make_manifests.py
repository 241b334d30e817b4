#!/usr/bin/env python
"""Write tests/golden/manifests/*.txt: every tensor of every stock model, by the runtime."""

from pathlib import Path

from weightport.mappings.families import families
from weightport.runtime.manifest import MODELS, manifest

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "manifests"


def main() -> None:
    """Write one file for each component that the runtime knows, unless another family has it."""
    seen: list[dict[str, tuple[int, ...]]] = []
    for family in families().values():
        for name, component in family.components.items():
            if component.class_name not in MODELS:
                continue
            shapes = manifest(component.class_name, component.config)
            if shapes in seen:
                continue
            seen.append(shapes)
            kind = f"{component.class_name}, {len(shapes)} tensors"
            lines = [f"# {family.title}: {kind}; by scripts/make_manifests.py\n"]
            for key, shape in shapes.items():
                sides = "x".join(map(str, shape))
                lines.append(f"{key} {sides}\n")
            path = FOLDER / f"{family.name}_{name}.txt"
            path.write_text("".join(lines), encoding="utf-8")
            print(f"{path.name}: {len(shapes)} tensors")


if __name__ == "__main__":
    main()
