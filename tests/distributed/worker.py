"""Train a small CNN with QAT and KD through the public callbacks on one process or two, and write the results.

Usage: worker.py single|ddp|fsdp2 OUT
"""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import qatkit.callbacks.quantization
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks import CompressionMonitor, KnowledgeDistillation, QuantizationAwareTraining
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QuantSpec, quantize
from qatkit.data import digits
from qatkit.export.onnx.format import export_onnx
from qatkit.models import cnn
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.prepare import prepare_qat, qat_layers

STEPS, BATCH, CALIBRATION = 10, 16, 4


class Classifier(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Rank r takes every second batch; one process takes them all in the same order, two per step."""
        train = digits().train
        assert isinstance(train, TensorDataset)
        world, rank = (2, self.trainer.global_rank) if self.trainer.world_size == 2 else (1, 0)
        rows = torch.arange(2 * STEPS * BATCH).view(-1, BATCH)[rank::world].flatten()
        return DataLoader(TensorDataset(*(t[rows] for t in train.tensors)), batch_size=BATCH)


def main(mode: str, out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = cnn(channels=[8, 16])
    module = Classifier(model)
    quantization = QuantizationAwareTraining(
        weight=QuantSpec(num_bits=4, observer="lsq"),
        activation=QuantSpec(symmetric=False, strategy="tensor"),
        calibration_batches=2 * CALIBRATION if mode == "single" else CALIBRATION,
    )
    reductions: list[int] = []
    all_reduce, calibrate = distributed.all_reduce, qatkit.callbacks.quantization.calibrate

    def counted_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reductions.append(len(tensor))
        return all_reduce(tensor, *args, **kwargs)

    def watched_calibrate(*args: Any, **kwargs: Any) -> list[str]:
        distributed.all_reduce = counted_all_reduce
        try:
            return calibrate(*args, **kwargs)
        finally:
            distributed.all_reduce = all_reduce

    qatkit.callbacks.quantization.calibrate = watched_calibrate
    teacher = KnowledgeDistillation(copy.deepcopy(model), temperature=2.0, alpha=0.5, student="model")
    monitor = CompressionMonitor(every=4)
    # the strategy's own defaults would make it tensor-parallel and leave every process with its own gradients
    fsdp2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    strategy = {"single": "auto", "ddp": "ddp", "fsdp2": fsdp2}[mode]
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if mode == "single" else 2,
        strategy=strategy,
        max_steps=STEPS,
        accumulate_grad_batches=2 if mode == "single" else 1,
        callbacks=[quantization, teacher, monitor],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.is_global_zero:
        codes = {}
        for name, layer in qat_layers(model):
            fake_quant = layer.weight_fake_quant
            assert fake_quant is not None
            scale, zero_point = (state[f"{name}.weight_fake_quant.{part}"] for part in ("scale", "zero_point"))
            codes[name] = quantize(state[f"{name}.weight"], scale, zero_point, fake_quant.spec)
        table = [asdict(row) for row in monitor.table]
        agreement = trainer.callback_metrics["distill/teacher_agreement"].item()
        content = {"state": state, "codes": codes, "reductions": reductions, "table": table, "agreement": agreement}
        torch.save(content, out)
        export_onnx(finished(state, quantization), torch.zeros(1, 1, 8, 8), out.with_suffix(".onnx"))


def finished(state: dict[str, Any], quantization: QuantizationAwareTraining) -> nn.Module:
    """The trained model on one process, from the state that the first rank gathered."""
    model = cnn(channels=[8, 16])
    fold_batchnorm(model)
    prepare_qat(model, quantization.weight, quantization.activation)
    model.load_state_dict(state)
    return model


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
