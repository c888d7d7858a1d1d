"""Predict memory use for a training step by running it on fake tensors, which have shapes but no values.

It runs the actual training step: the model's own code, the fake quantizers, the loss and the teacher. Fake tensors
allocate no memory; instead, each allocation and release that real tensors would make is recorded.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qatkit.quantization.modules import FakeQuantize
from qatkit.stages.optimizers import MomentMemory, moment_memory

Step = Callable[[nn.Module, nn.Module | None], Tensor]


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device while one process trains on it."""

    parameters: int
    """Parameters of the model, as a count, not bytes."""
    trained: int
    """Trained parameters, as a count."""
    weights: int
    """Parameters and buffers of the model."""
    teacher: int
    """Parameters and buffers of the teacher."""
    gradients: int
    optimizer: int
    """Optimizer state, including paged state, which `total` excludes."""
    activations: int | None
    """Peak of all other memory in a step: saved activations and temporary tensors. None if unknown."""
    total: int
    """Peak of all parts together; less than their sum if the parts do not peak at the same time."""

    def on_each(self, devices: int, strategy: str, fused: bool = False) -> int:
        """Return the peak bytes per device when multiple devices train.

        ddp keeps a copy of the gradients in its buckets. fsdp2 shards weights, gradients and optimizer state, and
        gathers all weights and their gradients in a step, because the model is one group. Weights are copied out of the
        all-gather buffer, which is held until the forward pass ends, and gradients are copied into a reduce-scatter
        buffer.

        Args:
            devices: The number of devices.
            strategy: ddp or fsdp2.
            fused: Whether the loss is computed inside the model's forward pass, as with a fused distillation loss.
        """
        if devices == 1:
            return self.total
        if strategy == "fsdp2":
            sharded = (self.weights + self.gradients + self.optimizer) // devices
            during = self.total - self.optimizer + (self.weights if fused else 0)
            return sharded + max(during, self.teacher + self.weights + max(self.weights, 2 * self.gradients))
        return self.total + self.gradients


