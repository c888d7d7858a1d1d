"""The module that rounds a tensor to its grid, and holds the scale where one is kept."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from qatkit.quantization.arithmetic import fake_quantize, round_scale, round_zero_point, tensor_scale_of, value_range
from qatkit.quantization.observers import computed_qparams, mse_qparams
from qatkit.quantization.ranges import RangeObserver
from qatkit.spec import QuantSpec

Role = Literal["weight", "activation"]


class FakeQuantize(nn.Module):
    """Rounds a tensor to its grid in the forward pass and passes gradients straight through.

    Where the scale comes from follows the spec: computed from the tensor on every call (min-max weights, activations
    per token or group), frozen in a buffer (MSE weights, calibrated activations), or a learned Parameter (LSQ; with
    LSQ+ also the offset, in the units of the tensor). What is learned is made in its final shape here, so that DDP,
    FSDP2 and optimizers see it from the start.

    Args:
        spec: The quantization.
        role: "weight" or "activation".
        shape: Shape of the stored scale: ``[1]``, ``[out, 1]``, ``[out, groups]`` or ``[row blocks, column blocks]``.
        device: Where the scale lives.
    """

    scale: Tensor | None
    offset: Tensor | None
    zero_point: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, spec: QuantSpec, role: Role, shape: tuple[int, ...], device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.role = role
        self.ran = False  # set by the first forward; a quantizer that stays False has never quantized anything
        self.observer: RangeObserver | None = None
        self.dynamic = role == "activation" and spec.strategy in ("token", "group")
        self.computed = self.dynamic or (role == "weight" and spec.observer in ("minmax", "absmean"))
        self.shared = False  # by layers of one module that get the same input
        self._inside = False  # while that module runs: what was rounded last is kept
        self._last: tuple[Tensor, int, bool, tuple[Tensor, Tensor | None]] | None = None
        self.scale = self.offset = self.zero_point = self.tensor_scale = None
        if spec.two_level and not (self.computed and role == "weight"):
            del self.tensor_scale
            self.register_buffer("tensor_scale", torch.full((1,), torch.nan, device=device))
        self.ready = self.computed and self.tensor_scale is None
        if self.computed:
            return
        del self.scale, self.offset, self.zero_point
        initial = torch.full(shape, torch.nan, device=device)
        self.register_parameter("offset", None)
        if spec.learned:
            self.scale = nn.Parameter(initial)
        else:
            self.register_buffer("scale", initial)
        if spec.observer == "lsq_plus":
            self.offset = nn.Parameter(torch.zeros(shape, device=device))
            self.zero_point = None
        else:
            self.register_buffer("zero_point", torch.zeros(shape, device=device))

    def initialize(self, weight: Tensor) -> None:
        """Take the initial scale from a weight; nothing to do where it is computed on every call."""
        if self.computed:
            return
        if self.tensor_scale is not None:
            low, high = value_range(weight, self.spec)
            _assign(self.tensor_scale, tensor_scale_of(torch.maximum(-low, high), self.spec))
        self.set_qparams(*mse_qparams(weight, self.spec))

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor, tensor_scale: Tensor | None = None) -> None:
        """Overwrite the stored scale and zero point, sharded or not."""
        assert self.scale is not None
        _assign(self.scale, scale)
        if self.offset is not None:
            _assign(self.offset, -zero_point.to(scale.device) * scale)
        elif self.zero_point is not None:
            _assign(self.zero_point, zero_point)
        if tensor_scale is not None:
            self.set_tensor_scale(tensor_scale)
        self.ready = True

    @torch.no_grad()
    def set_tensor_scale(self, tensor_scale: Tensor) -> None:
        """Overwrite the scale over the scales, ``[1]``."""
        assert self.tensor_scale is not None
        _assign(self.tensor_scale, tensor_scale)
        self.ready = self.computed or self.ready

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that `x` is quantized with, rounded as the exported file holds them (float32)."""
        if self.computed:
            return computed_qparams(x, self.spec, self.tensor_scale)
        assert self.scale is not None
        scale: Tensor = _RoundScale.apply(self.scale, self.spec, self.tensor_scale)  # type: ignore[no-untyped-call]
        if self.offset is not None:
            return scale, _RoundZeroPoint.apply(-self.offset / scale, self.spec)  # type: ignore[no-untyped-call]
        assert self.zero_point is not None
        return scale, self.zero_point

    def whole_qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What `qparams` gives for a whole `weight`, gathered where it is sharded, without gradients."""
        with torch.no_grad():
            scale, zero_point = self.qparams(weight)
            return full_tensor(scale), full_tensor(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_scale(x)[0]

    def with_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rounded tensor and the scale it was rounded with; `x` and None while calibration watches."""
        self.ran = True
        if self.observer is not None:
            self.observer.update(x)
            return x, None
        if not self.ready:
            raise RuntimeError(
                "a static activation scale is used before calibration; call qatkit.calibrate(model, batches) first, or "
                "let QuantizationAwareTraining do it: fit before validate, test and predict, or give them ckpt_path"
            )
        # a compiler finds equal expressions itself; an inference tensor does not say whether it was changed in place
        if not self._inside or not self.dynamic or torch.compiler.is_compiling() or x.is_inference():
            return self._rounded(x)
        last, grad = self._last, torch.is_grad_enabled()
        if last is None or last[0] is not x or last[1:3] != (x._version, grad):
            self._last = last = (x, x._version, grad, self._rounded(x))
        return last[3]

    def share(self, around: nn.Module) -> None:
        """Let layers of one module share this quantizer: while the module runs, an input is rounded once."""
        if not self.shared:
            self.shared = True
            around.register_forward_pre_hook(self._enter)
            around.register_forward_hook(self._leave, always_call=True)

    def unshare(self, around: nn.Module) -> None:
        """Take the hooks of `share` away."""
        for hooks in (around._forward_pre_hooks, around._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[key]
                    around._forward_hooks_always_called.pop(key, None)

    def _enter(self, *_: object) -> None:
        self._inside = True

    def _leave(self, *_: object) -> None:
        self._inside, self._last = False, None

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.qparams(x)
        gradient_scale = self._gradient_scale(x, scale)
        return fake_quantize(x, scale, zero_point, self.spec, gradient_scale, clips=not self.computed), scale

    def _gradient_scale(self, x: Tensor, scale: Tensor) -> float:
        """LSQ, section 2.2: one over the root of (elements that share a scale, of one sample) times qmax."""
        size = x.numel() / max(scale.numel(), 1) if self.role == "weight" else x.numel() / max(x.shape[0], 1)
        return 1.0 / math.sqrt(max(size, 1) * self.spec.qmax)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        kept = self.scale if self.scale is not None else self.tensor_scale
        if kept is not None:
            self.ready = not bool(full_tensor(kept).isnan().any())

    def extra_repr(self) -> str:
        kind = {"int": "int" if self.spec.symmetric else "uint"}.get(self.spec.type, f"{self.spec.type} ")
        return f"{self.role}, {kind}{self.spec.num_bits}, {self.spec.strategy}, {self.spec.observer}"


class _RoundScale(torch.autograd.Function):
    """`round_scale` whose gradient passes through the rounding, with the sign of the absolute value."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, spec: QuantSpec, tensor_scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.signed = spec.scale_rule == "signed"
        return round_scale(scale, spec, tensor_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return grad if ctx.signed else torch.where(scale < 0, -grad, grad), None, None


class _RoundZeroPoint(torch.autograd.Function):
    """`round_zero_point` whose gradient passes through the rounding."""

    @staticmethod
    def forward(ctx: Any, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        return round_zero_point(zero_point, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (a DTensor), as a plain detached tensor."""
    gather = getattr(tensor, "full_tensor", None)
    return cast(Tensor, gather()) if gather is not None else tensor.detach()


def _assign(target: Tensor, value: Tensor) -> None:
    value = value.to(target.device, target.dtype).view(target.shape)
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        target = cast(DTensor, target)
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)
