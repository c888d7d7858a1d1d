"""Linear layers whose weight is ``W + scaling * B A``.

peft adds ``B A x`` to the output of a layer. With a quantized weight, this differs from the merged model: ``quantize(W)
+ B A`` is not quantized. If the weight is sparse, ``B A`` fills in the zeros. These layers first add the update to the
weight, with the same arithmetic as merging, so merging does not change the outputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qatkit.errors import QatkitError
from qatkit.quantization.arithmetic import in_dtype
from qatkit.quantization.layers import QATLinear
from qatkit.quantization.modules import full_tensor


class AdaptedWeight(nn.Module):
    """Adds low-rank factors to a frozen weight."""

    weight: Tensor
    bias: Tensor | None
    lora_A: nn.Parameter
    """``[rank, in]``."""
    lora_B: nn.Parameter
    """``[out, rank]``, initially zero."""
    lora_alpha: float
    held: bool
    """Whether pruned weights stay zero."""

    @property
    def scaling(self) -> float:
        """The factor of ``B A``: ``alpha / rank``."""
        return self.lora_alpha / self.lora_A.shape[0]

    @property
    def matrix(self) -> Tensor:
        """Return ``W + scaling * B A`` in the dtype of W, ``[out, in]``; if `held`, it is zero where W is zero."""
        if hasattr(self.weight, "device_mesh"):  # between steps of FSDP2
            return self.merged_weight()
        factors = (self.weight, self.lora_A, self.lora_B)
        merged: Tensor = _Merged.apply(*factors, self.scaling, self.held)  # type: ignore[no-untyped-call]
        return merged

    @torch.no_grad()
    def set_matrix(self, values: Tensor) -> None:
        """Overwrite W before training, when the update is zero.

        Raises:
            QatkitError: the update is no longer zero.
        """
        if self.lora_B.any():
            raise QatkitError(
                "a trained adapter cannot be moved to another weight", key="init", advice="merge the adapter first"
            )
        self.weight.copy_(values)

    @torch.no_grad()
    def merged_weight(self, device: torch.device | None = None) -> Tensor:
        """Return the full merged weight, gathered if it is sharded.

        Args:
            device: The device on which to compute; the last bit of matrix products depends on it.
        """
        weight, a, b = (full_tensor(part).to(device) for part in (self.weight, self.lora_A, self.lora_B))
        return _merge(weight, a, b, self.scaling, self.held)


class AdaptedLinear(AdaptedWeight, nn.Linear):
    """An `nn.Linear` with the weight ``W + scaling * B A``."""

    bias: Tensor | None  # type: ignore[assignment]  # torch declares it as always present

    def forward(self, input: Tensor) -> Tensor:
        return _recomputed(self._linear, input)

    def _linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


class AdaptedQATLinear(AdaptedWeight, QATLinear):
    """A `QATLinear` that fake-quantizes ``W + scaling * B A``, which `QATLayer` reads through `matrix`."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        x, input_scale = self._quantized_input(input)
        return _recomputed(self._linear, x, input_scale)

    def _linear(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        weight, scale = self._weight_and_scale()
        return F.linear(x, weight, self._rounded_bias(scale, input_scale))


def adapt(layer: nn.Module, rank: int, alpha: float, held: bool = False) -> None:
    """Add low-rank factors to one linear layer, in place; B is zero, so outputs do not change.

    Args:
        layer: An `nn.Linear` or a `QATLinear`, not a subclass.
        rank: Rank of the update, which is the number of rows of A and columns of B.
        alpha: Numerator of ``scaling``, which is ``alpha / rank``.
        held: Keep pruned weights at zero.
    """
    swapped = SWAPS[type(layer)]
    layer.__class__ = swapped
    assert isinstance(layer, AdaptedWeight)
    weight = layer.weight
    # 16-bit factors would lose updates of usual learning rates
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    layer.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device, dtype=dtype))
    layer.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device, dtype=dtype))
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))  # as in peft
    layer.lora_alpha, layer.held = alpha, held


@torch.no_grad()
def merge_layer(layer: AdaptedWeight, device: torch.device | None = None) -> None:
    """Replace W with the merged weight, computed on `device`, and remove the factors, in place."""
    layer.weight.copy_(layer.merged_weight(device))
    del layer.lora_A, layer.lora_B, layer.lora_alpha, layer.held
    layer.__class__ = next(plain for plain, adapted in SWAPS.items() if adapted is type(layer))  # type: ignore[assignment]


SWAPS: dict[type[nn.Module], type[AdaptedWeight]] = {nn.Linear: AdaptedLinear, QATLinear: AdaptedQATLinear}


def _merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float, held: bool) -> Tensor:
    """Merge in training and in `merge_layer` alike: in float32 unless the weight is wider, regardless of autocast."""
    with torch.autocast(weight.device.type, enabled=False):
        merged = in_dtype(torch.addmm(weight.to(a.dtype), b, a, alpha=scaling), weight.dtype)
    return torch.where(weight != 0, merged, weight) if held else merged


class _Merged(torch.autograd.Function):
    """`_merge` with a backward pass that keeps only the parameters."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, a: Tensor, b: Tensor, scaling: float, held: bool) -> Tensor:
        ctx.save_for_backward(weight, a, b)
        ctx.scaling, ctx.held = scaling, held
        return _merge(weight, a, b, scaling, held)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b = ctx.saved_tensors
        with torch.autocast(weight.device.type, enabled=False):
            if ctx.held:
                grad = torch.where(weight != 0, grad, 0)
            grad = grad.to(a.dtype)
            return None, (b.t() @ grad) * ctx.scaling, (grad @ a.t()) * ctx.scaling, None, None


def _recomputed(compute: Any, *inputs: Tensor | None) -> Tensor:
    """Checkpoint the part of a forward pass that computes the weight.

    Otherwise each merged and each quantized weight would stay in memory until its backward pass, which takes more
    memory than full fine-tuning. Recomputation holds one layer's weight at a time; torch stops it as soon as it has the
    tensors that the backward pass needs, before the matrix product.
    """
    if not torch.is_grad_enabled():
        result: Tensor = compute(*inputs)
        return result
    output: Tensor = checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output
