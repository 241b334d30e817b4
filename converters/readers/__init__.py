"""From bytes to named lazy tensors: the readers of containers; they know no model."""
