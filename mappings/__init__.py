"""The mapping language, every table, family facts, manifests and tokenizer data; no torch, no
tensorflow."""
