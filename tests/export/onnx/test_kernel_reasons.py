"""Why layers run in floating point, in graphs that ONNX Runtime optimized."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from qatkit import QuantSpec, calibrate, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels
from qatkit.models import resnet, untrained_model
from tests.export.conftest import UINT8


def reasons(model: nn.Module, example: object, path: Path) -> dict[str, list[str]]:
    export_onnx(model.eval(), example, path / "model.onnx")
    kernels = integer_kernels(path / "model.onnx")
    assert sum(map(len, kernels.reasons.values())) == sum(kernels.floating.values())
    return kernels.reasons


def test_a_model_in_floating_point_has_weights_that_are_not_quantized(tmp_path: Path) -> None:
    found = reasons(resnet((4, 8)), torch.rand(2, 1, 16, 16), tmp_path)
    assert list(found) == ["the weight is not quantized"]
    assert {"0.0", "1.0.conv1", "1.2.shortcut.0", "3"} <= set(found["the weight is not quantized"])


def test_weight_only_layers_have_inputs_that_are_not_quantized(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    prepare_qat(model, QuantSpec(8))
    assert reasons(model, torch.rand(2, 1, 8, 8), tmp_path) == {"the input is not quantized": ["0", "3"]}


def test_a_convolution_whose_output_is_read_in_floating_point_names_the_reader(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3))
    prepare_qat(model, QuantSpec(7), UINT8)
    calibrate(model, [torch.rand(8, 1, 8, 8)])
    assert reasons(model, torch.rand(2, 1, 8, 8), tmp_path) == {
        "the output is not quantized, because Sigmoid reads it": ["0"],
        "the output is not quantized, because the model's output reads it": ["2"],
    }


def test_an_encoder_names_the_excluded_layer_and_the_products_of_activations(tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = untrained_model("bert", "Model", {**shape, "intermediate_size": 16}).eval()
    texts = {"input_ids": torch.randint(50, (2, 8))}
    prepare_qat(model, QuantSpec(7), UINT8, exclude=["*.key", "pooler*"])
    calibrate(model, [texts], lambda batch: model(**batch))
    found = reasons(model, texts, tmp_path)
    assert set(found["the weight is not quantized"]) == {"encoder.layer.0.attention.self.key", "pooler.dense"}
    assert len(found["it is a product of two activations that are not both quantized"]) == 2


def test_recurrent_layers_and_transposed_convolutions_have_no_integer_kernels(tmp_path: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.up = nn.GRU(4, 8, batch_first=True), nn.ConvTranspose1d(8, 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.rnn(x)[0].transpose(1, 2))

    model = Tagger()
    prepare_qat(model, QuantSpec(8))
    assert reasons(model, torch.rand(2, 5, 4), tmp_path) == {
        "ONNX Runtime has no integer kernel for recurrence": ["rnn.weight_ih_l0"],
        "ONNX Runtime has no integer kernel for transposed convolutions": ["up"],
    }
