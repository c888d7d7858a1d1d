"""FSDP2 sharding and compilation of the model in training."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from qatkit.errors import QatkitError
from qatkit.quantization.modules import FakeQuantize


def exact_division() -> dict[str, bool] | None:
    """Compiler options for exact division on GPUs, as in torch; Triton's division can be off in the last bit.

    Otherwise, a quotient near a rounding boundary would be rounded differently in training and in the exported file.
    """
    name = "eager_numerics.division_rounding"  # from torch 2.11 on
    return {name: True} if name in torch._inductor.list_options() else None


def parallelize(model: nn.Module, mesh: Any) -> None:
    """Shard a model's parameters over the data-parallel processes with FSDP2, in place.

    The model already has its fake quantizers (callbacks add them in `setup`), so scales are sharded with the weights.
    Modules trained in a different dtype than the rest of the model, such as a classification head next to adapters,
    form their own groups.

    Raises:
        QatkitError: a fake quantizer is trained in a different dtype than the rest of the model.
    """
    from torch.distributed.fsdp import fully_shard

    dtypes = Counter(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    usual = {dtype for dtype, _ in dtypes.most_common(1)}
    for name, module in model.named_modules():
        trained = {p.dtype for p in module.parameters(recurse=False) if p.requires_grad}
        if trained <= usual:
            continue
        if any(isinstance(part, FakeQuantize) for part in module.modules()):
            trained_in = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise QatkitError(
                f"FSDP2 needs one dtype per group, but the model is trained in {trained_in}, and the dtype of the "
                f"quantized layer '{name}' differs from that of most other layers",
                key="trainer.strategy",
                advice="use strategy: ddp, or model.args.dtype: float32",
            )
        fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def share_buffers(model: nn.Module) -> None:
    """Broadcast the buffers of rank 0, such as running statistics of BatchNorm, to every process, in place.

    FSDP2 shards only parameters, so each process has its own buffers, but a checkpoint contains only those of rank 0.
    Without this, the validation loss over all processes would change after a resume.
    """
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)
