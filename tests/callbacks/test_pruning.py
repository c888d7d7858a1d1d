"""MagnitudePruning and ConstantPruning in a user's LightningModule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from qatkit.callbacks.pruning import ConstantPruning, MagnitudePruning
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec
from qatkit.pruning.masks import magnitude_mask, nm_mask
from qatkit.pruning.schedule import Ramp
from tests.callbacks.modules import Classifier, batches, network, trainer


def zeros(module: Classifier, index: int = 0) -> int:
    return int((module.net[index].weight == 0).sum())


class Watch(Callback):
    """The number of zeros in the first layer after every batch, as a callback behind the pruning sees it."""

    def __init__(self) -> None:
        self.zeros: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Classifier)
        self.zeros.append(zeros(pl_module))


def test_one_line_prunes_to_an_exact_count_and_training_keeps_the_mask() -> None:
    module = Classifier(weight_decay=0.1)
    before, mask = module.net[0].weight.detach().clone(), magnitude_mask(module.net[0].weight, 0.6)
    keys, watch = set(module.state_dict()), Watch()
    trainer(MagnitudePruning(0.6), watch).fit(module, batches())
    assert watch.zeros == [round(0.6 * 128)] * 8
    assert torch.equal(module.net[0].weight != 0, mask)
    assert not torch.equal(module.net[0].weight[mask], before[mask])
    assert set(module.state_dict()) == keys
    assert type(module.net[0]) is nn.Linear


def test_the_model_wide_scope_prunes_the_smallest_of_all_layers_together() -> None:
    module = Classifier()
    both = torch.cat([module.net[i].weight.detach().flatten() for i in (0, 2)])
    trainer(MagnitudePruning(0.5, scope="model")).fit(module, batches())
    kept = torch.cat([module.net[i].weight.detach().flatten() != 0 for i in (0, 2)])
    assert torch.equal(kept, magnitude_mask(both, 0.5))
    assert zeros(module, 0) / 128 != zeros(module, 2) / 48


def test_nm_patterns_blocks_and_sparsity_by_layer() -> None:
    module = Classifier()
    start = copy.deepcopy(module.net[0].weight)
    trainer(MagnitudePruning(nm=(2, 4))).fit(module, batches())
    assert torch.equal(module.net[0].weight != 0, nm_mask(start, 2, 4))
    module = Classifier()
    trainer(MagnitudePruning(0.5, block=(4, 4), include=["net.0"])).fit(module, batches())
    blocks = (module.net[0].weight != 0).view(4, 4, 2, 4).transpose(1, 2).reshape(8, 16)
    assert blocks.sum(dim=1).sort().values.tolist() == [0] * 4 + [16] * 4
    module = Classifier()
    trainer(MagnitudePruning(0.5, layers={"net.2": 0.25})).fit(module, batches())
    assert (zeros(module, 0), zeros(module, 2)) == (64, 12)
    module = Classifier()
    trainer(MagnitudePruning(0.5, layers={"*.2": 0.0})).fit(module, batches())
    assert (zeros(module, 0), zeros(module, 2)) == (64, 0)


def test_a_ramp_follows_its_equation_and_ends_exactly() -> None:
    ramp, watch = Ramp(0.75, start=0.25, end=0.75), Watch()
    trainer(MagnitudePruning(ramp=ramp), watch, max_steps=40).fit(Classifier(), batches(40))
    expected = [round(128 * ramp.at(step / 40)) for step in range(1, 41)]
    assert watch.zeros == expected
    assert expected[9] == 0 < expected[10] < expected[20] < expected[-1] == 96


def test_accumulated_batches_are_one_step() -> None:
    ramp, watch = Ramp(0.75), Watch()
    trainer(MagnitudePruning(ramp=ramp), watch, max_steps=4, accumulate_grad_batches=3).fit(Classifier(), batches(12))
    assert watch.zeros[2::3] == [round(128 * ramp.at(step / 4)) for step in range(1, 5)]
    assert watch.zeros[3] == watch.zeros[4] == watch.zeros[2]


def test_clipping_counts_only_gradients_of_kept_weights() -> None:
    norms: list[tuple[Tensor, Tensor]] = []

    class Clipping(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            weight = self.net[0].weight
            norms.append((weight.grad.norm(), weight.grad[weight != 0].norm()))

    trainer(MagnitudePruning(0.7)).fit(Clipping(), batches())
    assert len(norms) == 8
    for whole, kept in norms:
        torch.testing.assert_close(whole, kept)


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "two", "manual", "lbfgs"])
def test_momentum_from_earlier_steps_does_not_move_pruned_weights(optimizer: str) -> None:
    class Other(Classifier):
        automatic_optimization = optimizer != "manual"

        def configure_optimizers(self) -> Any:
            if optimizer == "momentum":
                return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            if optimizer == "lbfgs":
                return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
            if optimizer == "adam":
                return torch.optim.Adam(self.parameters(), lr=1e-2)
            return [torch.optim.Adam(layer.parameters(), lr=1e-2) for layer in (self.net[0], self.net[2])]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self.automatic_optimization:
                return loss
            self.manual_backward(loss)
            for each in self.optimizers():
                each.step()
                each.zero_grad()
            return None

    if optimizer == "two":
        Other.automatic_optimization = False
    watch = Watch()
    # a mask that grows in the middle of training: momentum of the weights pruned then is already there
    trainer(MagnitudePruning(ramp=Ramp(0.6, start=0.4, end=0.4)), watch, max_steps=16).fit(Other(), batches(16))
    assert watch.zeros[0] == 0
    assert watch.zeros[-4:] == [round(0.6 * 128)] * 4


@pytest.mark.parametrize("pruning", ["one-shot", "ramp", "model", "nm"])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path: Path, pruning: str) -> None:
    options: dict[str, Any] = {
        "one-shot": {"sparsity": 0.5},
        "ramp": {"ramp": Ramp(0.75, end=0.9)},
        "model": {"ramp": Ramp(0.6, initial=0.2), "scope": "model"},
        "nm": {"nm": (2, 4)},
    }[pruning]

    def fit(checkpoint: Path | None = None) -> Classifier:
        module = Classifier(weight_decay=0.1)
        save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
        settings = {"max_epochs": 4, "max_steps": -1, "enable_checkpointing": True}
        callbacks = [MagnitudePruning(**options), save]
        trainer(*callbacks, **settings).fit(module, batches(4), ckpt_path=checkpoint and str(checkpoint))
        return module

    whole = fit()
    torch.manual_seed(99)
    resumed = fit(tmp_path / "step=8.ckpt")
    assert zeros(whole) > 60
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def saved(folder: Path, *callbacks: Callback, **options: Any) -> Path:
    fit = trainer(*callbacks, max_steps=4, **options)
    fit.fit(Classifier(), batches())
    fit.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


def test_the_checkpoint_is_plain_and_its_record_is_plain_numbers(tmp_path: Path) -> None:
    content = torch.load(saved(tmp_path, MagnitudePruning(0.5)), weights_only=True)
    assert set(content["state_dict"]) == {f"net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    (state,) = content["callbacks"].values()
    assert state["zeros"] == {"net.0": 64, "net.2": 24}


@pytest.mark.parametrize("callback", [lambda: MagnitudePruning(0.5), ConstantPruning])
def test_a_checkpoint_that_lost_zeros_is_an_error(tmp_path: Path, callback: Any) -> None:
    module = Classifier()
    trainer(MagnitudePruning(0.5)).fit(module, batches())
    fit = trainer(callback(), max_steps=4)
    fit.fit(module, batches())
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    content["state_dict"]["net.2.weight"][0] += 1e-3
    torch.save(content, tmp_path / "damaged.ckpt")
    lost = int((module.net[2].weight[0] == 0).sum())
    message = f"layer 'net.2' was saved with 24 zeros in 48 weights, but its loaded weight has {24 - lost},"
    with pytest.raises(QatkitError, match=message):
        trainer(callback()).fit(Classifier(), batches(), ckpt_path=str(tmp_path / "damaged.ckpt"))


def test_resuming_with_other_settings_or_layers_is_an_error(tmp_path: Path) -> None:
    path = str(saved(tmp_path, MagnitudePruning(0.5)))
    with pytest.raises(QatkitError, match=r"ramp: the checkpoint was pruned with .*0\.5.* this run would .*0\.8"):
        trainer(MagnitudePruning(0.8)).fit(Classifier(), batches(), ckpt_path=path)
    with pytest.raises(QatkitError, match=r"layers: the checkpoint was pruned with {}, but this run would"):
        trainer(MagnitudePruning(0.5, layers={"net.2": 0.0})).fit(Classifier(), batches(), ckpt_path=path)


def test_resuming_with_patterns_that_miss_a_pruned_layer_is_an_error(tmp_path: Path) -> None:
    path = str(saved(tmp_path, MagnitudePruning(0.5)))
    only = MagnitudePruning(0.5, include=["net.2"])
    with pytest.raises(
        QatkitError, match=r"the checkpoint has pruned weights in layer 'net.0', but no callback would keep"
    ):
        trainer(only).fit(Classifier(), batches(), ckpt_path=path)
    module = Classifier()
    trainer(only, ConstantPruning(include=["net.0"])).fit(module, batches(), ckpt_path=path)
    assert zeros(module) == 64
    trainer(only).validate(Classifier(), batches(), ckpt_path=path, verbose=False)  # nothing is trained


def test_a_checkpoint_from_before_the_callback_is_pruned_when_it_resumes(tmp_path: Path) -> None:
    path, watch = saved(tmp_path), Watch()
    trainer(MagnitudePruning(0.5), watch).fit(Classifier(), batches(), ckpt_path=str(path))
    assert watch.zeros == [64] * 4


def test_an_error_in_the_middle_of_a_step_leaves_a_checkpoint_with_its_zeros(tmp_path: Path) -> None:
    class Breaking(Classifier):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 6:
                raise RuntimeError("broken")

    # the momentum of step 5 moves weights that are pruned after it
    pruning = MagnitudePruning(ramp=Ramp(0.5, start=0.6, end=0.6))
    with pytest.raises(RuntimeError, match="broken"):
        trainer(pruning, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True).fit(Breaking(), batches())
    content = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert (content["state_dict"]["net.0.weight"] == 0).sum() == 64


def test_constant_pruning_keeps_the_zeros_of_an_earlier_stage_and_only_those() -> None:
    module = Classifier()
    trainer(MagnitudePruning(0.5, include=["net.0"])).fit(module, batches())
    mask, constant = module.net[0].weight != 0, ConstantPruning()
    trainer(constant).fit(module, batches())
    assert constant.layers == ["net.0"]
    assert torch.equal(module.net[0].weight != 0, mask)


def test_constant_pruning_refuses_layers_without_zeros_and_layers_of_zeros() -> None:
    with pytest.raises(QatkitError, match=r"no weight of \['net.0', 'net.2'\] is 0"):
        trainer(ConstantPruning()).fit(Classifier(), batches())
    module = Classifier()
    nn.init.zeros_(module.net[2].weight)
    for callback in (ConstantPruning(), MagnitudePruning(0.5)):
        with pytest.raises(QatkitError, match=r"the weight of layer 'net.2' is all zeros"):
            trainer(callback).fit(module, batches())


def test_pruning_quantization_and_a_teacher_work_in_one_trainer() -> None:
    teacher = network()
    module = Classifier(weight_decay=0.1)
    trainer(
        MagnitudePruning(nm=(2, 4), include=["net.0"]),
        QuantizationAwareTraining(QuantSpec(num_bits=4, observer="lsq"), QuantSpec(symmetric=False, strategy="tensor")),
        KnowledgeDistillation(teacher, temperature=2.0, student="net"),
    ).fit(module, batches())
    kept = (module.net[0].weight != 0).view(16, 2, 4).sum(dim=2)
    assert (kept == 2).all()
    quantized = module.net[0].fake_quantized_weight().view(16, 2, 4)
    assert ((quantized != 0).sum(dim=2) <= 2).all()
    assert not torch.equal(
        module.net[0].weight[module.net[0].weight != 0], teacher[0].weight[teacher[0].weight != 0][:64]
    )


def test_ranges_are_calibrated_on_the_pruned_model() -> None:
    module = Classifier(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)))
    expected = copy.deepcopy(module)
    activation = QuantSpec(symmetric=False, strategy="tensor")
    quantization = QuantizationAwareTraining(None, activation, include=["net.1"], calibration_batches=1)
    trainer(MagnitudePruning(0.75), quantization, max_steps=1).fit(module, batches())
    layer = expected.net[0]
    with torch.no_grad():
        layer.weight.mul_(magnitude_mask(layer.weight, 0.75))
        inputs = layer(next(iter(batches()))[0])
    scale = (inputs.amax().clamp(min=0) - inputs.amin().clamp(max=0)) / 255
    torch.testing.assert_close(module.net[1].input_fake_quant.scale, scale.view(1))


def test_averaged_weights_keep_the_zeros_and_a_wrong_order_is_refused() -> None:
    module = Classifier()
    average = EMAWeightAveraging(decay=0.5)
    trainer(MagnitudePruning(0.5), average).fit(module, batches())
    assert zeros(module) == 64
    with pytest.raises(QatkitError, match="put MagnitudePruning before EMAWeightAveraging"):
        trainer(EMAWeightAveraging(), MagnitudePruning(0.5)).fit(Classifier(), batches())
    with pytest.raises(QatkitError, match="averages weights from before and after pruning"):
        trainer(MagnitudePruning(ramp=Ramp(0.5)), EMAWeightAveraging()).fit(Classifier(), batches())

    def swa() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(1e-3, swa_epoch_start=0.3)

    with pytest.raises(QatkitError, match="StochasticWeightAveraging averages weights from before and after"):
        trainer(MagnitudePruning(ramp=Ramp(0.5)), swa()).fit(Classifier(), batches())
    for callbacks in ([MagnitudePruning(0.5), swa()], [swa(), MagnitudePruning(0.5)]):
        module = Classifier()
        trainer(*callbacks, max_epochs=4, max_steps=-1).fit(module, batches())
        assert zeros(module) == 64


def test_half_precision_prunes_the_exact_count() -> None:
    module = Classifier()
    trainer(MagnitudePruning(0.6), precision="bf16-true").fit(module, batches())
    assert module.net[0].weight.dtype is torch.bfloat16
    assert zeros(module) == round(0.6 * 128)


def test_a_convolution_in_channels_last_is_pruned_and_stays_so() -> None:
    net = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 8, 2), nn.Flatten(), nn.Linear(8, 3))
    module = Classifier(net.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    trainer(MagnitudePruning(0.5)).fit(module, batches())
    assert zeros(module, 1) == 32


def test_the_callback_serves_a_second_fit_and_is_pickled() -> None:
    import pickle

    pruning = MagnitudePruning(0.5)
    trainer(pruning).fit(Classifier(), batches())
    module = Classifier()
    trainer(pickle.loads(pickle.dumps(pruning))).fit(module, batches())
    assert zeros(module) == 64
    module = Classifier()
    trainer(pruning).fit(module, batches())
    assert zeros(module) == 64
