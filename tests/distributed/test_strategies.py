"""QAT and distillation on two gloo processes against one process that accumulates over the same halves."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import warm

WORKER = Path(__file__).parent / "worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("strategies")
    found = {}
    for mode in ("single", "ddp", "fsdp2"):
        out = folder / f"{mode}.pt"
        subprocess.run([warm.python(), str(WORKER), mode, str(out)], check=True, cwd=folder)
        found[mode] = torch.load(out, weights_only=True) | {"file": out.with_suffix(".onnx").read_bytes()}
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_weights_scales_and_codes_of_one_bit_for_bit(
    results: dict[str, dict[str, Any]], strategy: str
) -> None:
    one, two = results["single"], results[strategy]
    assert one["state"].keys() == two["state"].keys()
    for key, value in one["state"].items():
        assert torch.equal(value, two["state"][key]), key
    for name, codes in one["codes"].items():
        assert torch.equal(codes, two["codes"][name]), name
    assert one["file"] == two["file"]


def test_training_moved_the_weights_and_the_scales(results: dict[str, dict[str, Any]]) -> None:
    # equal results would prove nothing if nothing had been trained
    torch.manual_seed(0)
    from qatkit.models import cnn
    from qatkit.quantization.estimators import mse_qparams
    from qatkit.quantization.folding import fold_batchnorm
    from qatkit.spec import QuantSpec

    model = cnn(channels=[8, 16])
    fold_batchnorm(model)
    state = results["single"]["state"]
    for name in ("conv1", "conv2", "classifier"):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert (state[f"{name}.weight"] - weight).abs().max() > 1e-3
        initial, _ = mse_qparams(weight, QuantSpec(num_bits=4))
        assert (state[f"{name}.weight_fake_quant.scale"] - initial).abs().max() > 1e-5


def test_calibration_joins_the_ranks_with_one_all_reduce_of_all_layers(results: dict[str, dict[str, Any]]) -> None:
    for mode in ("ddp", "fsdp2"):
        assert results[mode]["reductions"] == [4]  # three layers and the batch count
    assert results["single"]["reductions"] == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_monitor_sees_whole_layers_and_counts_the_samples_of_all_processes(
    results: dict[str, dict[str, Any]], strategy: str
) -> None:
    one, two = results["single"], results[strategy]
    assert two["table"] == one["table"]
    assert [row["name"] for row in one["table"]] == ["model.conv1", "model.conv2", "model.classifier"]
    assert all(row["weight_scale_drift"] and row["oscillation"] is not None for row in one["table"])
    assert two["agreement"] == one["agreement"]
    assert 0 < one["agreement"] < 1
