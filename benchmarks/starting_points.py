"""Compare GPTQ, AWQ and SmoothQuant with llm-compressor 0.14 by the output error of single layers.

Run: python benchmarks/starting_points.py
Takes about five minutes, plus two the first time to install llm-compressor.

A small Llama is trained on the standard library. The benchmark takes the layers of its last block with their inputs,
once unchanged, and once with a few inputs made twenty times larger (and their weights smaller by the same factor), as
in large models. The error is ``|X (W - Wq)^T|^2 / |X W^T|^2`` in float64, for SmoothQuant including 8-bit inputs.
Both libraries see the same tensors and compute scales with the same rule from ranges (minmax), or with their own
search (mse). For SmoothQuant, llm-compressor uses its default alpha of 0.5 and half of an input's range where the
paper uses its largest magnitude; qatkit searches on a sample of the rows.

The requirements of llm-compressor conflict with ours, so it is installed in its own virtual environment,
``build/llmcompressor``, with the torch release of this environment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from harness import Claim, finish
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from qatkit import QuantSpec, fake_quantize
from qatkit.data.stdlib import text_windows
from qatkit.models.language import llama
from qatkit.quantization.estimators import computed_qparams, mse_qparams
from qatkit.quantization.ptq.awq import awq_clip, awq_scales
from qatkit.quantization.ptq.gptq import gptq
from qatkit.quantization.ptq.hessian import InputStatistics
from qatkit.quantization.ptq.smoothquant import smoothquant_search

OTHER = Path(__file__).parent.parent / "build" / "llmcompressor"
RELEASE = "0.14.*"
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
FORMATS = {"W4 channel": (4, None), "W4 g128": (4, 128), "W3 g128": (3, 128)}
TOKEN = QuantSpec(8, strategy="token", scale_rule="range")
SEED = 0


def trained_layers(steps: int, rows: int) -> dict[str, Tensor]:
    """Weights and inputs of the last block of a briefly trained Llama, ``{layer}.weight`` and ``{layer}.x``."""
    torch.manual_seed(SEED)
    model = llama(hidden=256, layers=2, heads=4, kv_heads=4, intermediate=768)
    windows, _, _ = text_windows(context=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (8,))]
        logits = model(batch).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors: dict[str, Tensor] = {}
    block = model.eval().model.layers[-1]
    for name in LAYERS:
        layer = block.get_submodule(name)
        tensors[f"{name}.weight"] = layer.weight.detach().clone()
        layer.register_forward_pre_hook(
            lambda _, args, name=name: tensors.update({f"{name}.x": args[0].flatten(0, 1).clone()})
        )
    with torch.no_grad():
        model(windows[torch.randint(len(windows), (rows // 128,))])
    for name in LAYERS:
        weight, x = tensors[f"{name}.weight"].clone(), tensors[f"{name}.x"].clone()
        loud = torch.randperm(weight.shape[1])[: weight.shape[1] // 64]
        x[:, loud] *= 20
        weight[:, loud] /= 20
        tensors |= {f"{name}, outliers.weight": weight, f"{name}, outliers.x": x}
    return tensors


def ours(weight: Tensor, x: Tensor, method: str, spec: QuantSpec) -> Tensor:
    """Outputs of the layer quantized by qatkit, float64."""
    hessian = x.t() @ x / len(x)
    scales = torch.ones(weight.shape[1])
    if method == "rtn":
        qparams = (computed_qparams if spec.observer == "minmax" else mse_qparams)(weight, spec)
        rounded = fake_quantize(weight, *qparams, spec)
    elif method == "gptq":
        rounded, _, _ = gptq(weight, hessian, spec)
    elif method == "awq":
        scales = awq_scales([weight], [spec], x.abs().mean(0), hessian)
        scaled = weight * scales
        stored = spec.observer == "mse"
        qparams = (
            awq_clip(scaled, hessian / scales / scales[:, None], spec) if stored else computed_qparams(scaled, spec)
        )
        rounded = fake_quantize(scaled, *qparams, spec)
    else:
        statistics = InputStatistics(second_moment=False)
        statistics.update(x)
        scales = smoothquant_search([weight], [spec], [TOKEN], statistics, weight.abs().amax(0))
        rounded = fake_quantize(weight * scales, *computed_qparams(weight * scales, spec), spec)
    x = x / scales
    if method == "smoothquant":
        x = fake_quantize(x, *computed_qparams(x, TOKEN), TOKEN)
    return x.double() @ rounded.double().t()


def theirs(tensors: dict[str, Tensor], jobs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Outputs of the layers quantized by llm-compressor, by job."""
    python = OTHER / "bin" / "python"
    if not (OTHER / "installed").exists():
        venv.create(OTHER, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", f"llmcompressor=={RELEASE}"]
        install.append(f"torch=={torch.__version__.partition('+')[0]}")
        planned = subprocess.run([*install, "--dry-run"], check=True, capture_output=True, text=True).stdout
        if "nvidia-cu" in planned and not torch.cuda.is_available():
            sys.exit("pip would install torch for CUDA; point it at CPU wheels, or install into build/llmcompressor")
        subprocess.run([*install, "--quiet"], check=True)
        (OTHER / "installed").touch()
    child = Path(__file__).parent / "llmcompressor_layers.py"
    with tempfile.TemporaryDirectory() as folder:
        given, todo, made = (Path(folder) / name for name in ("in.safetensors", "jobs.json", "out.safetensors"))
        save_file(tensors, given)
        todo.write_text(json.dumps(jobs))
        done = subprocess.run([python, child, given, todo, made], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return load_file(made)


def main(steps: int, rows: int) -> None:
    torch.set_num_threads(1)
    tensors = trained_layers(steps, rows)
    names = [key.removesuffix(".x") for key in tensors if key.endswith(".x")]
    kinds = [(m, f, *FORMATS[f], o) for m in ("gptq", "awq") for f in FORMATS for o in ("minmax", "mse")]
    kinds.append(("smoothquant", "W8A8", 8, None, "minmax"))
    fields = ("method", "format", "bits", "group_size", "observer")
    jobs = [
        {"name": f"{method} {form} {observer} {layer}", "layer": layer}
        | dict(zip(fields, (method, form, bits, size, observer), strict=True))
        for method, form, bits, size, observer in kinds
        for layer in names
    ]
    other = theirs(tensors, jobs)
    rows_of: list[dict[str, Any]] = []
    for method, form, bits, size, observer in kinds:
        errors: list[tuple[float, float, float]] = []
        strategy = "channel" if size is None else "group"
        spec = QuantSpec(bits, strategy=strategy, group_size=size, observer=observer, scale_rule="range")
        for layer in names:
            weight, x = tensors[f"{layer}.weight"], tensors[f"{layer}.x"]
            exact = x.double() @ weight.double().t()
            outputs = [ours(weight, x, "rtn", spec), ours(weight, x, method, spec)]
            outputs.append(other[f"{method} {form} {observer} {layer}"].double())
            errors.append(tuple(float((y - exact).square().sum() / exact.square().sum()) for y in outputs))  # type: ignore[arg-type]
        rtn, own, their = (mean(column) for column in zip(*errors, strict=True))
        rows_of.append(
            {
                "method": method,
                "format": form,
                "scales": observer,
                "round-to-nearest": rtn,
                "qatkit": own,
                "llm-compressor": their,
                "qatkit / llm-compressor": own / their,
                "worst layer": max(error[1] / error[2] for error in errors),
            }
        )
    claims = []
    for method in ("gptq", "awq", "smoothquant"):
        worst = max(row["worst layer"] for row in rows_of if row["method"] == method)
        text = f"error of {method} relative to llm-compressor {RELEASE[:-2]}, worst layer of any format"
        claims.append(Claim(text, "<= 1.01", f"{worst:.4f}", worst <= 1.01))
    finish("starting_points", rows_of, claims, seeds=[SEED])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rows", type=int, default=4096)
    args = parser.parse_args()
    main(args.steps, args.rows)
