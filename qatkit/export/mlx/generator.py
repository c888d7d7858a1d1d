"""Let an MLX folder continue a prompt with mlx-lm; runs in an environment with mlx-lm and without qatkit.

`qatkit.export.mlx.generation` starts this file as a script, with the folder, the prompt and the number of tokens as
arguments. Each line of standard output is one piece of text in JSON.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module


def main(folder: str, prompt: str, tokens: int) -> None:
    # by name, because qatkit's own environment, in which types are checked, does not have this package
    mlx_lm = import_module("mlx_lm")
    model, tokenizer = mlx_lm.load(folder)
    for piece in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=tokens):
        sys.stdout.write(json.dumps(piece.text) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
