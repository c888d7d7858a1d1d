"""Record the outputs of single layers: of the trained model, and of files that PyTorch reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from qatkit.export.interface import LayerCall, Walk
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import fake_quantizers


def walked_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers with parameters of their own, without fake quantizers, in model order."""
    inside = {id(part) for _, fake_quant in fake_quantizers(model) for part in fake_quant.modules()}
    return tuple(
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and not isinstance(module, FakeQuantize)
        and id(module) not in inside
    )


def walk_modules(model: nn.Module, path: Path, runtime: nn.Module) -> Walk:
    """Walk through the layers of a file that PyTorch has loaded.

    Args:
        model: The trained model, in eval mode on the CPU.
        path: The file.
        runtime: The loaded file, with the model's layer names.
    """
    known = dict(runtime.named_modules())
    names = walked_layers(model)
    skipped = {name: "the loaded model has no such layer" for name in names if name not in known}
    layers = tuple(name for name in names if name in known)
    calls: list[LayerCall] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.clear()
        with recorded(runtime, layers, calls):
            return runtime(*args, **kwargs)

    return Walk(model, run, layers, calls, skipped)


@contextmanager
def recorded(model: nn.Module, layers: Sequence[str], calls: list[LayerCall]) -> Iterator[None]:
    """Append every call of the layers to `calls`, with the output before other hooks change it."""

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(LayerCall(name, args, kwargs, output))

        return record

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True, prepend=True) for name in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
