"""Steps with a loss or a gradient that is no number: left out, counted, and the end of training where they go on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from qatkit.callbacks import NonFiniteSteps
from qatkit.callbacks.non_finite import non_finite
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QatkitError, QatkitWarning
from tests.callbacks.modules import Classifier, batches, trainer

pytestmark = pytest.mark.filterwarnings("ignore:training.*skipped:qatkit.errors.QatkitWarning")


class Ill(Classifier):
    """Its loss is NaN, or only its gradient is, in some batches."""

    def __init__(self, bad: set[int], of: str = "loss", value: float = torch.nan) -> None:
        super().__init__()
        self.bad, self.of, self.value = bad, of, value
        self.weights: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.weights.append(self.net[0].weight.detach().clone())
        loss = super().training_step(batch, batch_idx)
        if batch_idx not in self.bad:
            return loss
        if self.of == "gradient":  # the root's slope at 0 is infinite, and 0 times that is NaN
            return loss + (0.0 * self.net[0].weight).abs().sqrt().sum()
        return loss * self.value


@pytest.mark.parametrize(("of", "value"), [("loss", torch.nan), ("loss", torch.inf), ("gradient", 0.0)])
def test_a_bad_step_changes_no_weight_and_the_next_one_goes_on(of: str, value: float) -> None:
    module = Ill({3, 4}, of, value)
    trainer(NonFiniteSteps(limit=3)).fit(module, batches())
    seen = [*module.weights, module.net[0].weight.detach()]
    changed = [not torch.equal(before, after) for before, after in pairwise(seen)]
    assert changed == [True, True, True, False, False, True, True, True]
    assert all(weight.isfinite().all() for weight in seen)


def test_it_changes_nothing_where_every_step_is_good() -> None:
    plain, watched = Classifier(), Classifier()
    trainer().fit(plain, batches())
    trainer(NonFiniteSteps()).fit(watched, batches())
    assert torch.equal(plain.net[0].weight, watched.net[0].weight)


def test_one_bad_batch_spoils_the_step_that_it_is_accumulated_in() -> None:
    module = Ill({3})
    trainer(NonFiniteSteps(limit=2), max_steps=4, accumulate_grad_batches=2).fit(module, batches())
    changed = [not torch.equal(module.weights[i], module.weights[i + 2]) for i in (0, 2, 4)]
    assert changed == [True, False, True]


def test_too_many_in_a_row_end_training_with_the_step_and_the_last_checkpoint(tmp_path: Path) -> None:
    module = Ill({2, 4, 5, 6})
    kept = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=2)
    watch = NonFiniteSteps(limit=3)
    with pytest.raises(QatkitError) as caught:
        trainer(watch, kept, enable_checkpointing=True).fit(module, batches())
    message = str(caught.value)
    assert message.startswith(
        "training: the loss was non-finite in 3 consecutive steps, up to step 7 (no weight changed in these steps; "
    )
    assert f"training continues from the last checkpoint, {tmp_path / 'last.ckpt'}); try a smaller lr" in message
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 6
    assert torch.equal(state["state_dict"]["net.0.weight"], module.weights[-1])
    assert state["callbacks"]["NonFiniteSteps"] == {"in_a_row": 2}


def test_without_a_checkpoint_it_says_that_there_is_none() -> None:
    with pytest.raises(
        QatkitError, match=r"the gradient was non-finite .* there is no checkpoint yet\); try a smaller"
    ):
        trainer(NonFiniteSteps(limit=2)).fit(Ill({0, 1}, "gradient"), batches())
    with pytest.raises(QatkitError, match="limit: 0 is out of range"):
        NonFiniteSteps(limit=0)


def test_weights_that_were_non_finite_before_are_named_and_no_checkpoint_is_praised(tmp_path: Path) -> None:
    class Spoiled(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            if batch_idx == 3:
                nn.init.constant_(self.net[2].bias, torch.inf)
            return super().training_step(batch, batch_idx)

    kept = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1)
    with pytest.raises(QatkitError) as caught:
        trainer(NonFiniteSteps(limit=2), kept, enable_checkpointing=True).fit(Spoiled(), batches())
    message = str(caught.value)
    assert "'bias' of layer 'net.2' was already non-finite before these steps" in message
    assert "no weight changed" not in message
    assert (
        f"the last checkpoint, {tmp_path / 'last.ckpt'}, may contain non-finite weights too; resume from an earlier one"
        in message
    )


def test_infinity_in_a_buffer_is_a_mask_and_a_scale_that_is_not_calibrated_is_no_mistake() -> None:
    from qatkit import QuantSpec, prepare_qat

    model = nn.Sequential(nn.Linear(8, 4))
    prepare_qat(model, activation=QuantSpec(8, strategy="tensor", symmetric=False))
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    assert non_finite(model) is None
    model.register_buffer("mean", torch.tensor([0.0, torch.nan]))
    assert non_finite(model) == "'mean'"


def test_parameters_that_are_no_plain_floats_are_passed_over() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(4), nn.Linear(4, 4))
    quantize_(model[0], Int8WeightOnlyConfig())
    model[2].weight = nn.Parameter(torch.eye(4).to_sparse_csr())
    assert non_finite(model) is None
    nn.init.constant_(model[2].bias, torch.nan)
    assert non_finite(model) == "'bias' of layer '2'"


def spoiled_batches(*rows: int) -> DataLoader[Any]:
    """Eight batches of 16 samples, with NaN in some samples."""
    inputs, labels = (torch.cat(part) for part in zip(*batches(), strict=True))
    inputs[list(rows), 2] = torch.nan
    return DataLoader(TensorDataset(inputs, labels), batch_size=16)


def test_a_skipped_step_names_the_batch_and_the_tensor_that_hold_nan() -> None:
    with pytest.warns(QatkitWarning) as told:
        trainer(NonFiniteSteps()).fit(Classifier(), spoiled_batches(40, 41, 100))
    ours = [str(each.message) for each in told if each.category is QatkitWarning]
    assert ours == [
        "training: step 3 was skipped because its loss was non-finite: 'inputs' of batch 1 of 1 contains non-finite "
        "values; remove the non-finite samples from the data",
        "training: 2 steps up to step 8 were skipped because their loss or gradient was non-finite",
    ]


def test_of_accumulated_batches_the_bad_one_is_named() -> None:
    accumulating = trainer(NonFiniteSteps(), accumulate_grad_batches=4, max_steps=2)
    with pytest.warns(QatkitWarning, match="step 2 was skipped.*: 'inputs' of batch 3 of 4 contains non-finite"):
        accumulating.fit(Classifier(), spoiled_batches(100))


def test_a_skipped_step_on_good_data_says_no_more_than_that() -> None:
    with pytest.warns(QatkitWarning, match="^training: step 4 was skipped because its gradient was non-finite$"):
        trainer(NonFiniteSteps()).fit(Ill({3}, "gradient"), batches())


def test_the_error_after_too_many_steps_names_the_data_too() -> None:
    with pytest.raises(
        QatkitError, match=r"the loss \('inputs' of batch 1 of 1 contains non-finite .*\) was non-finite"
    ):
        trainer(NonFiniteSteps(limit=2)).fit(Classifier(), spoiled_batches(0, 16))
