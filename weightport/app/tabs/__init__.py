"""One tab a module: `add(desk)` draws it, and returns the fields that list uploads."""
