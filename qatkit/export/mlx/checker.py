"""Load an MLX folder with mlx-lm and answer requests in JSON; runs in an environment with mlx-lm and without qatkit.

`qatkit.export.mlx.runtime` starts this file as a script. Each line of standard input is a request, and each line of
standard output is its answer: ``{"op": "versions"}``, ``{"op": "load", "folder": ...}``, ``{"op": "weights", "file":
...}``, which writes all decoded weights to a safetensors file, and ``{"op": "logits", "ids": [[...]], "file": ...}``.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer every request; an exception becomes an answer with the key "error"."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    model: list[Any] = []
    for line in sys.stdin:
        try:
            answer = answered(json.loads(line), model)
        except Exception as error:  # the exceptions of MLX share no base class
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def answered(request: dict[str, Any], model: list[Any]) -> dict[str, Any]:
    """Return the answer to one request; `model` holds the loaded model."""
    # by name, because qatkit's own environment, in which types are checked, does not have these packages
    mx, nn = import_module("mlx.core"), import_module("mlx.nn")
    load_model = import_module("mlx_lm.utils").load_model
    if request["op"] == "versions":
        return {"versions": {name: version(name) for name in ("mlx", "mlx-lm")}}
    if request["op"] == "load":
        model[:] = load_model(Path(request["folder"]))
        return {}
    if request["op"] == "weights":
        arrays = dict(import_module("mlx.utils").tree_flatten(model[0].parameters()))
        kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
        quantized = {name: layer for name, layer in model[0].named_modules() if isinstance(layer, kinds)}
        for name, layer in quantized.items():
            parts = [arrays.pop(f"{name}.{part}", None) for part in ("weight", "scales", "biases")]
            arrays[f"{name}.weight"] = mx.dequantize(
                *parts, group_size=layer.group_size, bits=layer.bits, mode=layer.mode, dtype=mx.float32
            )
        mx.save_safetensors(request["file"], arrays)
        return {"quantized": sorted(quantized)}
    logits = model[0](mx.array(request["ids"]))
    mx.save_safetensors(request["file"], {"logits": logits.astype(mx.float32)})
    return {}


if __name__ == "__main__":
    main()
