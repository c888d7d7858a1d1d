"""LiteRT: `format` checks and writes, `graph` and `operators` convert an ONNX graph, `content` and `flatbuffer` are the
file's bits, and `runtime` runs `checker` in an environment of its own.
"""
