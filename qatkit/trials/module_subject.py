"""A trained LightningModule with its data module, as the subject of a search."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from qatkit.callbacks import KnowledgeDistillation, MagnitudePruning, QuantizationAwareTraining
from qatkit.callbacks.batches import first_batches
from qatkit.errors import QatkitError
from qatkit.export.exporting import export_model
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import FORMATS
from qatkit.export.interface import ExportContext
from qatkit.export.verification import verify
from qatkit.pruning.layers import prunable_layers
from qatkit.pruning.masks import apply_mask, magnitude_mask, nm_mask
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.targets import TARGETS
from qatkit.recipe import ShrinkConfig
from qatkit.schemes import Scheme
from qatkit.stages import shrink
from qatkit.tasks import call, mean_loss
from qatkit.tasks.table import Task, declared_task
from qatkit.trials.ladder import Rung
from qatkit.trials.promise import split_batches
from qatkit.trials.sensitivity import batch_loss
from qatkit.trials.sizes import exported_bytes
from qatkit.trials.smaller import shrink_sizes
from qatkit.trials.variants import Variant

QUIET: Mapping[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "limit_val_batches": 0, "num_sanity_val_steps": 0,
}  # fmt: skip
"""Arguments of the Trainer: the search validates by itself."""
SENSITIVITY_BATCHES = 16


class TrainedModule:
    """A module, which is exported when its file is needed; see `Trained`."""

    def __init__(self, module: LightningModule, subject: ModuleSubject, folder: Path) -> None:
        self._module, self._subject, self._folder = module.eval(), subject, folder
        self._failures: list[str] | None = None

    def model(self) -> nn.Module:
        """See `Trained`."""
        return self._module

    def file(self) -> Path:
        """See `Trained`."""
        subject, path = self._subject, self._subject.format.path(self._folder)
        if self._failures is None:
            first = list(islice(subject.batches("test"), 1))
            made = export_model(
                self._exported(), subject.format.name, path, first, tokenizer=getattr(subject.data, "tokenizer", None),
                target=subject.target, task=subject.task,
            )  # fmt: skip
            self._failures = list(made.failures)
        return path

    def failures(self) -> list[str]:
        """See `Trained`."""
        path, subject = self.file(), self._subject
        checked = verify(self._exported(), path, subject.batches("test"), subject.format.name, task=subject.task)
        return list(dict.fromkeys([*(self._failures or []), *checked.failures]))

    def _exported(self) -> nn.Module:
        return self._module.get_submodule(self._subject.model)


class ModuleSubject:
    """A trained LightningModule; see `Subject`. It is not changed.

    Args:
        module: The module. ``module(inputs)`` returns logits, and its optimizer has a learning rate for fine-tuning.
        data: Its data, with training, validation and test splits.
        runtime: An export format, or a runtime in `qatkit.quantization.TARGETS`.
        folder: Where files are written.
        steps: Optimizer steps of a full training; None is one pass over the training data.
        distill: Whether the module is the teacher of all trainings.
        student: The submodule that `training_step` calls, if it is not the module itself.
        model: The submodule that is exported; "" is the module itself.
        include: Globs over the names of layers whose formats are searched.
        exclude: Globs over the names of layers that are not quantized.
        trainer: Further arguments of the Trainer.
        seed: Seed of every training.

    Raises:
        QatkitError: the runtime is unknown, or does not run in this environment.
    """

    def __init__(
        self, module: LightningModule, data: LightningDataModule, runtime: str, folder: Path, steps: int | None,
        distill: bool, student: str | None, model: str, include: Sequence[str], exclude: Sequence[str],
        trainer: Mapping[str, Any], seed: int,
    ) -> None:  # fmt: skip
        self.module, self.data, self.folder, self.model, self.seed = module, data, folder, model, seed
        self.distill, self.student, self.trainer = distill, student, dict(trainer)
        self.include, self.exclude, self.runtime = list(include), list(exclude), runtime
        self.target = runtime if runtime in TARGETS else None
        self.format: ExportFormat = FORMATS.row(TARGETS[runtime].formats[0] if self.target else runtime, "runtime")
        if self.format.environment:
            raise QatkitError(
                f"a search measures files in their runtime, but {self.format.runtime} does not run in this environment",
                key="runtime", advice="use one that does, such as onnx or compressed_tensors",
            )  # fmt: skip
        data.prepare_data()
        for split in ("fit", "test"):
            data.setup(split)
        self.steps = steps if steps is not None else len(data.train_dataloader())
        self._count = 0

    @property
    def task(self) -> Task | None:
        """See `Subject`."""
        return declared_task(self.data)

    def batches(self, split: Literal["validation", "test"]) -> Any:
        """See `Subject`."""
        return split_batches(self.data, split)

    def prepare(self, variants: Sequence[Variant]) -> None:
        """Check that the dense module can be exported and that it can be shrunk and pruned."""
        self.format.check_packages()
        self.format.check_model(self.module.get_submodule(self.model), task=self.task)
        for variant in variants[1:]:
            self.plain(variant)

    def plain(self, variant: Variant) -> LightningModule:
        """See `Subject`."""
        module = self._smaller(variant)
        fold_batchnorm(module)
        if variant.nm is not None or variant.sparsity is not None:
            for layer in prunable_layers(module, self.include, self.exclude).values():
                weight: Any = layer.weight
                mask = nm_mask(weight, *variant.nm) if variant.nm else magnitude_mask(weight, variant.sparsity or 0.0)
                apply_mask(weight, mask)
        return module.eval()

    def loss(self) -> Callable[[nn.Module], float]:
        """See `Subject`."""
        return batch_loss(first_batches(self.data.train_dataloader(), SENSITIVITY_BATCHES), self.task)

    def select(self) -> dict[str, Sequence[str]]:
        """See `Subject`."""
        return {"include": self.include, "exclude": self.exclude}

    def size(self, model: nn.Module, layers: Mapping[str, Scheme]) -> int:
        """See `Subject`."""
        first, tokenizer = next(iter(self.batches("test"))), getattr(self.data, "tokenizer", None)
        context = ExportContext(first, self.task, TARGETS[self.runtime] if self.target else None, tokenizer)
        return exported_bytes(
            model, layers, self.select(), self.format, context, lambda own: own.get_submodule(self.model)
        )

    def _smaller(self, variant: Variant) -> LightningModule:
        """A copy, in which the exported model is shrunk."""
        module = self._copy()
        whole = module.get_submodule(self.model)
        if not (sizes := shrink_sizes(variant, whole)):
            return module
        if not self.model:
            raise QatkitError(
                "the module itself cannot be shrunk, only a submodule of it", key="depth" if variant.depth else "width",
                advice='pass the name of the submodule that is exported, such as model="model"',
            )  # fmt: skip
        config = ShrinkConfig(**sizes)
        batches = list(first_batches(self.data.train_dataloader(), config.calibration_batches))
        smaller = shrink.apply(config, whole, batches, call, partial(mean_loss, declared=self.task))
        parent, _, name = self.model.rpartition(".")
        setattr(module.get_submodule(parent), name, smaller)
        return module

    def train(self, variant: Variant, rung: Rung, share: float) -> TrainedModule:
        """See `Subject`."""
        module = self._smaller(variant)
        callbacks: list[Callback] = []
        if variant.nm is not None or variant.sparsity is not None:
            callbacks.append(
                MagnitudePruning(variant.sparsity, nm=variant.nm, include=self.include, exclude=self.exclude)
            )
        callbacks.append(
            QuantizationAwareTraining(
                include=self.include, exclude=self.exclude, layers=rung.layers, target=self.runtime
            )
        )
        if self.distill and share:
            teacher: nn.Module = self._copy()
            callbacks.append(KnowledgeDistillation(teacher.get_submodule(self.student or ""), student=self.student))
        with isolate_rng(), _without_tips():
            torch.manual_seed(self.seed)
            steps = max(1, round(share * self.steps)) if share else 0
            trainer = Trainer(**{"devices": 1, **QUIET, **self.trainer, "max_steps": steps, "callbacks": callbacks})
            trainer.fit(module, datamodule=self.data)
        return self._trained(module)

    def dense(self) -> TrainedModule:
        """See `Subject`."""
        if not hasattr(self, "_dense"):
            self._dense = self._trained(self._copy(), "dense")
        return self._dense

    def _trained(self, module: LightningModule, name: str = "") -> TrainedModule:
        module._trainer = None  # it holds the optimizer
        self._count += 1
        return TrainedModule(module, self, self.folder / (name or str(self._count)))

    def _copy(self) -> LightningModule:
        """A copy without the trainer of the module."""
        held = [each for each in (self.module._trainer, self.module._fabric) if each is not None]
        return copy.deepcopy(self.module, {id(each): None for each in held})


@contextmanager
def _without_tips() -> Iterator[None]:
    """Let Lightning only warn: a search builds many Trainers, and each one describes the machine."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
