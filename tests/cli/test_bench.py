"""`qatkit bench`: exported files as a server runs them, beside the runtime's own quantization."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qatkit.cli.bench import headlines
from qatkit.export.onnx.runtime import Kernels
from qatkit.pipeline.serving import Bench
from qatkit.report.serving import Served
from tests.cli.in_process import qatkit

RECIPE = """
name: placed
model: {factory: "qatkit.models:resnet", args: {channels: [4, 8]}}
data: {factory: "qatkit.data:digits", args: {val_fraction: 0.1, test_fraction: 0.1}}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 3, batch_size: 32}
  int7: {max_steps: 2, batch_size: 32, quantize: {target: onnxruntime}}
export: {format: onnx}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    (made / "placed.yaml").write_text(RECIPE)
    done = qatkit("run", "placed.yaml", "--out", "run", "--quiet", cwd=made)
    assert done.code == 0, done.err
    return made


def test_every_file_and_the_free_one_are_measured(folder: Path) -> None:
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    done = qatkit("bench", "run", "--batch", "1", "--batch", "8", "--against", "ptq", "--json", cwd=folder)
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert list(content["files"]) == ["dense", "int7", "quantize_static"]
    assert set(content["speedup"]) == {"dense", "quantize_static"}
    for name, file in content["files"].items():
        assert [each["batch_size"] for each in file["latency"]] == [1, 8]
        for each in file["latency"]:
            assert 0 < each["p50_ms"] <= each["p95_ms"]
            assert each["samples_per_s"] == pytest.approx(1e3 * each["batch_size"] / each["p50_ms"])
        assert file["load_s"] > 0
        assert bool(file["kernels"]["integer"]) == (name != "dense")
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_the_table_follows_the_comparison(folder: Path) -> None:
    done = qatkit("bench", "run", "--batch", "1", cwd=folder)
    assert done.code == 0, done.err
    first, *_ = done.out.splitlines()
    assert first.removeprefix("SLOWER: ").startswith("speed of int7 relative to dense: ")
    assert "samples/s" in done.out


def served(milliseconds: float, size: int = 1000) -> Served:
    return Served(size, 0.01, 1000, {1: np.full(30, milliseconds / 1e3)})


def test_a_slower_file_is_said_first_with_what_stayed_in_floating_point() -> None:
    kernels = {"dense": Kernels({}, {"Conv": 2}), "qat": Kernels({"QLinearConv": 1}, {"Conv": 1})}
    measured = Bench(
        {"dense": served(1.0, 4000), "qat": served(2.0)}, "dense", [], "qat", kernels, "quantized: 1 of 2 layers"
    )
    assert headlines(measured, [1]) == [
        "SLOWER: speed of qat relative to dense: 0.50x at batch size 1 (0.50 to 0.50); size: 0.25x",
        "matrix products in floating point: 1 Conv; quantized: 1 of 2 layers",
    ]


def test_packed_weights_are_not_called_floating_point() -> None:
    kernels = {"dense": Kernels({}, {"MatMul": 3}), "qat": Kernels({}, {"MatMul": 1}, weight_only={"MatMulNBits": 2})}
    measured = Bench({"dense": served(1.0), "qat": served(2.0)}, "dense", [], "qat", kernels, "all layers")
    assert headlines(measured, [1])[-1] == (
        "matrix products in floating point: 1 MatMul; with packed weights and floating-point inputs: 2 MatMulNBits; "
        "all layers"
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  dense: {max_steps: 3, batch_size: 32}\n", "", "--against: no stage in the comparison is in floating point"),
        (
            "target: onnxruntime",
            "weight: {num_bits: 4}",
            "export.format: no speed can be measured (dense: PyTorch computes with the decoded weights",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = RECIPE.replace(old, new)
    (tmp_path / "other.yaml").write_text(text.replace("{format: onnx}", "{format: dense}") if "bits" in new else text)
    assert qatkit("run", "other.yaml", "--out", "run", "--quiet", cwd=tmp_path).code == 0
    done = qatkit("bench", "run", *(["--against", "ptq"] if "against" in words else []), cwd=tmp_path)
    assert done.code == 2
    assert words in done.err
