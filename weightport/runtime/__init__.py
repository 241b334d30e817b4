"""The PyTorch runtime: Stable Diffusion's models with diffusers' names, configs and keys, without
diffusers."""
