"""Every architecture: quantized, pruned and distilled by callbacks, exported, stripped, and loaded by plain code."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from qatkit.callbacks import KnowledgeDistillation, MagnitudePruning, QuantizationAwareTraining
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from qatkit import QuantSpec, strip_qat
from qatkit.errors import QatkitWarning
from qatkit.export.dense import export_dense
from qatkit.export.output_tensors import tensors
from qatkit.pruning.layers import PRUNABLE
from qatkit.quantization.prepare import quantized_weights
from tests.callbacks.modules import Classifier, trainer
from tests.models.architectures import ARCHITECTURES, Architecture
from tests.support.matrix import representatives


class Foreign(Classifier):
    """Trains any network to return small outputs."""

    def forward(self, **batch: Tensor) -> Any:
        return self.net(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        found = [output for output in tensors(self.net(**batch)).values() if output.is_floating_point()]
        return torch.stack([output.square().mean() for output in found]).sum()


def outputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors(model.eval()(**batch))


KEPT = {0, 1, 7, 8, 12, 13, 19, 22}  # layers of every kind; the others in `make slow`


@pytest.mark.filterwarnings("ignore:not pruned, because")  # its own tests are in tests/pruning
@pytest.mark.parametrize("architecture", representatives([pytest.param(a, id=a.name) for a in ARCHITECTURES], KEPT))
def test_an_architecture_is_quantized_pruned_distilled_and_loaded_by_plain_code(
    architecture: Architecture, tmp_path: Path
) -> None:
    net, batch = architecture.build(), architecture.batch()
    module = Foreign(copy.deepcopy(net))
    prune = [MagnitudePruning(0.5, exclude=architecture.exclude)] if architecture.prunable else []
    quantize = QuantizationAwareTraining(
        QuantSpec(4), QuantSpec(8, strategy="tensor"), exclude=[*architecture.exclude, *architecture.unsupported],
        layers=architecture.layers,
    )  # fmt: skip
    distil = KnowledgeDistillation(net, student="net", loss="mse", outputs=architecture.outputs)
    fit = trainer(*prune, quantize, distil, max_steps=1)
    with pytest.warns(QatkitWarning, match=architecture.warns) if architecture.warns else nullcontext():
        fit.fit(module, DataLoader([batch], batch_size=None))
    assert 0 < float(fit.callback_metrics["train/kd_loss"]) < float("inf")
    weights = quantized_weights(module.net)
    fraction = sum(weight.numel() for _, weight, _ in weights) / sum(p.numel() for p in module.net.parameters())
    assert round(fraction, 3) == architecture.quantized, fraction
    modules = dict(module.net.named_modules())
    for name, weight, _ in weights if prune else []:
        if isinstance(modules.get(name), PRUNABLE):
            assert int((weight == 0).sum()) == round(0.5 * weight.numel()), name
    export_dense(module.net, tmp_path / "model.safetensors")
    strip_qat(module.net)
    module.net.load_state_dict(load_file(tmp_path / "model.safetensors"))
    plain = outputs(module.net, batch)
    assert plain.keys() == outputs(net, batch).keys()
    assert all(value.isfinite().all() for value in plain.values())
    assert any(not torch.equal(value, plain[name]) for name, value in outputs(net, batch).items())
