"""ExecuTorch: `format` checks and writes, `layers` and `lowering` make a program for XNNPACK, `content` reads the file,
`read_back` compares it, and `runtime` runs it.
"""
