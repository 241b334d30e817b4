"""The names of dtypes: safetensors says `F16` where torch, numpy and people say `float16`."""

from __future__ import annotations

WORDS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' name -> the word."""
NAMES = {word: name for name, word in WORDS.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
KEEP = "keep"
CHOICES = ("float32", "float16", "bfloat16")
"""What weights can be written in and models run in."""
