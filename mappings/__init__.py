"""The mapping language, every table, facts of classes and families, tokenizer data; no torch, no
tensorflow."""
