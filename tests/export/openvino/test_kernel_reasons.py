"""Why layers run in floating point in OpenVINO."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from qatkit import QuantSpec, calibrate, prepare_qat
from qatkit.export.openvino.format import export_openvino
from qatkit.export.openvino.runtime import openvino_kernels
from qatkit.models import resnet, untrained_model
from tests.export.conftest import UINT8


def reasons(model: nn.Module, example: object, path: Path) -> dict[str, list[str]]:
    export_openvino(model.eval(), example, path / "model.xml")
    kernels = openvino_kernels(path / "model.xml")
    assert sum(map(len, kernels.reasons.values())) == sum(kernels.floating.values())
    return kernels.reasons


def test_a_model_in_floating_point_has_weights_that_are_not_quantized(tmp_path: Path) -> None:
    assert list(reasons(resnet((4, 8)), torch.rand(2, 1, 16, 16), tmp_path)) == ["the weight is not quantized"]


def test_weight_only_and_asymmetric_layers_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    prepare_qat(model, QuantSpec(8))
    assert reasons(model, torch.rand(2, 1, 8, 8), tmp_path) == {"the input is not quantized": ["0", "3"]}


def test_an_encoder_names_the_excluded_layer_and_the_products_of_activations(tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = untrained_model("bert", "Model", {**shape, "intermediate_size": 16}).eval()
    texts = {"input_ids": torch.randint(50, (2, 8))}
    prepare_qat(model, QuantSpec(7), UINT8, exclude=["*.key", "pooler*"])
    calibrate(model, [texts], lambda batch: model(**batch))
    found = reasons(model, texts, tmp_path)
    assert "encoder.layer.0.attention.self.key" in found["the weight is not quantized"]
