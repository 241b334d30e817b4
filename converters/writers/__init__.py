"""From a plan's tensors to bytes; writers know no model."""
