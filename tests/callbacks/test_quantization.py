"""QuantizationAwareTraining in somebody else's LightningModule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from qatkit.callbacks import CompressionMonitor, QuantizationAwareTraining
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qatkit import QatkitError, QatkitWarning, QATLinear, QuantSpec
from qatkit.quantization.prepare import fake_quantizers
from tests.callbacks.modules import Classifier, batches, network, trainer

W4 = QuantSpec(num_bits=4, observer="lsq")
A8 = QuantSpec(symmetric=False, strategy="tensor")


def test_three_lines_quantize_calibrate_and_train_a_foreign_module() -> None:
    module = Classifier()
    keys, before = set(module.state_dict()), copy.deepcopy(module.net[0].weight)
    trainer(QuantizationAwareTraining(W4, A8), CompressionMonitor()).fit(module, batches())
    assert isinstance(module.net[0], QATLinear)
    assert keys < set(module.state_dict())
    assert not torch.equal(module.net[0].weight, before)
    codes = module.net[0].fake_quantized_weight() / module.net[0].weight_fake_quant.qparams(module.net[0].weight)[0]
    torch.testing.assert_close(codes, codes.round())
    assert len(codes.round().unique()) <= 16


def test_static_ranges_are_those_of_the_training_batches_in_eval_mode() -> None:
    module = Classifier()
    loader = batches(8)
    trainer(QuantizationAwareTraining(None, A8, calibration_batches=3), max_steps=1).fit(module, loader)
    seen = torch.cat([x for x, _ in list(batches(8))[:3]])
    expected = (seen.max() - seen.min()) / 255
    assert module.net[0].input_fake_quant.scale.item() == expected.item()


@pytest.mark.parametrize("own_generator", [True, False])
def test_calibration_does_not_move_the_order_of_training(own_generator: bool) -> None:
    def order(callback: QuantizationAwareTraining | None) -> list[Tensor]:
        seen = []

        class Watched(Classifier):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
                seen.append(batch[0].clone())
                return super().training_step(batch, batch_idx)

        module = Watched()
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(6) if own_generator else None
        trainer(*([callback] if callback else [])).fit(module, batches(8, shuffle=True, generator=generator))
        return seen

    with_calibration, without = order(QuantizationAwareTraining(W4, A8)), order(None)
    assert all(torch.equal(a, b) for a, b in zip(with_calibration, without, strict=True))


def test_scales_are_left_out_of_weight_decay_and_the_groups_look_as_the_user_made_them() -> None:
    module = Classifier(weight_decay=0.5)
    qat = QuantizationAwareTraining(QuantSpec(num_bits=8, observer="lsq"))

    class NoGradient(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * 0.0

    module = NoGradient(weight_decay=0.5)
    fit = trainer(qat)
    scales: list[Tensor] = []
    original = qat.on_fit_start

    def remember(*args: Any) -> None:
        original(*args)
        scales.extend(module.net[i].weight_fake_quant.scale.detach().clone() for i in (0, 2))

    qat.on_fit_start = remember  # type: ignore[method-assign]
    before = network()[0].weight.detach()
    fit.fit(module, batches())
    assert module.net[0].weight.norm() < 0.99 * before.norm()  # the weights do decay
    for scale, index in zip(scales, (0, 2), strict=True):
        assert torch.equal(module.net[index].weight_fake_quant.scale, scale)
    (optimizer,) = fit.optimizers
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(list(module.parameters()))


def test_a_resumed_run_has_the_weights_and_scales_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> Classifier:
        module = Classifier()
        save = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        options = {"max_epochs": epochs, "max_steps": -1, "enable_checkpointing": True}
        qat = QuantizationAwareTraining(W4, A8)
        trainer(qat, save, **options).fit(module, batches(4), ckpt_path=checkpoint and str(checkpoint))
        return module

    whole = fit(4)
    torch.manual_seed(99)
    resumed = fit(4, tmp_path / "epoch=1.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_validate_and_test_after_fit_keep_the_one_swap() -> None:
    module = Classifier()
    fit = trainer(QuantizationAwareTraining(W4, A8))
    fit.fit(module, batches())
    names = [name for name, _ in fake_quantizers(module)]
    fit.validate(module, batches(), verbose=False)
    assert [name for name, _ in fake_quantizers(module)] == names


def test_two_instances_give_two_parts_of_a_model_two_precisions() -> None:
    module = Classifier()
    first = QuantizationAwareTraining(QuantSpec(num_bits=8), include=["net.0"])
    second = QuantizationAwareTraining(QuantSpec(num_bits=2), A8, include=["net.2"])
    trainer(first, second).fit(module, batches())
    assert (first.layers, second.layers) == (["net.0"], ["net.2"])
    assert module.net[0].weight_fake_quant.spec.num_bits == 8
    assert module.net[2].weight_fake_quant.spec.num_bits == 2


class Attention(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return self.head(self.attention(x, x, x)[0].squeeze(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_swapped_layer_that_never_runs_is_an_error_that_names_it() -> None:
    with pytest.raises(
        QatkitError,
        match=r"never calls forward on .* \['unused'\]; .* add these layers to exclude",
    ):
        trainer(QuantizationAwareTraining(W4, include=["unused", "head"])).fit(Attention(), batches())
    with pytest.raises(QatkitError, match="layer 'unused' never ran during calibration, so its input has no range"):
        trainer(QuantizationAwareTraining(W4, A8, include=["unused", "head"])).fit(Attention(), batches())


def test_multihead_attention_is_trained_with_quantized_projections() -> None:
    module = Attention()
    before = module.attention.in_proj_weight.clone()
    callback = QuantizationAwareTraining(W4, A8, exclude=["unused"])
    trainer(callback).fit(module, batches())
    assert callback.layers == ["attention", "attention.out_proj", "head"]
    assert not torch.equal(module.attention.in_proj_weight, before)


def test_a_module_without_a_usable_forward_is_told_what_to_write() -> None:
    class Odd(Classifier):
        def forward(self, x: Tensor, factor: float) -> Any:
            return self.net(x) * factor

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0], 2.0), batch[1])

    with pytest.raises(QatkitError, match=r"calibration_forward: calling Odd .* failed .* pass a function"):
        trainer(QuantizationAwareTraining(W4, A8)).fit(Odd(), batches())
    module = Odd()
    qat = QuantizationAwareTraining(W4, A8, calibration_forward=lambda m, batch: m(batch[0], 2.0))
    trainer(qat).fit(module, batches())
    assert module.net[0].input_fake_quant.ready


def test_a_pattern_that_matches_nothing_is_an_error_and_leaves_the_module_alone() -> None:
    module = Classifier()
    with pytest.raises(QatkitError, match=r"include\[0\]: 'net.first' matches no layer; did you mean 'net.2'"):
        trainer(QuantizationAwareTraining(W4, include=["net.first"])).fit(module, batches())
    assert type(module.net[0]) is nn.Linear


def test_two_instances_leave_the_groups_of_a_decaying_optimizer_whole() -> None:
    module = Classifier(weight_decay=0.1)
    first = QuantizationAwareTraining(QuantSpec(num_bits=8, observer="lsq"), include=["net.0"])
    second = QuantizationAwareTraining(QuantSpec(num_bits=4, observer="lsq"), include=["net.2"])
    fit = trainer(first, second)
    fit.fit(module, batches())
    (group,) = fit.optimizers[0].param_groups
    assert len(group["params"]) == len(list(module.parameters()))
    assert all(len(fit.optimizers[0].state[scale]) for scale in (module.net[i].weight_fake_quant.scale for i in (0, 2)))


@pytest.mark.parametrize("where", ["forward", "optimizer"])
def test_an_error_in_a_step_leaves_the_groups_of_the_optimizer_whole(where: str) -> None:
    class Breaking(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            if where == "forward" and batch_idx == 2:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if where == "optimizer" and self.global_step == 2:
                raise RuntimeError("broken")

    fit = trainer(QuantizationAwareTraining(W4))
    with pytest.raises(RuntimeError, match="broken"):
        fit.fit(Breaking(weight_decay=0.1), batches())
    assert len(fit.optimizers[0].param_groups) == 1


def test_a_layer_that_only_calibration_runs_is_an_error_too() -> None:
    class Around(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            x = F.linear(batch[0], self.net[0].weight, self.net[0].bias).relu()
            return F.cross_entropy(self.net[2](x), batch[1])

    with pytest.raises(QatkitError, match=r"training never calls forward on the quantized layers \['net\.0'\]"):
        trainer(QuantizationAwareTraining(W4, A8)).fit(Around(), batches())


def test_a_mistake_in_a_pattern_leaves_batchnorm_unfolded() -> None:
    module = Classifier(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)))
    with pytest.raises(QatkitError, match="matches no layer"):
        trainer(QuantizationAwareTraining(W4, include=["net.conv"])).fit(module, batches())
    assert type(module.net[1]) is nn.BatchNorm2d


def test_several_loaders_are_refused_for_calibration_with_what_to_do() -> None:
    with pytest.raises(QatkitError, match=r"a dict of 2 loaders, .*qatkit\.calibrate"):
        trainer(QuantizationAwareTraining(W4, A8)).fit(Classifier(), {"a": batches(), "b": batches()})


def test_a_list_of_batches_is_refused_with_the_loader_that_takes_it() -> None:
    listed = list(batches())
    with pytest.raises(QatkitError, match=r"pass DataLoader\(batches, batch_size=None\)"):
        trainer(QuantizationAwareTraining(W4, A8)).fit(Classifier(), listed)
    module = Classifier()
    trainer(QuantizationAwareTraining(W4, A8)).fit(module, DataLoader(listed, batch_size=None))
    assert float(module.net[0].input_fake_quant.scale) != 1.0


def test_half_precision_modules_train_with_float32_arithmetic() -> None:
    module = Classifier()
    trainer(QuantizationAwareTraining(W4, A8), precision="bf16-true").fit(module, batches())
    assert module.net[0].weight.dtype is torch.bfloat16
    assert module.net[0].weight_fake_quant.qparams(module.net[0].weight)[0].dtype is torch.float32


def test_a_batchnorm_that_cannot_be_folded_keeps_its_statistics_while_its_scale_is_trained() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    norm: Any = net[1]
    norm.running_mean.fill_(0.3)
    weight = norm.weight.clone()
    module = Classifier(net)
    with pytest.warns(QatkitWarning, match=r"BatchNorm layers were not folded.*\['net.1'\]"):
        trainer(QuantizationAwareTraining(weight=QuantSpec(num_bits=4))).fit(module, batches(), batches(2))
    assert torch.equal(norm.running_mean, torch.full((16,), 0.3))
    assert not torch.equal(norm.weight, weight)
