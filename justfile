# Names for the scripts; `just` lists them.

_list:
    @just --list --unsorted

# Lint, formatting, types, spelling, the documentation
check *names:
    scripts/check {{names}}

# Environments, checks and tests
test *arguments:
    scripts/test {{arguments}}

# The same with full-size models: minutes and gigabytes
full *arguments:
    scripts/test --full {{arguments}}

# Speed and memory of a conversion beside `cp`, and of a step beside diffusers
bench:
    .venvs/test/bin/python benchmarks/convert.py
    .venvs/test/bin/python benchmarks/runtime.py step

# The documentation, live on http://127.0.0.1:8000
docs:
    scripts/environment test
    .venvs/test/bin/mkdocs serve

# Key lists of the stock models, made again; look at the difference
golden:
    .venvs/test/bin/python scripts/make_manifests.py
    git diff --stat -- tests/golden/manifests
