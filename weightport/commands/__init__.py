"""The commands of `weightport`, one a module: `add(commands, common)` makes its parser, with `run` to run it."""
