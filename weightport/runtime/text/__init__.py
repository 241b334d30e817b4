"""Tokenizers, and the words they are taught."""