def step_memory(
    model: nn.Module,
    step: Step,
    teacher: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    accumulates: bool = False,
    bits: Mapping[str, float] | None = None,
    teacher_bits: Mapping[str, float] | None = None,
    moments: MomentMemory | None = None,
) -> StepMemory:
    """Predict the peak memory of one training step.

    As in Lightning, gradients of the previous step are held until the backward pass begins.

    Args:
        model: The model to train, already prepared (fake quantizers, frozen weights, adapters), on the meta device. It
            is not changed.
        step: Returns the loss of one batch. It is called once with fake copies of `model` and `teacher`, and the
            tensors that it creates are fake as well.
        teacher: The teacher on the meta device; None without a teacher, or with cached teacher outputs.
        autocast: The dtype of matrix products, if it differs from the dtype of the weights.
        accumulates: Whether gradients are accumulated over multiple batches.
        bits: Bits per element, by name, of frozen parameters that are stored in fewer bits than their dtype. They are
            dequantized one at a time for their matrix product.
        teacher_bits: The same for the teacher.
        moments: Memory use of the optimizer. The default assumes torch's AdamW.

    Raises:
        Exception: the exception that the model raises on fake tensors, for example because its shapes depend on values.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Linear(1000, 10, bias=False)
        >>> memory = step_memory(model, lambda model, _: model(torch.zeros(64, 1000)).sum())
        >>> memory.weights, memory.gradients, memory.optimizer
        (40000, 40000, 80000)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    student = copy.deepcopy(model).train()
    taught = copy.deepcopy(teacher)
    with FakeTensorMode():
        for part in (student, taught):
            _make_fake(part)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        allocations = _Allocations()
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(allocations.keep_gradient)  # type: ignore[no-untyped-call]
        context = torch.autocast("cpu", autocast) if autocast is not None else contextlib.nullcontext()
        with allocations:
            with context:
                loss = step(student, taught)
            forward = allocations.peak
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
    gradients = sum(_bytes(parameter) for parameter in trained)
    moments = moments or moment_memory("adamw", model)
    backward = gradients + allocations.other_peak if accumulates else allocations.peak
    weights, held = _held(model, bits or {}), _held(teacher, teacher_bits or {})
    dequantized = max(_largest(model, bits or {}), _largest(teacher, teacher_bits or {}))
    return StepMemory(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        weights=weights,
        teacher=held,
        gradients=gradients,
        optimizer=moments.held,
        activations=allocations.other_peak + dequantized,
        total=weights
        + held
        + (moments.held - moments.paged)
        + max(gradients + forward + dequantized, backward + dequantized, gradients + moments.update),
    )


def state_memory(
    model: nn.Module,
    teacher: nn.Module | None = None,
    bits: Mapping[str, float] | None = None,
    teacher_bits: Mapping[str, float] | None = None,
    moments: MomentMemory | None = None,
) -> StepMemory:
    """Predict the part of `step_memory` that does not depend on the batch; activations are None."""
    sizes = {id(p): (p.numel(), _bytes(p)) for p in model.parameters() if p.requires_grad}
    gradients = sum(size for _, size in sizes.values())
    weights, held = _held(model, bits or {}), _held(teacher, teacher_bits or {})
    moments = moments or moment_memory("adamw", model)
    return StepMemory(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(count for count, _ in sizes.values()),
        weights=weights,
        teacher=held,
        gradients=gradients,
        optimizer=moments.held,
        activations=None,
        total=weights + held + gradients + moments.held - moments.paged,
    )


GROUPED = getattr(torch.ops.aten, "_grouped_mm", None) and torch.ops.aten._grouped_mm.default


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Count the bytes of storages that operators allocate, until the last tensor on them is released."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.gradients = 0
        self.other_peak = 0
        """Peak without finished gradients."""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._known.add(tensor.untyped_storage()._cdata)  # storages that existed before the step do not count
        # torch infers shapes of grouped products only in bfloat16, but computes them in other dtypes too
        made = _grouped_product(*args, **(kwargs or {})) if func is GROUPED else None
        result = made if made is not None else func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._count(tensor)
        return result

    def keep_gradient(self, parameter: Tensor) -> None:
        """Count a finished gradient, which is no longer temporary."""
        self.gradients += _bytes(parameter)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.other_peak = max(self.other_peak, self.now - self.gradients)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _grouped_product(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor | None:
    """The result of ``a @ b`` by groups of rows or columns; None if torch infers it."""
    if offsets is None or a.dtype is torch.bfloat16:
        return None
    if a.dim() == 2 and b.dim() == 2:
        return a.new_empty(len(offsets), a.shape[0], b.shape[1])
    return a.new_empty(a.shape[0] if a.dim() == 2 else a.shape[1], b.shape[-1])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _make_fake(module: nn.Module | None) -> None:
    """Replace the meta tensors of a module with fake tensors of the active mode; shared ones stay shared."""
    made: dict[int, Any] = {}
    for part in module.modules() if module is not None else ():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = nn.Parameter(_fake(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = made.setdefault(id(parameter), new)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = made.setdefault(id(buffer), _fake(buffer))
        if isinstance(part, FakeQuantize):
            part.ready = True  # the shape of its scale suffices


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _held(module: nn.Module | None, bits: Mapping[str, float]) -> int:
    if module is None:
        return 0
    held = {id(tensor): _bytes(tensor) for tensor in (*module.parameters(), *module.buffers())}
    held |= {id(p): round(p.numel() * bits[name] / 8) for name, p in module.named_parameters() if name in bits}
    return sum(held.values())


def _largest(module: nn.Module | None, bits: Mapping[str, float]) -> int:
    named = module.named_parameters() if module is not None else ()
    return max((_bytes(parameter) for name, parameter in named if name in bits), default=0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
