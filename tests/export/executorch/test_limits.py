"""What XNNPACK cannot store or compute as in training is refused before training, by the name of the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.export.formats import FORMATS
from qatkit.quantization import prepare_for_target
from qatkit.quantization.targets import TARGETS
from qatkit.schemes import Scheme

A8 = QuantSpec(8, symmetric=False, strategy="tensor")
TOKEN = QuantSpec(8, symmetric=False, strategy="token")
INT4 = QuantSpec(4, strategy="group", group_size=32, scale_dtype="bfloat16")


@pytest.mark.parametrize(
    ("weight", "activation", "said"),
    [
        (QuantSpec(8, symmetric=False), A8, "need symmetric integer weights; set weight: {num_bits: 8}"),
        (QuantSpec(8, type="float"), A8, "need symmetric integer weights"),
        (QuantSpec(8), None, "need quantized inputs; set target: executorch, or target: executorch-8da4w"),
        (INT4, A8, "no weight scales per group with calibrated inputs; set weight.strategy: channel"),
        (QuantSpec(8), QuantSpec(4, symmetric=False, strategy="tensor"), "inputs are integers of 8 bits"),
        (QuantSpec(8), QuantSpec(8, strategy="token"), "dynamic scales per token, with zero points and 8 bits"),
        (QuantSpec(8), QuantSpec(8, strategy="tensor", symmetric=False, dynamic=True), "dynamic scales per token"),
        (QuantSpec(8, observer="lsq"), TOKEN, "observer: lsq and scale_rule: qmax also give -128"),
        (QuantSpec(8, scale_rule="range"), TOKEN, "observer: minmax and scale_rule: range also give -128"),
        (QuantSpec(4, strategy="group", group_size=32), TOKEN, "at most 4 bits and bfloat16 scales; set weight: {num"),
        (QuantSpec(4, strategy="group", group_size=16, scale_dtype="bfloat16"), TOKEN, "in groups of 32 or a multiple"),
        (QuantSpec(8, strategy="group", group_size=32, scale_dtype="bfloat16"), TOKEN, "with at most 4 bits"),
    ],
)
def test_other_quantization_is_refused_by_the_name_of_the_layer(
    weight: QuantSpec, activation: QuantSpec | None, said: str
) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(QatkitError, match=r"layer '0': .*XNNPACK") as error:
        FORMATS["executorch"].check_model(model, {"0": Scheme(weight, activation)}, linear_codes=True)
    assert said in str(error.value)


def test_calibrated_inputs_need_a_target_that_quantizes_outputs_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    prepare_qat(model, QuantSpec(8), A8)
    said = "layer '0': XNNPACK's integer layers write codes, but only inputs are quantized; set target: executorch"
    with pytest.raises(QatkitError, match=said):
        FORMATS["executorch"].check_model(model)
    with pytest.raises(QatkitError, match=said):
        FORMATS["executorch"].check_model(nn.Sequential(nn.Linear(8, 8)), {"0": Scheme(QuantSpec(8), A8)})
    placed = nn.Sequential(nn.Linear(8, 8))
    prepare_for_target(placed, "executorch", torch.rand(4, 8))
    FORMATS["executorch"].check_model(placed)


def test_both_targets_are_accepted() -> None:
    for name in ("executorch", "executorch-8da4w"):
        scheme = Scheme(TARGETS[name].weight, TARGETS[name].activation)
        FORMATS["executorch"].check_model(nn.Sequential(nn.Linear(64, 8)), {"0": scheme}, linear_codes=True)


def test_layers_of_other_classes_are_refused() -> None:
    for layer in (nn.Conv1d(8, 8, 1), nn.Embedding(8, 8)):
        kind = type(layer).__name__
        with pytest.raises(QatkitError, match=f"layer '0': ExecuTorch export does not support a quantized {kind}"):
            FORMATS["executorch"].check_model(nn.Sequential(layer), {"0": Scheme(QuantSpec(8), A8)})
    convolution = nn.Sequential(nn.Conv2d(8, 8, 1))
    with pytest.raises(QatkitError, match="layer '0': dynamic activations are supported only for linear layers"):
        FORMATS["executorch"].check_model(convolution, {"0": Scheme(QuantSpec(8), TOKEN)})


def test_parameters_in_half_precision_and_a_quantized_cache_are_refused() -> None:
    with pytest.raises(QatkitError, match=r"'0.weight' is bfloat16, but ExecuTorch export supports only float32"):
        FORMATS["executorch"].check_model(nn.Sequential(nn.Linear(8, 8)).bfloat16())
    with pytest.raises(QatkitError, match="ExecuTorch export does not support KV cache quantization"):
        FORMATS["executorch"].check_model(nn.Linear(8, 8), {}, kv_cache=True)
