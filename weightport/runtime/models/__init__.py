"""The models in plain PyTorch, with diffusers' and transformers' names and keys."""
