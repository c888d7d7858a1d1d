"""compressed-tensors for transformers and vLLM: `format` writes and reads, `limits` says what it can hold."""
