"""Blockwise execution, which keeps the activations of one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.quantization.layers import QATLayer


@dataclass
class Run:
    """The state of one batch between blocks.

    Attributes:
        hidden: First argument of the next block.
        rest: The other arguments of every block, such as masks and positions, which are shared among blocks in most
            models.
        autocast: Device type and dtype if the model runs under autocast.
    """

    hidden: Tensor
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    autocast: tuple[str, torch.dtype] | None = None

    def through(self, block: nn.Module, index: int) -> Tensor:
        """Return the block's output for a copy of its input, because blocks may change inputs in place."""
        args, kwargs = self.rest[index]
        with ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.autocast[0], self.autocast[1]))
            output: Tensor = _first(block(self.hidden.clone(), *args, **kwargs))
        return output


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of the ModuleList with the most quantized layers.

    If multiple lists have the same number, the outermost is chosen. The result is empty if no list has a quantized
    layer.
    """
    best: list[nn.Module] = []
    most = 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            count = sum(isinstance(part, QATLayer) for part in module.modules())
            if count > most:
                best, most = list(module), count
    return best


def capture(blocks: Sequence[nn.Module], batches: Sequence[Any], forward: Callable[[Any], object]) -> list[Run] | None:
    """Record the inputs of the blocks, or return None if they do not form a chain.

    In a chain, every block runs once, in order, with the previous block's output as its first argument. Only the input
    activation of the first block is kept. The other arguments are kept for every block, because some models pass a
    different mask or different positions to each block.
    """
    runs = []
    for batch in batches:
        recorder = _Recorder(blocks)
        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(recorder.before, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(recorder.after).remove)
            forward(batch)
        if recorder.run is None or not recorder.ordered or len(recorder.run.rest) != len(blocks):
            return None
        runs.append(recorder.run)
    return runs


class _Recorder:
    """Hooks that follow one batch through the blocks."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.run: Run | None = None
        self.ordered = True
        self._last: object = None

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = 0 if self.run is None else len(self.run.rest)
        hidden = args[0] if args else None
        follows = index == 0 or hidden is self._last
        if (
            index >= len(self.blocks)
            or self.blocks[index] is not block
            or not isinstance(hidden, Tensor)
            or not follows
        ):
            self.ordered = False
            return
        if self.run is None:
            self.run = Run(hidden.clone(), autocast=_autocast(hidden.device.type))
        self.run.rest.append((args[1:], dict(kwargs)))

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last = _first(output)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Context manager for running a model in eval mode without gradients and KV caches, with isolated random state."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    configs: dict[int, Any] = {id(c): c for module in model.modules() if (c := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False  # a cache would grow with every run of a block
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, mode in modes:
            module.training = mode


@contextmanager
def unquantized(layers: Sequence[QATLayer], part: str) -> Iterator[None]:
    """Disable the "weight_fake_quant" or the "input_fake_quant" of `layers`."""
    kept = [(layer, getattr(layer, part)) for layer in layers]
    try:
        for layer, _ in kept:
            setattr(layer, part, None)
        yield
    finally:
        for layer, fake_quant in kept:
            setattr(layer, part, fake_quant)


def _autocast(device_type: str) -> tuple[str, torch.dtype] | None:
    if not torch.is_autocast_enabled(device_type):
        return None
    return device_type, torch.get_autocast_dtype(device_type)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
