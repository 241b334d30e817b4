"""What a diffusers repository holds beside its weights."""
