"""Export to openvino-genai: a folder with a decoder, its cache of keys and values, and its tokenizer."""
