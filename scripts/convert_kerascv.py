"""Convert KerasCV files into a diffusers repo with the Python API: convert_kerascv.py FILE... REPO

The command `weightport convert` does the same and more; this is the shape of a script of your own.
"""

import sys

import weightport

*files, repo = sys.argv[1:]
if not files:
    sys.exit(__doc__)

for file in files:
    for part in weightport.inspect(file).parts:
        print(f"{file}: {part.part}, {part.count} tensors, {part.format}")

try:
    conversion = weightport.convert(files, repo)
except weightport.ConversionError as error:
    sys.exit(f"error: {error}")

for name, component in conversion.components.items():
    print(f"{repo}/{name}: {len(component.tensors)} tensors")
for gap in conversion.lacks:
    print(f"lacks {gap}")
