"""ONNX for ONNX Runtime: `format` writes, reads and bounds; ``qdq*`` and `packed` are the nodes of quantized layers,
`graph` traces and rewrites, `weights` compares the file with the model, and `runtime` runs it.
"""
