"""The quantized and unquantized layers of a prepared model, and the fraction of its weights that is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qatkit.quantization.kv_cache import PARTS as KV_PARTS
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.placement.points import placement_of
from qatkit.quantization.prepare import qat_weights

_LISTED = 8
"""Unquantized layers that are listed by name."""


@dataclass(frozen=True)
class Coverage:
    """The quantized and unquantized layers of a model; a layer is a module with its own weight matrix.

    ``str()`` returns, for example, ``quantized: 2 of 3 layers, 66.7 % of the weights; float: norm (LayerNorm)``.
    """

    quantized: Sequence[str]
    """Names of layers with a quantized weight or input."""
    unquantized: Sequence[str]
    """Names of unquantized layers, each followed by its type in parentheses."""
    weights: float
    """Fraction of the weights of all layers that is quantized."""
    caches: int = 0
    """Names of attention modules with a quantized KV cache."""
    results: int = 0
    """Outputs of layers and operations that are quantized in addition to layer inputs."""

    def __str__(self) -> str:
        total = len(self.quantized) + len(self.unquantized)
        text = f"quantized: {len(self.quantized)} of {total} layers, {100 * self.weights:.1f} % of the weights"
        text += f", {self.results} results" if self.results else ""
        text += f", the KV cache of {self.caches} attention modules" if self.caches else ""
        if not self.unquantized:
            return text
        more = len(self.unquantized) - _LISTED
        return f"{text}; float: {', '.join(self.unquantized[:_LISTED])}{f' and {more} more' if more > 0 else ''}"


def coverage(model: nn.Module) -> Coverage:
    """Count the quantized and unquantized layers and weights of a model prepared by `prepare_qat`.

    Weights are parameters with at least two dimensions. A tied weight is counted once, and counts as quantized if one
    of its layers is quantized.

    Example:
        >>> from qatkit import QuantSpec, prepare_qat
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        >>> _ = prepare_qat(model, weight=QuantSpec(num_bits=4))
        >>> print(coverage(model))
        quantized: 1 of 2 layers, 50.0 % of the weights; float: 0 (Embedding)
    """
    weights = qat_weights(model)
    swapped = {id(weight.layer) for weight in weights}
    rounded = {id(weight.layer) for weight in weights if weight.weight_fake_quant is not None}
    quantized, unquantized = [], []
    sizes: dict[int, tuple[int, bool]] = {}
    for name, module in model.named_modules():
        own = _matrices(module)
        if not own or isinstance(module, FakeQuantize):
            continue
        if id(module) in swapped:
            quantized.append(name)
        else:
            unquantized.append(f"{name} ({type(module).__name__.removeprefix('QAT')})")
        for parameter in own:
            before = sizes.get(id(parameter), (0, False))[1]
            sizes[id(parameter)] = (parameter.numel(), before or id(module) in rounded)
    total = sum(size for size, _ in sizes.values())
    done = sum(size for size, is_rounded in sizes.values() if is_rounded)
    caches = sum(KV_PARTS[0] in module._modules for module in model.modules())
    return Coverage(quantized, unquantized, done / max(total, 1), caches, len(placement_of(model).points))


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() >= 2]
