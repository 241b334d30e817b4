#!/usr/bin/env python
"""Write mappings/manifests/*.txt: every tensor of every stock model, as the runtime builds it from
the families' files."""

from weightport.mappings.families import FOLDER, families
from weightport.runtime.manifest import manifest


def main() -> None:
    """Write one file for each component of each family."""
    for family in families().values():
        for name, component in family.components.items():
            shapes = manifest(component.class_name, component.config)
            lines = [f"{key} {'x'.join(map(str, shape))}\n" for key, shape in shapes.items()]
            header = (
                f"# {family.title}: {component.class_name}, {len(lines)} tensors; by"
                " scripts/make_manifests.py\n"
            )
            path = FOLDER / "manifests" / f"{family.name}_{name}.txt"
            path.write_text(header + "".join(lines), encoding="utf-8")
            print(f"{path.name}: {len(lines)} tensors")


if __name__ == "__main__":
    main()
