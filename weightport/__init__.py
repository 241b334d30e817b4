"""Offline checkpoint conversion for Stable Diffusion, with proof."""
