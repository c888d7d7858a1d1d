"""onnxruntime-genai: `format` writes a decoder with a cache, `graph` puts codes into it, and `runtime` runs it."""
