"""Convert files and push the repo to the Hugging Face Hub: push_to_hub.py FILE... ORG/NAME

The token is that of HF_TOKEN or `hf auth login`. `weightport convert` and `weightport push` do the
same and more; this is the shape of a script of your own.
"""

import sys
import tempfile

import weightport

*files, repo_id = sys.argv[1:]
if not files:
    sys.exit(__doc__)

with tempfile.TemporaryDirectory() as folder:
    repo = f"{folder}/repo"
    try:
        weightport.convert(files, repo)
        # weightport.parity(repo, files, report=repo) proves the conversion first, where KerasCV is
        # installed
        pushed = weightport.push(repo, repo_id, private=True, allow_unverified=True)
    except weightport.ConversionError as error:
        sys.exit(f"error: {error}")

for warning in pushed.warnings:
    print(f"warning: {warning}", file=sys.stderr)
print(pushed.url)
