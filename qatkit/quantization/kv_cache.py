"""KV cache quantization: fake-quantize keys and values in the same way as a quantized cache.

transformers looks up attention functions by name. qatkit registers its own function, which fake-quantizes keys and
values (after rotary position embeddings) and calls the model's original function. This works for every architecture
that uses the lookup, in training and evaluation, with and without a cache.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.quantization.modules import FakeQuantize
from qatkit.spec import QuantSpec

PREFIX = "qatkit_"
PARTS = ("key_fake_quant", "value_fake_quant")


def attention_modules(model: nn.Module, exclude: Sequence[str] = ()) -> list[tuple[str, nn.Module]]:
    """Find the attention modules of a transformers model that use a KV cache, by their attributes."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "config")
        and (hasattr(module, "is_causal") or hasattr(module, "scaling"))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]


def check_kv_quantization(model: nn.Module, exclude: Sequence[str] = ()) -> None:
    """Raise an error if the KV cache of a model cannot be quantized.

    Raises:
        QatkitError: The model has no transformers attention, or its attention function cannot be replaced.
    """
    modules = attention_modules(model, exclude)
    if not modules:
        raise QatkitError(
            f"{type(model).__name__} has no transformers attention module", key="kv_cache", advice="remove kv_cache"
        )
    for name, module in modules:
        _check(name, module)
        if hasattr(module, PARTS[0]):
            raise QatkitError(
                f"'{name}' is already fake-quantized", key="kv_cache", advice="call strip_qat(model) first"
            )


def _check(name: str, module: nn.Module) -> None:
    config: Any = module.config
    implementation = str(config._attn_implementation)
    if implementation.removeprefix(PREFIX) not in _functions():
        raise QatkitError(
            f"'{name}' computes attention with '{implementation}', which qatkit does not support", key="kv_cache",
            advice="load the model with attn_implementation='sdpa'",
        )  # fmt: skip
    if not _uses_registry(type(module).__module__):
        raise QatkitError(
            f"'{name}' is a {type(module).__name__}, whose code depends on the name of the attention function, so its "
            "KV cache cannot be quantized", key="kv_cache", advice="remove kv_cache",
        )  # fmt: skip


@functools.cache
def _uses_registry(module: str) -> bool:
    """Whether a model looks attention up by name and never compares the name with sdpa."""
    source = inspect.getsource(sys.modules[module])
    asks = re.search(r"_attn_implementation\s*(==|!=|in|not in)\s*[^\n]*sdpa", source)
    return "ALL_ATTENTION_FUNCTIONS" in source and asks is None


def quantize_kv(model: nn.Module, spec: QuantSpec, exclude: Sequence[str] = ()) -> list[str]:
    """Make attention modules fake-quantize keys and values, in place, and return the names of the modules."""
    modules = attention_modules(model, exclude)
    for name, module in modules:
        add_kv_quantizers(name, module, spec)
    return [name for name, _ in modules]


def add_kv_quantizers(name: str, module: nn.Module, spec: QuantSpec) -> None:
    """Make one attention module fake-quantize its keys and values, in place."""
    _check(name, module)
    device = next((p.device for p in module.parameters()), None)
    for part in PARTS:
        module.register_module(part, FakeQuantize(spec, "activation", (1,), device))
    config: Any = module.config
    if not str(config._attn_implementation).startswith(PREFIX):
        _register(str(config._attn_implementation))
        config._attn_implementation = PREFIX + config._attn_implementation


def strip_kv(module: nn.Module) -> None:
    """Remove the fake quantizers of keys and values from one attention module."""
    for part in PARTS:
        del module._modules[part]
    config: Any = module.config
    config._attn_implementation = str(config._attn_implementation).removeprefix(PREFIX)


def _functions() -> Any:
    # called for transformers models only, so transformers is already imported
    return importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS


def _register(name: str) -> None:
    """Register our variant of an attention function, and the same mask function under its name."""
    functions = _functions()
    inner = functions[name]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(fake_quant := module._modules.get(PARTS[0]), FakeQuantize):
            key = fake_quant(key)
        if isinstance(fake_quant := module._modules.get(PARTS[1]), FakeQuantize):
            value = fake_quant(value)
        return inner(module, query, key, value, *args, **kwargs)

    masks = importlib.import_module("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    functions.register(PREFIX + name, attention)
    masks.register(PREFIX + name, masks[name])
