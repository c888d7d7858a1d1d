"""MLX: `format` checks and writes, `packing` and `content` are the folder's bits, and `runtime` runs `checker` in an
environment that has MLX.
"""
