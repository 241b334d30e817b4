"""From keys to the parts of a model, and to the source of every tensor of the output."""
