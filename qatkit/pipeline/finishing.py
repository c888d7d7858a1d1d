"""The end of a stage: load the trained weights into a plain model, measure it and save it."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch import nn

from qatkit.advise.cost import macs, parameters
from qatkit.callbacks.non_finite import non_finite
from qatkit.errors import QatkitError
from qatkit.pipeline.training import Trained, refuse_non_finite
from qatkit.quantization.folding import replay_folds
from qatkit.quantization.measure import layer_table
from qatkit.quantization.placement.points import place
from qatkit.quantization.prepare import prepare_qat
from qatkit.run.checkpoint import delete_checkpoints
from qatkit.run.record import StageRecord
from qatkit.run.stage_files import count_zeros, save_stage
from qatkit.stages import lora
from qatkit.tasks import call, declared_task, evaluate, one_sample


def finished_model(model: nn.Module, trained: Trained, folder: Path, original: bool) -> nn.Module:
    """Load trained weights and scales into a new, unsharded copy of the stage's input model on the CPU.

    Adapters are saved in the stage's folder and merged.

    Args:
        model: The copy.
        trained: The result of training.
        folder: The stage's folder.
        original: Whether the copy has the original weights of the model that its config names.
    """
    replay_folds(model, trained.folds)
    if trained.quantize is not None:
        prepare_qat(model, **trained.quantize.arguments)
        place(model, trained.placement)
    if trained.lora is not None:
        lora.attach_to(model, trained.lora, trained.held)
    model.load_state_dict(trained.weights, strict=True)
    if trained.lora is not None:
        moved = bool(trained.folds) or (trained.quantize is not None and trained.quantize.moves_weights)
        lora.finish(model, moved, original, folder, trained.trainer.strategy.root_device)
    return model.eval()


def save_result(folder: Path, model: nn.Module, record: StageRecord, data: LightningDataModule) -> None:
    """Measure a finished stage on validation and test data, save it, and delete its checkpoints.

    Raises:
        QatkitError: a weight is non-finite, or the test data has no batches; the stage stays unfinished.
    """
    if (place := non_finite(model)) is not None:
        shutil.rmtree(folder / "adapter", ignore_errors=True)  # was merged into the model
        refuse_non_finite(record.name, place)
    data.prepare_data()
    task = declared_task(data)
    metrics: dict[str, float] = {}
    data.setup("fit")  # where most data modules create their validation set
    metrics |= {
        f"val/{name}": value for name, value in evaluate(model, data.val_dataloader(), task, "validation").items()
    }
    data.setup("test")
    metrics |= {f"test/{name}": value for name, value in evaluate(model, data.test_dataloader(), task, "test").items()}
    batch = next(iter(data.test_dataloader()), None)
    if batch is None:
        raise QatkitError(
            f"the test data has no batches, so stage '{record.name}' cannot be measured",
            key="data",
            advice="hold out test data, then run the same command again",
        )
    sample = one_sample(batch)
    cost = {"parameters": parameters(model), "macs": macs(lambda: call(model, sample))}
    layers = [asdict(row) for row in layer_table(model)]
    zeros = count_zeros(model, record.zeros)
    save_stage(folder, model, dataclasses.replace(record, zeros=zeros, metrics=metrics, cost=cost, layers=layers))
    delete_training_files(folder)


def delete_training_files(folder: Path) -> None:
    """Delete the files that only an unfinished stage needs: its checkpoints and the record of its start."""
    delete_checkpoints(folder)
    (folder / "started.json").unlink(missing_ok=True)
