"""Load a folder in the layout of GPTQ or AWQ with gptqmodel in transformers, and answer requests in JSON.

`qatkit.export.separate` starts this file as a script, in an environment with gptqmodel and without qatkit. Each line of
standard input is a request, and each line of standard output is its answer: ``{"op": "versions"}``, ``{"op": "load",
"folder": ...}``, ``{"op": "weights", "file": ...}``, which writes the dequantized weights to a safetensors file,
``{"op": "logits", "ids": [[...]], "mask": [[...]], "file": ...}``, ``{"op": "generate", "folder": ..., "prompt": ...,
"tokens": ...}`` and ``{"op": "piece"}``, which is answered with the next piece of the text, or null at the end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer every request; an exception becomes an answer with the key "error"."""
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    state: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            answer = answered(json.loads(line), state)
        except Exception as error:  # the exceptions of transformers and gptqmodel share no base class
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def answered(request: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one request; `state` holds the loaded model."""
    # by name, because qatkit's own environment, in which types are checked, does not have these packages
    import_module("gptqmodel")
    torch, save_file = import_module("torch"), import_module("safetensors.torch").save_file
    op = request["op"]
    if op == "versions":
        return {"versions": {name: version(name) for name in ("gptqmodel", "transformers")}}
    if op == "load":
        state["model"] = load(request["folder"])
        return {}
    if op == "generate":
        state["pieces"] = pieces(state["model"], request)
        return {}
    if op == "piece":
        return {"piece": next(state["pieces"], None)}
    with torch.no_grad():
        if op == "weights":
            save_file(weights(state["model"]), request["file"])
        else:
            mask = request["mask"] and torch.tensor(request["mask"])
            logits = state["model"](input_ids=torch.tensor(request["ids"]), attention_mask=mask).logits
            save_file({"logits": logits.float().contiguous()}, request["file"])
    return {}


def load(folder: str) -> Any:
    """Load a model with the kernels of gptqmodel that are written in torch, which do not round to bfloat16."""
    torch, transformers = import_module("torch"), import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    quantization = getattr(config, "quantization_config", {})  # of a stage in which nothing is quantized
    awq = quantization.get("quant_method") == "awq"
    if quantization:
        quantization["backend"] = "torch_awq" if awq else "gptq_torch"
    options = {"config": config, "dtype": torch.float32, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if not awq:  # whose layers multiply only in half precision; those of GPTQ multiply in the dtype of the input
        kept = biases(folder)
        for name, layer in quantized(model):
            layer.scales = layer.scales.float()
            layer.bias = kept.get(f"{name}.bias")
    return model


def biases(folder: str) -> dict[str, Any]:
    """Return all biases as the files hold them; gptqmodel rounds those of quantized layers to float16."""
    safe_open = import_module("safetensors").safe_open
    found: dict[str, Any] = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in tensors.keys() if key.endswith(".bias")}  # noqa: SIM118
    return found


def quantized(model: Any) -> list[tuple[str, Any]]:
    """Return the layers of gptqmodel by name."""
    kind = import_module("gptqmodel.nn_modules.qlinear").BaseQuantLinear
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]


def weights(model: Any) -> dict[str, Any]:
    """Return the weights ``[out, in]`` of all quantized layers, dequantized in float32 and in float16."""
    torch = import_module("torch")
    dequantize_gemm = import_module("gptqmodel.quantization.awq.utils.packing_utils").dequantize_gemm
    found = {}
    for name, layer in quantized(model):
        kept = layer.scales
        for ending, dtype in (("", torch.float32), (".float16", torch.float16)):
            layer.scales = kept.to(dtype)
            if type(layer).__name__.startswith("Awq"):
                group = layer.in_features if layer.group_size == -1 else layer.group_size
                weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, group)
            else:
                weight = layer.dequantize_weight()
            found[f"{name}.weight{ending}"] = weight.T.contiguous()
        layer.scales = kept
    return found


def pieces(model: Any, request: dict[str, Any]) -> Any:
    """Yield the pieces of a text that continues the prompt; each token is the most probable one."""
    transformers = import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"], local_files_only=True)
    inputs = tokenizer(request["prompt"], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed = []

    def run() -> None:
        try:
            model.generate(**inputs, max_new_tokens=request["tokens"], do_sample=False, streamer=streamer)
        except Exception as error:  # raised again for the request
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]


if __name__ == "__main__":
    main()
