#!/usr/bin/env python
"""Write mappings/manifests/*.txt: every tensor of every stock model, as the runtime builds it."""

from weightport.mappings.families import FOLDER, families
from weightport.runtime.manifest import manifest


def main() -> None:
    """Write one file for each component of each family."""
    for family in families().values():
        for name, component in family.components.items():
            shapes = manifest(component.class_name, component.config)
            kind = f"{component.class_name}, {len(shapes)} tensors"
            lines = [f"# {family.title}: {kind}; by scripts/make_manifests.py\n"]
            for key, shape in shapes.items():
                sides = "x".join(map(str, shape))
                lines.append(f"{key} {sides}\n")
            path = FOLDER / "manifests" / f"{family.name}_{name}.txt"
            path.write_text("".join(lines), encoding="utf-8")
            print(f"{path.name}: {len(shapes)} tensors")


if __name__ == "__main__":
    main()
