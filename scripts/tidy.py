#!/usr/bin/env python
"""Check the repository's text files: each ends in one newline, and TOML and YAML can be read."""

import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Print what is wrong, a line a file; the exit status says whether anything was."""
    complaints = [line for path in text_files() if (line := complaint(path))]
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return 1 if complaints else 0


def text_files() -> list[Path]:
    """The files that git knows or would add, but for links and binary data."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    paths = [ROOT / name for name in names.split("\0") if name]
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    return [path for path in files if b"\0" not in path.read_bytes()[:1024]]


def complaint(path: Path) -> str | None:
    """What is wrong with a text file, in one line."""
    name = path.relative_to(ROOT)
    text = path.read_bytes().decode()
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        return f"{name}: does not end in one newline"
    try:
        if path.suffix == ".toml":
            tomllib.loads(text)
        elif path.suffix in {".yml", ".yaml", ".cff"}:
            yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        return f"{name}: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
