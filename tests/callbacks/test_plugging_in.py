"""The callbacks among everything else people put into a Trainer."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining, load_quantized
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.models import cnn
from tests.callbacks.modules import Classifier, batches, network, trainer
from tests.support import warm

W4 = QuantSpec(num_bits=4, observer="lsq")
A8 = QuantSpec(symmetric=False, strategy="tensor")
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def qat() -> QuantizationAwareTraining:
    return QuantizationAwareTraining(W4, A8)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Classifier]:
    module = Classifier()
    fit = trainer(qat())
    fit.fit(module, batches())
    fit.save_checkpoint(tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt", module.eval()


def test_a_new_process_validates_tests_and_predicts_from_a_checkpoint(checkpoint: tuple[Path, Classifier]) -> None:
    path, trained = checkpoint
    fresh = Classifier()
    (predicted,) = [trainer(qat()).predict(fresh, batches(1), ckpt_path=str(path))]
    assert predicted is not None
    expected = trained(next(iter(batches(1)))[0])
    assert torch.equal(predicted[0], expected)  # type: ignore[arg-type]
    before = trainer(qat()).validate(Classifier(), batches(1), ckpt_path=str(path), verbose=False)
    assert before[0]["val_loss"] == pytest.approx(F.cross_entropy(expected, next(iter(batches(1)))[1]).item())


def test_load_quantized_gives_the_trained_model_without_a_trainer(checkpoint: tuple[Path, Classifier]) -> None:
    path, trained = checkpoint
    loaded = load_quantized(Classifier(), path).eval()
    assert torch.equal(loaded(X), trained(X))


def test_load_quantized_folds_batchnorm_as_the_training_did(tmp_path: Path) -> None:
    module = Classifier(cnn([4, 8]))
    fit = trainer(qat())
    images = torch.randn(32, 1, 8, 8)
    fit.fit(module, DataLoader(TensorDataset(images, torch.randint(0, 10, (32,))), batch_size=8))
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_quantized(Classifier(cnn([4, 8])), tmp_path / "model.ckpt").eval()
    assert torch.equal(loaded(images), module.eval()(images))


def test_load_quantized_says_when_a_checkpoint_holds_no_quantizers(tmp_path: Path) -> None:
    fit = trainer()
    fit.fit(module := Classifier(), batches())
    fit.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(QatkitError, match=r"plain\.ckpt: .* no quantized layers; load the checkpoint with load_from"):
        load_quantized(module, tmp_path / "plain.ckpt")


def test_the_latent_weights_of_a_checkpoint_load_into_the_plain_module(checkpoint: tuple[Path, Classifier]) -> None:
    path, trained = checkpoint
    plain = Classifier.load_from_checkpoint(path, strict=False, weights_only=False)
    assert torch.equal(plain.net[0].weight, trained.net[0].weight)


def test_early_stopping_and_model_checkpoint_work_beside_it(tmp_path: Path) -> None:
    module = Classifier()
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    stop = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    options = {"max_steps": -1, "max_epochs": 9, "enable_checkpointing": True}
    fit = trainer(qat(), best, stop, **options)
    fit.fit(module, batches(), batches(2))
    assert fit.current_epoch < 9
    loaded = load_quantized(Classifier(), Path(best.best_model_path)).eval()
    assert loaded(X).isfinite().all()


def test_an_average_of_weights_holds_the_calibrated_scales() -> None:
    module = Classifier()
    trainer(qat(), EMAWeightAveraging(decay=0.9)).fit(module, batches())
    assert module.net[0].input_fake_quant.scale.isfinite().all()
    assert module.eval()(X).isfinite().all()


def test_an_average_that_copied_the_module_before_the_swap_is_refused() -> None:
    with pytest.raises(QatkitError, match=r"EMAWeightAveraging copies the module before .* put Quantization"):
        trainer(EMAWeightAveraging(decay=0.9), qat()).fit(Classifier(), batches())


def test_manual_optimization_is_refused_for_distillation_and_works_for_quantization() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    with pytest.raises(QatkitError, match=r"manual optimization: .*add qatkit\.distillation\.kd_loss"):
        trainer(KnowledgeDistillation(network())).fit(Manual(), batches())
    module = Manual()
    trainer(qat()).fit(module, batches())
    assert not torch.equal(module.net[0].weight, network()[0].weight)


@pytest.mark.parametrize("compiled", ["network", "module"])
def test_a_compiled_module_trains_to_the_same_weights(compiled: str) -> None:
    def fit(compile_it: bool) -> Classifier:
        module = Classifier()
        distil = KnowledgeDistillation(copy.deepcopy(module.net), student="net" if compiled == "network" else None)
        if compile_it and compiled == "network":
            module.net.compile(backend="aot_eager")
        target = torch.compile(module, backend="aot_eager") if compile_it and compiled == "module" else module
        trainer(qat(), distil).fit(target, batches())  # type: ignore[arg-type]
        return module

    for (name, eager), (_, fast) in zip(fit(False).state_dict().items(), fit(True).state_dict().items(), strict=True):
        torch.testing.assert_close(eager, fast, rtol=1e-4, atol=1e-5, msg=name)


CLI = """
import torch
from lightning.pytorch.cli import LightningCLI
from tests.callbacks.modules import Classifier, batches

