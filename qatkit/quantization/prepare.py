"""Replace layers of a model with fake-quantized layers, and undo it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from qatkit.quantization.experts import QATExperts, expert_weights, experts_class, is_experts, plain_class
from qatkit.quantization.kv_cache import PARTS as KV_PARTS
from qatkit.quantization.kv_cache import attention_modules, quantize_kv, strip_kv
from qatkit.quantization.layers import QATLayer, swap_of
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.selection import select
from qatkit.quantization.slices import scale_shape
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"),
)  # fmt: skip
"""Names of layers that read the same input in transformers models."""


def prepare_qat(
    model: nn.Module,
    weight: QuantSpec | None = None,
    activation: QuantSpec | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    layers: Mapping[str, Scheme] | None = None,
    kv_cache: QuantSpec | None = None,
    share_inputs: bool = False,
) -> list[str]:
    """Fake-quantize the weights and inputs of the selected layers of `model`, in place.

    Parameters keep their identity and their names, so optimizers, weight ties and checkpoints stay valid. Weight scales
    are set from the weights; static activation scales (`strategy="tensor"`) are set by `calibrate`.

    Args:
        model: Any module.
        weight: Quantization of weights; None leaves them unquantized.
        activation: Quantization of each layer's input; None leaves it unquantized.
        include: Globs over layer names; every glob must match a layer. An embedding must be named: ``*`` and
            ``model.*`` do not select embeddings.
        exclude: Globs over names of layers to leave unquantized; every glob must match a layer.
        layers: Quantization by glob, instead of `weight` and `activation`; the last matching glob wins. Without
            `weight` and `activation`, only these layers are quantized.
        kv_cache: Quantization of the keys and values of a transformers model's attention, per tensor or per token.
        share_inputs: Share one static scale among layers that read the same input (q/k/v, gate/up) instead of one scale
            per layer. Dynamic activations are always quantized once. ONNX Runtime only fuses layers with separate
            scales.

    Returns:
        The names of the swapped layers in model order, then those of attention modules with a quantized cache.

    Raises:
        QatkitError: A glob matches nothing or a layer that cannot be quantized, a group size does not divide a layer's
            inputs, or a weight is non-finite.

    Example:
        >>> from torch import nn
        >>> from qatkit import QuantSpec, prepare_qat
        >>> prepare_qat(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), weight=QuantSpec(num_bits=4))
        ['0', '2']
    """
    chosen = select(model, weight, activation, include, exclude, layers, kv_cache)
    for name, scheme in chosen.items():
        swap_layer(model.get_submodule(name), scheme.weight, scheme.activation)
    share_quantizers(model, list(chosen), share_inputs)
    set_fast_paths(model)
    return list(chosen) + ([] if kv_cache is None else quantize_kv(model, kv_cache, exclude))


def set_fast_paths(model: nn.Module) -> None:
    """Disable torch's fused encoder layer, which reads raw weights, if it is quantized."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            quantized = any(isinstance(child, QATLayer) for child in module.children())
            known = {"relu": 1, "gelu": 2}.get(getattr(module.activation, "__name__", ""), 0)
            module.activation_relu_or_gelu = 0 if quantized else known


def strip_qat(model: nn.Module) -> list[str]:
    """Turn fake-quantized layers back into plain ones with the latent weights, in place.

    Returns:
        The names of the layers that changed.
    """
    attention = [name for name, module in attention_modules(model) if hasattr(module, KV_PARTS[0])]
    for name in attention:
        strip_kv(model.get_submodule(name))
    names = [name for name, module in model.named_modules() if isinstance(module, QATLayer | QATExperts)]
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, QATExperts):
            for projection in layer.projections:
                layer._modules.pop(f"{projection}_fake_quant", None)  # missing after an interrupted swap
            layer.__class__ = cast("type[QATExperts]", plain_class(layer))
            continue
        fake_quant = layer.input_fake_quant
        if isinstance(fake_quant, FakeQuantize) and fake_quant.shared:
            fake_quant.unshare(model.get_submodule(name.rpartition(".")[0]))
        del layer.weight_fake_quant, layer.input_fake_quant
        layer.__class__ = next(kind for kind in type(layer).__mro__ if swap_of(kind) is not None)
    set_fast_paths(model)
    return names + attention


