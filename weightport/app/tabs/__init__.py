"""One tab a module: `add(desk)` draws it, and returns its fields that list uploads."""
