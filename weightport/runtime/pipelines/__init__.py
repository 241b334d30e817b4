"""The pipelines, with diffusers' names, components and calls."""
