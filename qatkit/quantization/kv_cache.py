"""Keys and values of attention, rounded as a quantized cache would hold them.

transformers computes attention through functions that are registered by name. A function of ours, under a name of its
own, rounds keys and values, rotary positions applied, and hands them to the function that the model had; so it works
for every architecture, in training, in evaluation and with a cache.
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
    """The attention modules of a transformers model that keep a cache: they know their layer and their config."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "config")
        and (hasattr(module, "is_causal") or hasattr(module, "scaling"))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]


def check_kv_quantization(model: nn.Module, exclude: Sequence[str] = ()) -> None:
    """Refuse a model whose keys and values cannot be reached.

    Raises:
        QatkitError: the model has no attention of transformers, or computes it in a way that cannot be wrapped.
    """
    found = attention_modules(model, exclude)
    if not found:
        raise QatkitError(
            f"kv_cache: {type(model).__name__} has no attention module of transformers; leave kv_cache out"
        )
    for name, module in found:
        _check(name, module)
        if hasattr(module, PARTS[0]):
            raise QatkitError(f"kv_cache: '{name}' is already fake-quantized; call strip_qat(model) first")


def _check(name: str, module: nn.Module) -> None:
    config: Any = module.config
    implementation = str(config._attn_implementation)
    if implementation.removeprefix(PREFIX) not in _functions():
        raise QatkitError(
            f"kv_cache: '{name}' computes attention with '{implementation}', which cannot be wrapped; load the "
            "model with attn_implementation='sdpa'"
        )
    if not _goes_by_registry(type(module).__module__):
        raise QatkitError(
            f"kv_cache: '{name}' is a {type(module).__name__}, whose code asks for the attention's name, "
            "so that its keys and values cannot be reached; leave kv_cache out"
        )


@functools.cache
def _goes_by_registry(module: str) -> bool:
    """Whether a model's code calls whatever function is registered, and never asks whether it is called sdpa."""
    source = inspect.getsource(sys.modules[module])
    asks = re.search(r"_attn_implementation\s*(==|!=|in|not in)\s*[^\n]*sdpa", source)
    return "ALL_ATTENTION_FUNCTIONS" in source and asks is None


def quantize_kv(model: nn.Module, spec: QuantSpec, exclude: Sequence[str] = ()) -> list[str]:
    """Make every attention module round its keys and values, in place; returns their names."""
    found = attention_modules(model, exclude)
    for name, module in found:
        add_kv_quantizers(name, module, spec)
    return [name for name, _ in found]


def add_kv_quantizers(name: str, module: nn.Module, spec: QuantSpec) -> None:
    """Make one attention module round its keys and values, in place."""
    _check(name, module)
    device = next((p.device for p in module.parameters()), None)
    for part in PARTS:
        module.register_module(part, FakeQuantize(spec, "activation", (1,), device))
    config: Any = module.config
    if not str(config._attn_implementation).startswith(PREFIX):
        _register(str(config._attn_implementation))
        config._attn_implementation = PREFIX + config._attn_implementation


def strip_kv(module: nn.Module) -> None:
    """Take the fake quantizers of keys and values away from one attention module."""
    for part in PARTS:
        del module._modules[part]
    config: Any = module.config
    config._attn_implementation = str(config._attn_implementation).removeprefix(PREFIX)


def _functions() -> Any:
    # a model of transformers is here, so transformers is loaded: nothing heavy is imported for other models
    return importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS


def _register(name: str) -> None:
    """Register our attention function and its mask function beside those of the given name."""
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
