"""Record the data flow of a model, that is, the inputs of each operation, in one eager forward pass.

The model is not traced: it runs unchanged, with real control flow, and tensors are tracked by identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qatkit.quantization.layers import QATLayer, swap_of
from qatkit.quantization.placement.operations import ADD, CONV, LINEAR, MUL, OTHER, POOL, kind_of
from qatkit.quantization.swaps import parts_class


@dataclass(eq=False)
class Call:
    """One operation of the recorded forward pass."""

    kind: str
    owner: str
    """Name of the innermost module whose `forward` ran the operation and that is not one of torch's simple modules."""
    index: int
    """Number of operations of this kind that the owner had run before in the same call."""
    module: str | None
    """Name of the layer or simple module that ran the operation; None for a function call in the owner's `forward`."""
    inputs: list[Call] = field(default_factory=list)
    users: list[Call] = field(default_factory=list)
    constant: bool = False
    """Whether an operand is constant: a parameter, a buffer or a number."""


@dataclass
class Recording:
    """The record of one forward pass."""

    calls: list[Call]
    """The operations in order; the first represents the inputs of the model."""
    counts: dict[str, dict[str, int]]
    """Number of operations by kind that one call of a module runs itself, by module."""
    irregular: set[str]
    """Modules that ran different operations in different calls."""
    times: Counter[str]
    """Number of calls of each simple module or layer."""
    sequential: set[str]
    """Names of `nn.Sequential` modules, which would run an added quantizer as a layer."""
    single_input: set[str]
    """Modules that are called with one floating-point tensor."""


def is_layer(module: nn.Module) -> bool:
    """Whether a module is replaced as a whole by quantization."""
    return isinstance(module, QATLayer) or swap_of(type(module)) is not None or parts_class(module) is not None


def is_simple(module: nn.Module) -> bool:
    """Whether a module is a torch module without submodules, such as `nn.ReLU`, whose operations its owner records."""
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


@torch.no_grad()
def record(model: nn.Module, forward: Callable[[], object]) -> Recording:
    """Run a plain model once, in eval mode, and record its operations.

    Args:
        model: A model before `prepare_qat`.
        forward: Runs the model on one batch.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        >>> [call.kind for call in record(model, lambda: model(torch.zeros(1, 1, 4, 4))).calls]
        ['other', 'conv', 'relu']
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    recorder = _Recorder()
    try:
        model.eval()
        with torch.random.fork_rng(devices=list(devices)), recorder.following(model), recorder:
            forward()
    finally:
        for module, mode in modes:
            module.training = mode
    sequential = {name for name, module in model.named_modules() if isinstance(module, nn.Sequential)}
    calls = [recorder.source, *recorder.calls]
    return Recording(calls, recorder.counts, recorder.irregular, recorder.times, sequential, recorder.single_input)


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.source = Call(OTHER, "", 0, None)
        self.calls: list[Call] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.irregular: set[str] = set()
        self.times: Counter[str] = Counter()
        self.single_input: set[str] = set()
        self._made: dict[int, Call] = {}
        self._kept: list[object] = []  # a freed tensor's identity would be used again
        self._owners: list[tuple[str, Counter[str]]] = []
        self._simple: list[str] = []  # simple modules that run now
        self._layer: str | None = None  # the layer that runs now

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Follow the calls of modules."""
        handles = []
        for name, module in model.named_modules():
            follow = self._layer_hooks if is_layer(module) else self._simple_hooks
            enter, leave = (follow if is_layer(module) or is_simple(module) else self._owner_hooks)(name)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layer_hooks(self, name: str) -> tuple[Any, Any]:
        outer: list[str | None] = []

        def enter(*_: Any) -> None:
            outer.append(self._layer)
            self._layer = name

        def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self._layer = outer.pop()
            if self._layer is None:
                self.times[name] += 1
                self._add(_kind_of_layer(module), name, (args, kwargs), out)

        return enter, leave

    def _simple_hooks(self, name: str) -> tuple[Any, Any]:
        def enter(*_: Any) -> None:
            self._simple.append(name)

        def leave(*_: Any) -> None:
            self._simple.pop()
            self.times[name] += 1

        return enter, leave

    def _owner_hooks(self, name: str) -> tuple[Any, Any]:
        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            if sum(value.is_floating_point() for value in given) == 1:
                self.single_input.add(name)
            if not self._owners:  # the outermost module: what it is given are the inputs of the model
                self._made |= {id(value): self.source for value in given}
                self._kept += given
            self._owners.append((name, Counter()))

        def leave(*_: Any) -> None:
            counted = self._owners.pop()[1]
            if self.counts.setdefault(name, dict(counted)) != counted:
                self.irregular.add(name)

        return enter, leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._layer is not None or not self._owners:
            return out
        kind = kind_of(func)
        if (kind == POOL and not _is_pooling(args, kwargs, out)) or (func is F.pad and not _pads_zeros(args, kwargs)):
            kind = OTHER
        follows = any(id(value) in self._made for value in tree_leaves((args, kwargs)))
        floating = any(isinstance(value, Tensor) and value.is_floating_point() for value in tree_leaves(out))
        if kind is not None or (follows and floating):
            self._add(kind or OTHER, self._simple[-1] if self._simple else None, (args, kwargs), out)
        return out

    def _add(self, kind: str, module: str | None, operands: tuple[Any, Any], out: Any) -> None:
        owner, counted = self._owners[-1]
        call = Call(kind, owner, counted[kind], module)
        counted[kind] += 1
        values = tree_leaves(operands)
        for value in values:
            if (before := self._made.get(id(value))) is not None:
                call.inputs.append(before)
                before.users.append(call)
            elif isinstance(value, Tensor):
                call.constant = True
        if kind in (ADD, MUL) and any(isinstance(value, int | float) for value in operands[0][:2]):
            call.constant = True
        results = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        self._made |= {id(value): call for value in results}
        self._kept += [*values, *results]
        self.calls.append(call)


def _is_pooling(args: Any, kwargs: Any, out: Tensor) -> bool:
    """Whether images were averaged over their positions, and not, for example, tokens over a sequence."""
    x = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
    return x.dim() == 4 and out.shape[:2] == x.shape[:2] and out.dim() in (2, 4)


def _pads_zeros(args: Any, kwargs: Any) -> bool:
    """Whether padding adds zeros, which every grid has, or repeats values; other constants are not on the grid."""
    return not (args[3] if len(args) > 3 else (kwargs or {}).get("value"))


def _kind_of_layer(layer: nn.Module) -> str:
    """Transposed convolutions have no integer kernel; modules with several weights are quantized inside."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return CONV
    return LINEAR if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D" else OTHER
