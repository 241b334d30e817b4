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
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' name -> the word."""
ITEMSIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""safetensors' name -> bytes of an element."""
NAMES = {word: name for name, word in WORDS.items()}
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
"""Floats that are only read; bfloat16 holds every value of them, and so does float16."""
FLOATS = ("F64", "F32", "F16", "BF16", *EIGHT_BITS)
KEEP = "keep"
CHOICES = ("float32", "float16", "bfloat16")
"""What weights can be written in and models run in."""
