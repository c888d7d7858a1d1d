"""Load a LiteRT file and answer requests in JSON; runs in an environment with ai-edge-litert and without qatkit.

`qatkit.export.litert.runtime` starts this file as a script. Each line of standard input is a request, and each line of
standard output is its answer: ``{"op": "versions"}``, ``{"op": "load", "file": ..., "threads": ...}``, ``{"op":
"tensors", "answer": ...}``, which writes all constants to an .npz file and lists the quantization of all tensors, and
``{"op": "run", "inputs": ..., "answer": ...}``, whose inputs and outputs are .npz files.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Answer every request; an exception becomes an answer with the key "error"."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    loaded: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            answer = answered(json.loads(line), loaded)
        except Exception as error:  # LiteRT's exceptions share no base class
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def answered(request: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one request; `loaded` holds the file and its interpreters."""
    np, litert = import_module("numpy"), import_module("ai_edge_litert.interpreter")
    if request["op"] == "versions":
        return {"versions": {"ai-edge-litert": version("ai-edge-litert")}}
    if request["op"] == "load":
        loaded.clear()
        loaded |= {"file": request["file"], "threads": request["threads"]}
        kind = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # kernels may reorder the constants they read
        loaded["plain"] = litert.Interpreter(request["file"], experimental_op_resolver_type=kind)
        (signature,) = loaded["plain"].get_signature_list().values()
        return {"inputs": signature["inputs"], "outputs": signature["outputs"]}
    if request["op"] == "tensors":
        constants, grids = {}, {}
        for each in loaded["plain"].get_tensor_details():
            found = each["quantization_parameters"]
            name, axis = each["name"], found["quantized_dimension"]
            grids[name] = [found["scales"].tolist(), found["zero_points"].tolist(), int(axis), each["dtype"].__name__]
            try:
                constants[name] = loaded["plain"].get_tensor(each["index"])
            except ValueError:  # not a constant: nothing has been computed yet
                continue
        np.savez(request["answer"], **constants)
        return {"grids": grids}
    with np.load(request["inputs"]) as file:
        inputs = dict(file)
    shapes = tuple(sorted((name, value.shape) for name, value in inputs.items()))
    if loaded.get("shapes") != shapes:  # a new interpreter, whose kernels are chosen for these shapes
        interpreter = litert.Interpreter(loaded["file"], num_threads=loaded["threads"])
        loaded |= {"shapes": shapes, "runner": interpreter.get_signature_runner()}
    np.savez(request["answer"], **loaded["runner"](**inputs))
    return {}


if __name__ == "__main__":
    main()
