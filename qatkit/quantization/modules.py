"""`FakeQuantize`: the module that fake-quantizes one tensor and stores its scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from qatkit.quantization.arithmetic import coded, fake_quantize
from qatkit.quantization.estimators import QParams, computed_qparams, load_estimator, mse_qparams
from qatkit.quantization.grids import DtypeGrid, IntegerGrid, grid_of
from qatkit.quantization.linear import Codes, WeightGrid
from qatkit.quantization.observers import OBSERVERS
from qatkit.quantization.ranges import RangeObserver
from qatkit.quantization.scales import round_scale, round_zero_point, tensor_scale_of
from qatkit.quantization.slices import outer_shape, value_range
from qatkit.quantization.super_blocks import steps_of
from qatkit.spec import QuantSpec

Role = Literal["weight", "activation"]


class Quantized(NamedTuple):
    """A fake-quantized tensor."""

    values: Tensor
    scale: Tensor | None = None
    """The scale in its stored shape; None during calibration."""
    codes: Codes | None = None
    """The codes of an input with a fixed scale."""


class FakeQuantize(nn.Module):
    """Fake-quantizes a tensor in the forward pass, with straight-through gradients.

    The spec determines the source of the scale: it is computed from the tensor on every call (min-max weights,
    activations per token or group), frozen in a buffer (MSE weights, calibrated activations), or a learned Parameter
    (LSQ; with LSQ+, the offset is also learned, in the units of the tensor). Learned scales have their final shape from
    the start, as required by DDP, FSDP2 and optimizers. Scales, offsets and zero points are float32, and stay float32
    when the model is converted (`.half()`, `.to(torch.bfloat16)`, Lightning's "bf16-true"). A bfloat16 scale has a
    relative error of up to 0.4%, small updates of a learned scale would be rounded away, and NVFP4 scales exceed the
    range of float16.

    Args:
        spec: The quantization.
        role: "weight" or "activation".
        shape: Shape of the stored scale: ``[1]``, ``[out, 1]``, ``[out, groups]`` or ``[row blocks, column blocks]``.
        device: Device of the scale.

    Example:
        >>> fake_quant = FakeQuantize(QuantSpec(num_bits=4), "weight", (2, 1))
        >>> fake_quant(torch.tensor([[3.5, 0.3], [7.0, -1.2]])).tolist()
        [[3.5, 0.5], [7.0, -1.0]]
    """

    scale: Tensor | None
    offset: Tensor | None
    zero_point: Tensor | None
    outer_scale: Tensor | None

    def __init__(self, spec: QuantSpec, role: Role, shape: tuple[int, ...], device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.role = role
        self.ran = False  # set by the first forward pass; stays False for a layer that never runs
        self.observer: RangeObserver | None = None
        self.dynamic = role == "activation" and spec.scaled_per_batch
        self.computed = self.dynamic or (role == "weight" and OBSERVERS[spec.observer].computed)
        self.shared = False  # True if several layers of one module read the same input through this quantizer
        self._inside = False  # True while that module runs: the last result is cached
        self._last: tuple[Tensor, int, bool, Quantized] | None = None
        self.scale = self.offset = self.zero_point = self.outer_scale = None
        if spec.two_level and not (self.computed and role == "weight"):
            del self.outer_scale
            outer = outer_shape(shape, spec)
            self.register_buffer("outer_scale", torch.full(outer, torch.nan, dtype=torch.float32, device=device))
        self.ready = self.computed and self.outer_scale is None
        grid_of(spec)  # imported here, because torch.compile cannot follow an import
        load_estimator(spec)
        if self.computed:
            return
        del self.scale, self.offset, self.zero_point
        initial = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self.register_parameter("offset", None)
        if spec.learned:
            self.scale = nn.Parameter(initial)
        else:
            self.register_buffer("scale", initial)
        if OBSERVERS[spec.observer].learned_offset:
            self.offset = nn.Parameter(torch.zeros_like(initial))
            self.zero_point = None
        else:
            self.register_buffer("zero_point", torch.zeros_like(initial))

    def initialize(self, weight: Tensor, estimate: Callable[[Tensor, QuantSpec], QParams] = mse_qparams) -> None:
        """Set the initial scale from a weight, unless the scale is computed on every call."""
        if self.computed:
            return
        if self.outer_scale is not None and not self.spec.super_blocks:
            low, high = value_range(weight, self.spec)
            _assign(self.outer_scale, tensor_scale_of(torch.maximum(-low, high), self.spec))
        self.set_qparams(*estimate(weight, self.spec))

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor, outer_scale: Tensor | None = None) -> None:
        """Overwrite the stored scale and zero point, sharded or not.

        The steps of super-blocks are by default those of which the scales are multiples.
        """
        assert self.scale is not None
        if self.spec.super_blocks and outer_scale is None:  # may raise an error: before anything is changed
            outer_scale = steps_of(scale.float(), zero_point.float(), self.spec)
        _assign(self.scale, scale)
        if self.offset is not None:
            _assign(self.offset, -zero_point.to(scale.device) * (1 if self.spec.has_minimum else scale))
        elif self.zero_point is not None:
            _assign(self.zero_point, zero_point)
        if outer_scale is not None:
            self.set_outer_scale(outer_scale)
        self.ready = True

    @torch.no_grad()
    def set_outer_scale(self, outer_scale: Tensor) -> None:
        """Overwrite the outer scale of two-level scales; see `outer_shape`."""
        assert self.outer_scale is not None
        _assign(self.outer_scale, outer_scale)
        self.ready = self.computed or self.ready

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the float32 scale and zero point for `x`, rounded as in the exported file."""
        if self.computed:
            return computed_qparams(x, self.spec, self.outer_scale)
        assert self.scale is not None
        return self._rounded(self.scale, self.offset, self.zero_point)

    def _rounded(self, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Round the stored numbers as in the exported file."""
        scale = _RoundScale.apply(scale, self.spec, self.outer_scale)  # type: ignore[no-untyped-call]
        if offset is not None:
            exact = -offset if self.spec.has_minimum else -offset / scale
            return scale, _RoundZeroPoint.apply(exact, self.spec, self.outer_scale)  # type: ignore[no-untyped-call]
        assert zero_point is not None
        return scale, zero_point

    def whole_qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return `qparams` for an unsharded `weight`, gathered and without gradients."""
        with torch.no_grad():
            if self.computed:
                scale, zero_point = self.qparams(weight)
                return full_tensor(scale), full_tensor(zero_point)
            assert self.scale is not None
            # gathered before they are rounded, because outer scales are never sharded
            offset = None if self.offset is None else full_tensor(self.offset)
            stored = None if self.zero_point is None else full_tensor(self.zero_point)
            return self._rounded(full_tensor(self.scale), offset, stored)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_scale(x)[0]

    def with_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the fake-quantized tensor and its scale; during calibration, `x` itself and None."""
        found = self.quantized(x)
        return found.values, found.scale

    def quantized(self, x: Tensor, codes: bool = False) -> Quantized:
        """Return the fake-quantized tensor and its scale, with the codes if they are asked for and possible."""
        self.ran = True
        if self.observer is not None:
            self.observer.update(x)
            return Quantized(x)
        if not self.ready:
            raise RuntimeError(
                "a static activation scale was used before calibration; call qatkit.calibrate(model, batches) first, "
                "or "
                "use QuantizationAwareTraining and call fit before validate, test and predict, or pass ckpt_path"
            )
        # a compiler merges equal expressions itself; inference tensors do not record in-place changes
        if not self._inside or not self.dynamic or torch.compiler.is_compiling() or x.is_inference():
            return self._fake_quantized(x, codes)
        last, grad = self._last, torch.is_grad_enabled()
        if last is None or last[0] is not x or last[1:3] != (x._version, grad):
            self._last = last = (x, x._version, grad, self._fake_quantized(x, codes))
        return last[3]

    def grid(self, weight: Tensor) -> WeightGrid:
        """Return how a weight is fake-quantized, for `quantized_linear`."""
        self.ran = True
        scale, zero_point = self.qparams(weight)
        return WeightGrid(scale, zero_point, self.spec, self._gradient_scale(weight, scale), clips=not self.computed)

    def share(self, around: nn.Module) -> None:
        """Share this quantizer among the layers inside `around`, so that a common input is quantized once."""
        if not self.shared:
            self.shared = True
            around.register_forward_pre_hook(self._enter)
            around.register_forward_hook(self._leave, always_call=True)

    def unshare(self, around: nn.Module) -> None:
        """Remove the hooks of `share`."""
        for hooks in (around._forward_pre_hooks, around._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[key]
                    around._forward_hooks_always_called.pop(key, None)

    def _enter(self, *_: object) -> None:
        self._inside = True

    def _leave(self, *_: object) -> None:
        self._inside, self._last = False, None

    def _fake_quantized(self, x: Tensor, with_codes: bool) -> Quantized:
        scale, zero_point = self.qparams(x)
        fixed = not scale.requires_grad and not zero_point.requires_grad
        if with_codes and fixed and isinstance(grid_of(self.spec), IntegerGrid | DtypeGrid):
            values, codes = coded(x, scale, zero_point, self.spec, clips=not self.computed)
            return Quantized(values, scale, Codes(codes, scale, zero_point, self.spec))
        gradient_scale = self._gradient_scale(x, scale)
        return Quantized(fake_quantize(x, scale, zero_point, self.spec, gradient_scale, clips=not self.computed), scale)

    def _gradient_scale(self, x: Tensor, scale: Tensor) -> float:
        """Compute LSQ's ``1 / sqrt(N * qmax)`` (section 2.2).

        N is the number of values per scale; for activations, of one sample.
        """
        size = x.numel() / max(scale.numel(), 1) if self.role == "weight" else x.numel() / max(x.shape[0], 1)
        return 1.0 / math.sqrt(max(size, 1) * self.spec.qmax)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        """Move the tensors between devices, but keep their dtype."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("scale", "offset", "zero_point", "outer_scale"):
            if (value := state_dict.get(prefix + name)) is not None:
                state_dict[prefix + name] = value.float()  # with assign=True it replaces the float32 tensor
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        kept = self.scale if self.scale is not None else self.outer_scale
        if kept is not None:
            self.ready = not bool(full_tensor(kept).isnan().any())

    def extra_repr(self) -> str:
        kind = {"int": "int" if self.spec.symmetric else "uint"}.get(self.spec.type, f"{self.spec.type} ")
        return f"{self.role}, {kind}{self.spec.num_bits}, {self.spec.strategy}, {self.spec.observer}"


class _RoundScale(torch.autograd.Function):
    """`round_scale` with a straight-through gradient, times the sign of the scale."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, spec: QuantSpec, outer_scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.signed = spec.scale_rule == "signed" or spec.super_blocks
        return round_scale(scale, spec, outer_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return grad if ctx.signed else torch.where(scale < 0, -grad, grad), None, None


class _RoundZeroPoint(torch.autograd.Function):
    """`round_zero_point` with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, zero_point: Tensor, spec: QuantSpec, outer_scale: Tensor | None) -> Tensor:
        return round_zero_point(zero_point, spec, outer_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded (a DTensor) into a plain detached tensor."""
    gather = getattr(tensor, "full_tensor", None)
    return cast(Tensor, gather()) if gather is not None else tensor.detach()


def _assign(target: Tensor, value: Tensor) -> None:
    value = value.to(target.device, target.dtype).view(target.shape)
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        target = cast(DTensor, target)
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)
