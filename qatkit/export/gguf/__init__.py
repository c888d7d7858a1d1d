"""GGUF for llama.cpp and Ollama: `format` writes, reads and bounds; `packing` and `super_blocks` are the block types,
`architectures` the names and the order of tensors, `tokenizer` the vocabulary.
"""
