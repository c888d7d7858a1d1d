"""`nn.EmbeddingBag` in ONNX Runtime, and embeddings with one scale and zero point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatkit import QuantSpec, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import load_runtime
from qatkit.export.verification import verify
from tests.export.files import change_constant, constants, first_changed
from tests.support.matrix import representatives

ONE_SCALE = QuantSpec(8, symmetric=False, strategy="tensor")
CASES = [
    (mode, padding, offsets, spec)
    for mode in ("sum", "mean", "max")
    for padding in (None, 3)
    for offsets in (False, True)
    for spec in (QuantSpec(4), ONE_SCALE)
]


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(30, 8, **options)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        out: Tensor = self.bag(ids, offsets, per_sample_weights)
        return out


def failures(model: nn.Module, inputs: dict[str, Tensor], path: Path) -> list[str]:
    batch = (inputs, torch.zeros_like(model(**inputs)))
    return verify(model, path, [batch], threads=1, task="regression", forward=lambda m, batch: m(**batch[0])).failures


@pytest.mark.filterwarnings("ignore:the batch of the example is 12, so the first dimension of 'offsets'")
@pytest.mark.filterwarnings("ignore:the exported file fixes")
@pytest.mark.parametrize(("mode", "padding", "offsets", "spec"), representatives(CASES, {2, 7, 8, 13, 15, 20}))
def test_bags_are_reduced_as_torch_does(
    mode: str, padding: int | None, offsets: bool, spec: QuantSpec, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    path, model = tmp_path / "model.onnx", Bags(mode=mode, padding_idx=padding, include_last_offset=offsets).eval()
    prepare_qat(model, spec, include=["bag"])
    ids = torch.randint(30, (12,) if offsets else (4, 6))
    ids[:2] = 3  # nothing but padding in the first bag
    inputs = {"ids": ids}
    if offsets:
        inputs["offsets"] = torch.tensor([0, 2, 2, 8, 12])  # the second bag is empty
    if mode == "sum":
        inputs["per_sample_weights"] = torch.rand(ids.shape)
    export_onnx(model, inputs, path)
    assert failures(model, inputs, path) == []
    with torch.no_grad():
        torch.testing.assert_close(load_runtime(path, 1)(**inputs), model(**inputs), atol=1e-6, rtol=0)
    codes = constants(path)["bag.weight.codes"]
    assert codes.dtype == (np.int8 if spec.symmetric else np.uint8)


def test_bags_may_have_other_sizes_than_the_example_and_a_changed_row_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, model = tmp_path / "model.onnx", Bags().eval()
    prepare_qat(model, QuantSpec(4), include=["bag"])
    export_onnx(model, {"ids": torch.randint(30, (4, 6))}, path)
    inputs = {"ids": torch.randint(30, (7, 11))}
    assert failures(model, inputs, path) == []
    change_constant(path, "bag.weight.scale", first_changed)
    assert failures(model, inputs, path)[0].startswith("layer 'bag': scales of the weight: 1 of 30 differ")


def test_an_embedding_with_one_scale_and_zero_point_passes(tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", nn.Sequential(nn.Embedding(30, 8)).eval()
    prepare_qat(model, ONE_SCALE, include=["0"])
    ids = torch.randint(30, (4, 6))
    export_onnx(model, ids, path)
    assert verify(model, path, [(ids, torch.zeros(4, 6, 8))], threads=1, task="regression").failures == []
