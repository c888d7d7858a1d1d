"""Linear layers that compute with ``W + scaling * B A`` as one weight.

peft adds ``B A x`` to the output of a layer. Where the weight is rounded that is another model than the merged one:
``round(W) + B A`` is on no grid; and where it is sparse, ``B A`` fills the zeros. Here the update is added to the
weight before either, in the arithmetic that the merge uses, so merging changes nothing.
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
    """What these layers share: the factors beside the frozen weight."""

    weight: Tensor
    bias: Tensor | None
    lora_A: nn.Parameter
    """``[rank, in]``."""
    lora_B: nn.Parameter
    """``[out, rank]``, zero at the start."""
    lora_alpha: float
    held: bool
    """Whether the zeros of the weight stay zeros."""

    @property
    def scaling(self) -> float:
        """What ``B A`` is multiplied with."""
        return self.lora_alpha / self.lora_A.shape[0]

    @property
    def matrix(self) -> Tensor:
        """``W + scaling * B A`` in the dtype of W, ``[out, in]``; zero where W is, if its zeros are held."""
        if hasattr(self.weight, "device_mesh"):  # between steps of FSDP2
            return self.merged_weight()
        factors = (self.weight, self.lora_A, self.lora_B)
        merged: Tensor = _Merged.apply(*factors, self.scaling, self.held)  # type: ignore[no-untyped-call]
        return merged

    @torch.no_grad()
    def set_matrix(self, values: Tensor) -> None:
        """Overwrite W before training, while the update is still zero."""
        if self.lora_B.any():
            raise QatkitError("init: an adapter that is trained cannot be moved to another weight; merge it before")
        self.weight.copy_(values)

    @torch.no_grad()
    def merged_weight(self, device: torch.device | None = None) -> Tensor:
        """The whole merged weight, gathered where it is sharded.

        Args:
            device: Where to compute; the sums of matrix products depend on it in the last bit.
        """
        weight, a, b = (full_tensor(part).to(device) for part in (self.weight, self.lora_A, self.lora_B))
        return _merge(weight, a, b, self.scaling, self.held)


class AdaptedLinear(AdaptedWeight, nn.Linear):
    """`nn.Linear` over ``W + scaling * B A``."""

    bias: Tensor | None  # type: ignore[assignment]  # torch says it is always there

    def forward(self, input: Tensor) -> Tensor:
        return _recomputed(self._linear, input)

    def _linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


class AdaptedQATLinear(AdaptedWeight, QATLinear):
    """`QATLinear` over a fake-quantized ``W + scaling * B A``: `QATLayer` takes its weight from `matrix`."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        x, input_scale = self._quantized_input(input)
        return _recomputed(self._linear, x, input_scale)

    def _linear(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        weight, scale = self._weight_and_scale()
        return F.linear(x, weight, self._rounded_bias(scale, input_scale))


def adapt(layer: nn.Module, rank: int, alpha: float, held: bool = False) -> None:
    """Make one linear layer compute with ``W + scaling * B A``, in place; B is zero, so nothing changes yet.

    Args:
        layer: An `nn.Linear` or a `QATLinear`, of exactly that type.
        rank: Rows of A and columns of B.
        alpha: ``scaling`` is ``alpha / rank``.
        held: Keep the zeros of the weight.
    """
    swapped = SWAPS[type(layer)]
    layer.__class__ = swapped
    assert isinstance(layer, AdaptedWeight)
    weight = layer.weight
    # factors of 16 bits would lose steps of a usual learning rate
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    layer.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device, dtype=dtype))
    layer.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device, dtype=dtype))
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))  # as peft starts
    layer.lora_alpha, layer.held = alpha, held


@torch.no_grad()
def merge_layer(layer: AdaptedWeight, device: torch.device | None = None) -> None:
    """Put the merged weight in the place of W and take the factors away, in place; `device` is where to compute."""
    layer.weight.copy_(layer.merged_weight(device))
    del layer.lora_A, layer.lora_B, layer.lora_alpha, layer.held
    layer.__class__ = next(plain for plain, adapted in SWAPS.items() if adapted is type(layer))  # type: ignore[assignment]


SWAPS: dict[type[nn.Module], type[AdaptedWeight]] = {nn.Linear: AdaptedLinear, QATLinear: AdaptedQATLinear}


def _merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float, held: bool) -> Tensor:
    """The one arithmetic of training and merging, in float32 unless the weight is wider, whatever autocast says."""
    with torch.autocast(weight.device.type, enabled=False):
        merged = in_dtype(torch.addmm(weight.to(a.dtype), b, a, alpha=scaling), weight.dtype)
    return torch.where(weight != 0, merged, weight) if held else merged


class _Merged(torch.autograd.Function):
    """`_merge`, which keeps nothing but the parameters for its backward pass."""

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
    """Run the part of a forward pass that makes the weight, keeping only its inputs for the backward pass.

    Kept, every merged and every rounded weight would stay until its backward pass: more memory than full fine-tuning
    takes. Computed again it is there for one layer at a time; torch stops computing when it has what the backward pass
    needs, which is before the matrix product.
    """
    if not torch.is_grad_enabled():
        result: Tensor = compute(*inputs)
        return result
    found: Tensor = checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)
    return found
