"""What the names of one layout mean, a module each; `sources.py` chooses among them."""
