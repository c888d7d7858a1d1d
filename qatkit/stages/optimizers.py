"""The optimizers of a stage, which come from torch and bitsandbytes, and their memory use.

Only the moments of large weights are stored in 8 bits. The moments of learned scales and offsets keep 32 bits
regardless of their size, because an error in their update affects every weight of their group. The moments of
embeddings, where most rows have no gradient in a step, keep 32 bits as in transformers. bitsandbytes itself keeps 32
bits for tensors with fewer than 4096 elements.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.quantization.modules import FakeQuantize

OptimizerName = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
CLASSES = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}
"""Class names in `bitsandbytes.optim`."""
SMALL, PAGED_FROM, BLOCK = 4096, 100_000, 256
"""Constants of bitsandbytes: minimum number of elements for 8-bit moments and for paging, and elements per scale."""


def learned_scales(model: nn.Module) -> set[int]:
    """Return the IDs of learned quantizer scales and, with LSQ+, learned offsets."""
    quantizers = (module for module in model.modules() if isinstance(module, FakeQuantize))
    return {id(learned) for module in quantizers for learned in module.parameters(recurse=False)}


def build_optimizer(name: OptimizerName, model: nn.Module, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build an optimizer for parameter groups.

    Args:
        name: "adamw" for torch's AdamW; other names are optimizers of bitsandbytes.
        model: The model with the parameters, which determines the moments with 32 bits.
        groups: Parameter groups with "lr" and "weight_decay".

    Raises:
        QatkitError: the optimizer does not support the parameters' device.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    check_optimizer(name, parameters[0].device)
    from bitsandbytes import optim

    manager: Any = optim.GlobalOptimManager.get_instance()
    full = full_moments(model)
    for parameter in parameters:
        if id(parameter) in full:
            manager.override_config(parameter, "optim_bits", 32)
            # it knows parameters by id, and a later one may have the same
            weakref.finalize(parameter, manager.pid2config.pop, id(parameter), None)
    optimizer: torch.optim.Optimizer = getattr(optim, CLASSES[name])(groups)
    return optimizer


def full_moments(model: nn.Module) -> set[int]:
    """Return the IDs of parameters whose moments are kept in 32 bits regardless of size."""
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return learned_scales(model) | {id(module.weight) for module in embeddings}


def check_optimizer(name: OptimizerName, device: torch.device) -> None:
    """Check that an optimizer supports a device, by taking one step.

    Raises:
        QatkitError: bitsandbytes does not support the device, or the device has no paged memory.
    """
    if name == "adamw":
        return
    if name.startswith("paged") and device.type not in ("cuda", "xpu"):
        unpaged = name.removeprefix("paged_")
        raise QatkitError(
            f"'{name}' moves optimizer state between GPU and CPU memory, but this stage trains on {device.type}",
            key="optimizer",
            advice=f"use {unpaged}, or train on a CUDA device",
        )
    try:
        from bitsandbytes import optim

        parameter = nn.Parameter(torch.ones(64, SMALL // 64, device=device))
        parameter.grad = torch.ones_like(parameter)
        getattr(optim, CLASSES[name])([parameter]).step()
        parameter.sum().item()  # waits for the device
    except Exception as error:  # a missing library, kernel and device raise different errors
        reason = " ".join(str(error).split())[:200]
        raise QatkitError(
            f"bitsandbytes cannot run '{name}' on {device.type} ({type(error).__name__}: {reason})",
            key="optimizer",
            advice="use adamw, or train on a CUDA device",
        ) from error


@dataclass(frozen=True)
class MomentMemory:
    """Bytes that an optimizer needs."""

    held: int
    """Two moments per trained weight, stored on the device throughout training."""
    paged: int
    """The part of `held` that may be paged to CPU memory."""
    update: int
    """Temporary memory of one step."""


def moment_memory(name: OptimizerName, model: nn.Module, device: str = "cpu") -> MomentMemory:
    """Predict an optimizer's memory use for a model's trained parameters.

    Args:
        name: The optimizer.
        model: The model to train, already prepared; it may be on the meta device.
        device: The type of the training device; on GPUs, bitsandbytes kernels do not make copies.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Linear(1024, 1024, bias=False)
        >>> moment_memory("adamw", model).held, moment_memory("adamw8bit", model).held
        (8388608, 2129920)
    """
    full = full_moments(model)
    held = paged = update = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if name == "adamw":
            size = 2 * parameter.numel() * parameter.element_size()
            made = size  # Adam's denominator, one weight at a time
        else:
            few = name.endswith("8bit") and id(parameter) not in full and parameter.numel() >= SMALL
            size = _moments_8bit(parameter) if few else 8 * parameter.numel()
            # on the CPU torch does the arithmetic, on 8-bit moments converted to float first
            made = (20 if few else 12) * parameter.numel() if device == "cpu" else 0
        held += size
        if name.startswith("paged") and parameter.numel() >= PAGED_FROM:
            paged += size
            made = size  # on the device during the update
        update = max(update, made)
    return MomentMemory(held, paged, update)


def _moments_8bit(parameter: Tensor) -> int:
    return 2 * (parameter.numel() + 4 * -(-parameter.numel() // BLOCK))
