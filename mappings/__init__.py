"""The mapping language, every table, family facts, manifests and tokenizer data; imports neither torch nor tensorflow."""
