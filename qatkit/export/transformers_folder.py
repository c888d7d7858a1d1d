"""Folders of transformers models: which method quantized them, how they load, and how their tensors are compared."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qatkit.errors import QatkitError


def quantization_method(folder: Path) -> str | None:
    """Return ``quant_method`` of the config in a folder: "" if nothing is quantized, None if there is no config."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str((config.get("quantization_config") or {}).get("quant_method", ""))
    except OSError:
        return None
    except (ValueError, AttributeError):
        return ""


def load_folder(folder: Path, dtype: torch.dtype | str = "auto") -> nn.Module:
    """Load a folder with transformers, as the class that its config names, in eval mode."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, config["architectures"][0])
    with quietly():
        loaded: nn.Module = kind.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    return loaded


def untied_linear_layers(model: nn.Module, names: Iterable[str], format: str, instead: str) -> dict[str, nn.Linear]:
    """The layers of the given names, all linear and each with a weight of its own. Weights are not read.

    Args:
        model: The model, with plain or quantized layers.
        names: Names of the layers to be quantized.
        format: The format, for errors.
        instead: Advice for layers that it does not support.

    Raises:
        QatkitError: a layer is not linear, or shares its weight.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(name)
    layers: dict[str, nn.Linear] = {}
    for name in names:
        layer = model.get_submodule(name)
        # torch's MultiheadAttention reads the weight of its out_proj, which readers of these formats replace by codes
        if not isinstance(layer, nn.Linear) or isinstance(layer, NonDynamicallyQuantizableLinear):
            raise QatkitError(
                f"layer '{name}': '{format}' supports only linear layers, but this is a {type(layer).__name__}",
                advice=f"exclude the layer, or {instead}",
            )
        if tied := [other for other in owners[id(layer.weight)] if other != name]:
            raise QatkitError(
                f"layer '{name}': the weight is tied to '{tied[0]}', and tied codes are not supported",
                advice="exclude the layer, or untie the weights (tie_embeddings: false, tie_word_embeddings: false)",
            )
        layers[name] = layer
    return layers


def compare_tensors(key: str, what: str, stored: Tensor | None, expected: Tensor) -> list[str]:
    """Describe how a stored tensor differs from the trained one; empty if they are equal."""
    if stored is None:
        return [f"'{key}': the folder has no such {what}"]
    if stored.shape != expected.shape:
        return [f"'{key}': {what} of shape {list(stored.shape)} instead of {list(expected.shape)}"]
    wrong = stored.float() != expected.float()  # bfloat16, float8 and int8 are exact in float32
    if not wrong.any():
        return []
    first = wrong.nonzero()[0].tolist()
    return [f"'{key}': {int(wrong.sum())} of {wrong.numel()} {what} differ, the first at {first}"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hide the progress bars of transformers and compressed-tensors, which have no option for it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
