"""The families of models: each has its own formats, its own way to become smaller, and its own benchmark results."""

from __future__ import annotations

from typing import Literal

from torch import nn

from qatkit.advise.phases import Phases, is_language_model, served_layers

Family = Literal["language", "encoder", "convolutional", "mlp", "unknown"]
NAMES: dict[Family, str] = {
    "language": "language models",
    "encoder": "transformer encoders",
    "convolutional": "convolutional networks",
    "mlp": "MLPs",
    "unknown": "models of an unknown family",
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def family_of(model: nn.Module, phases: Phases) -> Family:
    """Return the family of a model, "unknown" if it belongs to none.

    Args:
        model: The model.
        phases: The costs of its layers.
    """
    if is_language_model(model):
        return "language"
    modules = dict(model.named_modules())
    layers = served_layers(phases)
    convolved = sum(layer.flops for layer in layers if isinstance(modules[layer.name], _CONVOLUTIONS))
    if any(layer.between_activations or isinstance(modules[layer.name], nn.MultiheadAttention) for layer in layers):
        decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return "unknown" if decodes or 2 * convolved > sum(layer.flops for layer in layers) else "encoder"
    # scales with the shape [channels, 1, 1] are no matrices
    weighted = [
        module
        for module in modules.values()
        if any(weight.numel() > max(weight.shape, default=1) for weight in module.parameters(recurse=False))
    ]
    if not weighted or not all(isinstance(module, (nn.Linear, *_CONVOLUTIONS)) for module in weighted):
        return "unknown"
    return "convolutional" if convolved else "mlp"
