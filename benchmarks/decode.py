"""Measure how fast a Llama reads a prompt and writes tokens, relative to floating point in the same runtime.

Run: python benchmarks/decode.py [--files FOLDER] [--quick]
Takes about 15 minutes on two cores, most of it for the export. ``--files`` keeps the exported files in FOLDER, and uses
those that are there. ``--quick`` uses a tiny model and writes no results.

The weights are random, because they do not change the speed, and large enough that reading them from memory takes most
of the time of a new token. Every runtime uses one thread. The files of a format are called alternately, by the same
code as in `qatkit bench`.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from deploy_models import language_tokenizer
from harness import Claim, finish
from torch import nn

from qatkit import QuantSpec, calibrate, prepare_qat
from qatkit.export.decoding import Decoder
from qatkit.export.exporting import write_export
from qatkit.export.formats import FORMATS
from qatkit.export.interface import ExportContext
from qatkit.models import llama
from qatkit.quantization import prepare_for_target
from qatkit.report.decoding import Decoded, ratios, time_decoders

FULL = {
    "vocab_size": 4096,
    "hidden": 1024,
    "layers": 8,
    "heads": 16,
    "kv_heads": 4,
    "intermediate": 2816,
    "context": 512,
}
QUICK = {"vocab_size": 512, "hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 128, "context": 512}
PROMPT, NEW = 64, 24


@dataclass(frozen=True)
class File:
    """A model in a format."""

    format: str
    scheme: str
    prepare: Callable[[nn.Module], object] | None = None
    """``(model)``: fake-quantize the model in place."""


def groups(size: int) -> Callable[[nn.Module], object]:
    """4-bit weights in groups."""
    return lambda model: prepare_qat(model, QuantSpec(4, strategy="group", group_size=size), exclude=["lm_head"])


def placed(target: str) -> Callable[[nn.Module], object]:
    """A target of ONNX Runtime."""
    ids = torch.zeros(1, 4, dtype=torch.long)
    return lambda model: prepare_for_target(model, target, {"input_ids": ids}, exclude=["lm_head"])


FILES = [
    File("onnx_genai", "fp32"),
    File("onnx_genai", "target onnxruntime-int4", placed("onnxruntime-int4")),
    File("onnx_genai", "W4 g128", groups(128)),
    File("onnx_genai", "target onnxruntime-int4-int8", placed("onnxruntime-int4-int8")),
]


@cache
def dense_model(quick: bool) -> nn.Module:
    """The model in floating point."""
    torch.manual_seed(0)
    return llama(**(QUICK if quick else FULL), tie_embeddings=False).eval()


def export(file: File, quick: bool, folder: Path) -> Path:
    """Write a file, if it is not there, and return its path."""
    form = FORMATS[file.format]
    path = form.path(folder / file.format / file.scheme.replace(" ", "_"))
    if not path.exists():
        model = copy.deepcopy(dense_model(quick))
        batch = {"input_ids": torch.arange(64).view(1, 64)}
        if file.prepare is not None:
            file.prepare(model)
            calibrate(model, [batch], forward=lambda inputs: model(**inputs))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_export(form, model.eval(), path, ExportContext(batch, tokenizer=language_tokenizer()))
    return path


def measured(files: list[File], paths: dict[str, Path]) -> dict[str, Decoded]:
    """Time the files of one format alternately, by scheme."""
    form = FORMATS[files[0].format]
    with ExitStack() as stack:
        decoders = {}
        for file in files:
            decoders[file.scheme] = Decoder(form, paths[file.scheme], threads=1)
            stack.callback(decoders[file.scheme].close)
        sizes = {name: form.size(path) for name, path in paths.items()}
        return time_decoders(decoders, sizes, [number % 500 for number in range(PROMPT)], NEW)


def rows_of(form: str, found: dict[str, Decoded]) -> list[dict[str, Any]]:
    """The rows of one format."""
    plain, rows = found["fp32"], []
    for name, file in found.items():
        speed = ratios(file, plain)
        shown = {what: f"{each.median:.2f} ({each.low:.2f} to {each.high:.2f})" for what, each in speed.items()}
        rows.append({
            "format": form,
            "runtime": ", ".join(f"{package} {number}" for package, number in file.versions.items()),
            "weights": name,
            "size": f"{file.bytes / plain.bytes:.2f}",
            "peak memory": "-" if not file.peak_bytes or not plain.peak_bytes
            else f"{file.peak_bytes / plain.peak_bytes:.2f}",
            "prefill": "1.00" if file is plain else shown["prefill"],
            "decode": "1.00" if file is plain else shown["decode"],
            "new tokens/s": f"{file.decode()[1]:.1f}",
        })  # fmt: skip
    return rows


def claims_of(found: dict[str, Decoded]) -> list[Claim]:
    """The target of the format onnx_genai."""
    ratio = ratios(found["target onnxruntime-int4"], found["fp32"])["decode"]
    return [
        Claim(
            "speed of decode of int4 in onnxruntime-genai relative to fp32, lower end of the 95% interval", ">= 1.4",
            f"{ratio.low:.2f} (median {ratio.median:.2f})", ratio.low >= 1.4,
        )
    ]  # fmt: skip


def main(folder: Path, quick: bool) -> None:
    paths = {(file.format, file.scheme): export(file, quick, folder) for file in FILES}
    rows, claims = [], []
    for form in dict.fromkeys(file.format for file in FILES):
        files = [file for file in FILES if file.format == form]
        found = measured(files, {file.scheme: paths[form, file.scheme] for file in files})
        rows += rows_of(form, found)
        if form == "onnx_genai":
            claims = claims_of(found)
    if quick:
        for row in rows:
            print(" | ".join(row.values()))
        return
    finish("decode", rows, claims, [0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, help="the folder in which exported files are kept")
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.files or Path(temporary), arguments.quick)
