"""The optimizers of a stage, torch's AdamW and those of bitsandbytes, and what each holds for a weight.

8 bits are for the moments of large weights. Learned scales and offsets stay in 32 bits whatever their number: an error
of their step moves every weight of their group. So do embeddings, most of whose rows have no gradient in a step, as in
transformers; and tensors of fewer than 4096 numbers, which bitsandbytes leaves in 32 bits itself.
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
"""Names in `bitsandbytes.optim`."""
SMALL, PAGED_FROM, BLOCK = 4096, 100_000, 256
"""Numbers of a tensor from which bitsandbytes takes 8 bits and pages, and those that have one scale."""


def learned_scales(model: nn.Module) -> set[int]:
    """The ids of the scales that fake quantizers learn, and of offsets with LSQ+."""
    quantizers = (module for module in model.modules() if isinstance(module, FakeQuantize))
    return {id(learned) for module in quantizers for learned in module.parameters(recurse=False)}


def build_optimizer(name: OptimizerName, model: nn.Module, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer over parameter groups.

    Args:
        name: "adamw" is torch's; the others are those of bitsandbytes.
        model: Whose parameters they are; tells which of them stay in 32 bits.
        groups: With "lr" and "weight_decay".

    Raises:
        QatkitError: the device of the parameters cannot run it.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    check_optimizer(name, parameters[0].device)
    from bitsandbytes import optim

    manager: Any = optim.GlobalOptimManager.get_instance()
    whole = whole_moments(model)
    for parameter in parameters:
        if id(parameter) in whole:
            manager.override_config(parameter, "optim_bits", 32)
            # it knows parameters by their id, which a later one may have
            weakref.finalize(parameter, manager.pid2config.pop, id(parameter), None)
    found: torch.optim.Optimizer = getattr(optim, CLASSES[name])(groups)
    return found


def whole_moments(model: nn.Module) -> set[int]:
    """The ids of the parameters whose moments stay in 32 bits whatever their size."""
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return learned_scales(model) | {id(module.weight) for module in embeddings}


def check_optimizer(name: OptimizerName, device: torch.device) -> None:
    """Raise unless an optimizer runs on a device, by a step of it.

    Raises:
        QatkitError: bitsandbytes lacks what the device needs, or the device has no pages.
    """
    if name == "adamw":
        return
    if name.startswith("paged") and device.type not in ("cuda", "xpu"):
        unpaged = name.removeprefix("paged_")
        raise QatkitError(
            f"optimizer: '{name}' moves moments between a GPU and the machine's memory, and this stage trains on "
            f"{device.type}; write {unpaged}, or train on a CUDA device"
        )
    try:
        from bitsandbytes import optim

        parameter = nn.Parameter(torch.ones(64, SMALL // 64, device=device))
        parameter.grad = torch.ones_like(parameter)
        getattr(optim, CLASSES[name])([parameter]).step()
        parameter.sum().item()  # waits for the device
    except Exception as error:  # a missing library, kernel or device each raise something else
        said = " ".join(str(error).split())[:200]
        raise QatkitError(
            f"optimizer: bitsandbytes cannot run '{name}' on {device.type} ({type(error).__name__}: {said}); write "
            "adamw, or train on a CUDA device"
        ) from error


@dataclass(frozen=True)
class MomentMemory:
    """Bytes that an optimizer takes."""

    held: int
    """Two moments for every trained number, on the device for as long as it trains."""
    paged: int
    """Those of them that may be in the machine's memory instead."""
    update: int
    """What one step of it makes besides, and lets go."""


def moment_memory(name: OptimizerName, model: nn.Module, device: str = "cpu") -> MomentMemory:
    """What an optimizer takes for the trained parameters of a model.

    Args:
        name: Which.
        model: As it is trained; may be on the meta device.
        device: The type of the device that it trains on: bitsandbytes' own kernels make no copies.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Linear(1024, 1024, bias=False)
        >>> moment_memory("adamw", model).held, moment_memory("adamw8bit", model).held
        (8388608, 2129920)
    """
    whole = whole_moments(model)
    held = paged = update = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if name == "adamw":
            size = 2 * parameter.numel() * parameter.element_size()
            made = size  # Adam's denominator, one weight at a time
        else:
            few = name.endswith("8bit") and id(parameter) not in whole and parameter.numel() >= SMALL
            size = _moments_8bit(parameter) if few else 8 * parameter.numel()
            # on the CPU it is torch that adds and divides, with moments of 8 bits made floats first
            made = (20 if few else 12) * parameter.numel() if device == "cpu" else 0
        held += size
        if name.startswith("paged") and parameter.numel() >= PAGED_FROM:
            paged += size
            made = size  # on the device while its weight is updated
        update = max(update, made)
    return MomentMemory(held, paged, update)


def _moments_8bit(parameter: Tensor) -> int:
    return 2 * (parameter.numel() + 4 * -(-parameter.numel() // BLOCK))
