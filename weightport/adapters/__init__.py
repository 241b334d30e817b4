"""Files that change a model rather than being one: what they hold, and what it does to weights.

The road of a conversion and the runtime both read them, so nothing here knows either: tensors are
whatever has a shape.
"""