class Module(Classifier):
    def __init__(self, weight_decay: float = 0.0) -> None:
        super().__init__(weight_decay=weight_decay)
    def train_dataloader(self):
        return batches()

cli = LightningCLI(Module, save_config_callback=None)
from qatkit import QATLinear
assert type(cli.model.net[0]) is QATLinear, type(cli.model.net[0])
assert cli.model.net[0].weight_fake_quant.spec.num_bits == 4
print("trained with", [type(c).__name__ for c in cli.trainer.callbacks if type(c).__module__.startswith("qatkit")])
"""

YAML = """
trainer:
  accelerator: cpu
  max_steps: 4
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: qatkit.callbacks.QuantizationAwareTraining
      init_args:
        weight: {num_bits: 4, observer: lsq}
        activation: {num_bits: 8, symmetric: false, strategy: tensor}
    - class_path: qatkit.callbacks.KnowledgeDistillation
      init_args:
        teacher: {class_path: torch.nn.Linear, init_args: {in_features: 8, out_features: 3}}
        temperature: 2.0
        student: net
    - class_path: qatkit.callbacks.CompressionMonitor
"""


def test_a_lightning_cli_config_names_the_callbacks_by_class_path(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(YAML)
    command = [warm.python(), "-c", CLI, "fit", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    names = ["QuantizationAwareTraining", "KnowledgeDistillation", "CompressionMonitor"]
    assert f"trained with {names}" in done.stdout


def test_a_prepared_module_can_be_handed_to_a_plain_trainer() -> None:
    module = Classifier()
    prepare_qat(module, W4)
    trainer().fit(module, batches())
    assert not torch.equal(module.net[0].weight, network()[0].weight)


@pytest.mark.parametrize("part", ["module", "net"])
@pytest.mark.parametrize("fresh_is_compiled", [True, False])
def test_load_quantized_reads_what_a_compiled_module_saved(part: str, fresh_is_compiled: bool, tmp_path: Path) -> None:
    def made(compiled: bool) -> Any:
        module = Classifier()
        if compiled and part == "net":
            module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
        return torch.compile(module, backend="eager") if compiled and part == "module" else module

    trained = made(compiled=True)
    fit = trainer(qat())
    fit.fit(trained, batches())
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_quantized(made(fresh_is_compiled), tmp_path / "model.ckpt")
    assert torch.equal(loaded.eval()(X), trained.eval()(X))


def test_load_from_checkpoint_names_the_function_that_reads_a_quantized_checkpoint(
    checkpoint: tuple[Path, Classifier],
) -> None:
    with pytest.raises(RuntimeError, match=r"load it with qatkit\.callbacks\.load_quantized"):
        Classifier.load_from_checkpoint(checkpoint[0])
