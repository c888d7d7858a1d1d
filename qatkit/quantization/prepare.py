"""Swap a model's layers for fake-quantized ones, and back."""

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
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"),
)  # fmt: skip
"""Names of layers that get the same input, in transformers' models."""


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
    """Make the selected layers of `model` compute with quantized weights and inputs, in place.

    Parameters keep their identity and their names, so optimizers, weight ties and checkpoints stay valid. Weight scales
    are set from the weights; static activation scales (`strategy="tensor"`) wait for `calibrate`.

    Args:
        model: Any module.
        weight: How weights are quantized; None leaves them as they are.
        activation: How each layer's input is quantized; None leaves it as it is.
        include: Globs over layer names; every one must match a layer. Embeddings have to be named: ``*`` and
            ``model.*`` leave them out.
        exclude: Globs over layer names that are left alone; every one must match a layer.
        layers: By glob, what is quantized otherwise; of several that match a layer the last decides. Without `weight`
            and `activation` these are the only layers.
        kv_cache: How the keys and values of a transformers model's attention are quantized, per tensor or per token.
        share_inputs: Give layers that read the same input (q/k/v, gate/up) one static scale instead of one each.
            Dynamic activations are always quantized once. ONNX Runtime only fuses layers with scales of their own.

    Returns:
        The names of the swapped layers, in the model's order, then those of attention modules with a quantized cache.

    Raises:
        QatkitError: a pattern selects nothing or a layer that cannot be quantized, a group size does not divide a
            layer's input, or a weight is not finite.

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
    """Keep torch's fused encoder layer, which computes with the raw weights in eval mode, off quantized children."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            quantized = any(isinstance(child, QATLayer) for child in module.children())
            known = {"relu": 1, "gelu": 2}.get(getattr(module.activation, "__name__", ""), 0)
            module.activation_relu_or_gelu = 0 if quantized else known


def strip_qat(model: nn.Module) -> list[str]:
    """Turn fake-quantized layers back into plain ones that hold the latent (unrounded) weights, in place.

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
                layer._modules.pop(f"{projection}_fake_quant", None)  # missing after an interrupt in the middle
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
    """The fake-quantized layers of a model, with their names; fused experts are not among them."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QATLayer)]


def fake_quantizers(model: nn.Module) -> list[tuple[str, FakeQuantize]]:
    """The fake quantizers of a model, with their names; a shared one once."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FakeQuantize)]


def quantized_weights(model: nn.Module) -> list[tuple[str, Tensor, FakeQuantize]]:
    """Every fake-quantized weight ``[out, in, ...]`` with its name (experts: of the projection) and quantizer."""
    found: list[tuple[str, Tensor, FakeQuantize]] = []
    for name, module in model.named_modules():
        if isinstance(module, QATLayer) and module.weight_fake_quant is not None:
            found.append((name, module.matrix, module.weight_fake_quant))
        elif isinstance(module, QATExperts):
            found += [(f"{name}.{part}", module.matrix(part), module.fake_quant(part)) for part in module.projections]
    return found


def swap_layer(layer: nn.Module, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
    """Make one plain layer compute with quantized values, in place."""
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
    """Quantize an input once for all layers that read it: one fake quantizer for the children of one module.

    Dynamic ones are always shared: they hold nothing but the last input, and let go of it when the module around them
    is done. Tied weights share the weight's quantizer, so that one tensor ships. Static inputs are shared if asked.
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
            continue  # never called, so it could not say when the input is done with
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
    fake_quant = FakeQuantize(spec, "weight", _scale_shape(weight.shape, spec), weight.device)
    if not weight.is_meta:
        fake_quant.initialize(weight)
    return fake_quant


def _scale_shape(shape: Sequence[int], spec: QuantSpec) -> tuple[int, ...]:
    if spec.strategy == "tensor":
        return (1,)
    if spec.block_structure is not None:
        rows, columns = spec.block_structure
        return (-(-shape[0] // rows), -(-shape[1] // columns))
    return (shape[0], 1 if spec.group_size is None else shape[1] // spec.group_size)
