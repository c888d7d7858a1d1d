"""Limits of export formats that follow from the model and the task are reported before training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatkit import QatkitError, QuantSpec
from qatkit.pipeline.export import check_export
from qatkit.pipeline.validation import validate_recipe
from qatkit.quantization.layers import SWAPS
from qatkit.quantization.selection import select
from qatkit.quantization.swaps import PARTS
from qatkit.recipe.loading import load_recipe

INT8 = "stages={dense: {max_steps: 1}, qat: {max_steps: 1, quantize: {weight: {num_bits: 8}, include: ['%s']}}}"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.EmbeddingBag(4, 4, max_norm=2.0),
            r"ONNX export does not support max_norm=2\.0 of embeddings, which .*; set",
        ),
        (nn.Linear(4, 4, dtype=torch.bfloat16), r"the weight is bfloat16, .*; train in float32"),
    ],
)
def test_layers_that_onnx_cannot_hold_are_refused_before_training(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.odd = layer
    recipe = load_recipe("vision/digits_int4", [INT8 % "odd", "export={format: onnx}"])
    check_export(recipe, "dense", model.to("meta"), None)
    with pytest.raises(QatkitError, match=rf"export\.format: stage 'qat': layer 'odd': {message}"):
        check_export(recipe, "qat", model.to("meta"), None)


def test_dynamic_activations_are_refused_for_onnx_before_training() -> None:
    dynamic = "stages.qat.quantize.layers={classifier: {scheme: W8A8}}"
    with pytest.raises(QatkitError, match=r"stage 'qat': layer 'classifier': ONNX Runtime does not support .*token"):
        validate_recipe(load_recipe("vision/digits_int4", [dynamic]))


def test_every_layer_that_can_be_quantized_by_type_is_accepted_for_onnx_before_training() -> None:
    arguments: dict[type[nn.Module], tuple[int, ...]] = {
        nn.Linear: (4, 4), nn.Embedding: (4, 4), nn.EmbeddingBag: (4, 4), nn.MultiheadAttention: (4, 2),
        nn.LSTM: (4, 4), nn.GRU: (4, 4), nn.RNN: (4, 4),
    }  # fmt: skip
    kinds = [*SWAPS, *PARTS]
    model = nn.Sequential(nn.Linear(4, 4))
    model.all = nn.ModuleList(kind(*arguments.get(kind, (4, 4, 3))) for kind in kinds)
    recipe = load_recipe("vision/digits_int4", [INT8 % "all.[0-9]*", "export={format: onnx}"])
    check_export(recipe, "qat", model.to("meta"), None)
    assert len(select(model, QuantSpec(8), include=["all.[0-9]*"])) == len(kinds) + 1  # and one output projection