def qat_layers(model: nn.Module) -> list[tuple[str, QATLayer]]:
    """Return the fake-quantized layers of a model with their names, except fused experts."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QATLayer)]


def fake_quantizers(model: nn.Module) -> list[tuple[str, FakeQuantize]]:
    """Return the fake quantizers of a model with their names; a shared one appears once."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FakeQuantize)]


def quantized_weights(model: nn.Module) -> list[tuple[str, Tensor, FakeQuantize]]:
    """Return every fake-quantized weight ``[out, in, ...]`` with its name and quantizer.

    The name is that of the layer or of the expert projection.
    """
    weights: list[tuple[str, Tensor, FakeQuantize]] = []
    for name, module in model.named_modules():
        if isinstance(module, QATLayer) and module.weight_fake_quant is not None:
            weights.append((name, module.matrix, module.weight_fake_quant))
        elif isinstance(module, QATExperts):
            weights += [(f"{name}.{part}", module.matrix(part), module.fake_quant(part)) for part in module.projections]
    return weights


def swap_layer(layer: nn.Module, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
    """Fake-quantize one plain layer, in place."""
    if is_experts(layer):
        assert weight is not None
        projections = tuple(name for name, _ in expert_weights(layer))
        layer.__class__ = experts_class(type(layer), projections)
        assert isinstance(layer, QATExperts)
        for name in projections:
            layer.register_module(f"{name}_fake_quant", _weight_quantizer(layer.matrix(name), weight))
        return
    swapped = swap_of(type(layer))
    assert swapped is not None
    layer.__class__ = swapped
    assert isinstance(layer, QATLayer)
    layer.register_module("weight_fake_quant", None)
    layer.register_module("input_fake_quant", None)
    if weight is not None:
        layer.weight_fake_quant = _weight_quantizer(layer.matrix, weight)
    if activation is not None:
        layer.input_fake_quant = FakeQuantize(activation, "activation", (1,), layer.weight.device)


def share_quantizers(model: nn.Module, names: Sequence[str], static: bool) -> None:
    """Share the fake quantizers of inputs that several layers read, and of tied weights.

    Dynamic input quantizers are always shared: they only cache the last input, and release it when the parent module
    returns. Tied weights share one quantizer, so that one tensor is exported. Static input quantizers are shared if
    `static` is set.
    """
    chosen = {name: layer for name, layer in qat_layers(model) if name in set(names)}
    owners: dict[int, FakeQuantize | None] = {}
    families: dict[tuple[str, QuantSpec, object], FakeQuantize] = {}
    for name, layer in chosen.items():
        layer.weight_fake_quant = owners.setdefault(id(layer.weight), layer.weight_fake_quant)
        fake_quant = layer.input_fake_quant
        if fake_quant is None or not (fake_quant.dynamic or static):
            continue
        parent, _, own = name.rpartition(".")
        around = model.get_submodule(parent)
        if isinstance(around, nn.ModuleList | nn.ModuleDict):
            continue  # never called itself, so its hooks would not release the input
        family: object = True
        if not fake_quant.dynamic:
            family = next((family for family in SIBLINGS if own in family), None)
            if family is None:
                continue
        first = families.setdefault((parent, fake_quant.spec, family), fake_quant)
        if first is fake_quant:
            continue
        layer.input_fake_quant = first
        first.share(around)


def _weight_quantizer(weight: Tensor, spec: QuantSpec) -> FakeQuantize:
    fake_quant = FakeQuantize(spec, "weight", scale_shape(weight.shape, spec), weight.device)
    if not weight.is_meta:
        fake_quant.initialize(weight)
    return fake_quant
