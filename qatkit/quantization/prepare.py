"""Replace layers of a model with fake-quantized layers, and undo the replacement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from qatkit.quantization.kv_cache import PARTS as KV_PARTS
from qatkit.quantization.kv_cache import attention_modules, quantize_kv, strip_kv
from qatkit.quantization.layers import QATLayer, swap_of
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.parts import QATParts
from qatkit.quantization.placement.points import unplace
from qatkit.quantization.selection import select
from qatkit.quantization.slices import scale_shape
from qatkit.quantization.swaps import parts_class
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"),
)  # fmt: skip
"""Names of layers that read the same input in transformers models."""

_NESTED = "_use_nested_tensor_before_qat"


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

    Parameters keep their identity and names, so optimizers, weight ties and checkpoints stay valid. Weight scales are
    set from the weights; static activation scales (`strategy="tensor"`) are set by `calibrate`.

    Args:
        model: Any module.
        weight: Quantization of weights; None leaves them unquantized.
        activation: Quantization of each layer's input; None leaves it unquantized.
        include: Globs over layer names; each must match a layer. Embeddings must be listed explicitly: ``*`` and
            ``model.*`` do not select them.
        exclude: Globs over names of layers to leave unquantized; each must match a layer.
        layers: Quantization by glob, which overrides `weight` and `activation`; the last matching glob wins. Without
            `weight` and `activation`, only these layers are quantized.
        kv_cache: Quantization of the KV cache of a transformers model, per-tensor or per-token.
        share_inputs: Share one static scale among layers that read the same input (q/k/v, gate/up) instead of one scale
            per layer. Dynamic activations are always quantized once. ONNX Runtime fuses only layers with separate
            scales.

    Returns:
        The names of the replaced layers in model order, followed by the attention modules with a quantized KV cache.

    Raises:
        QatkitError: A glob matches no layer or a layer that cannot be quantized, a group size does not divide a layer's
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
    """Disable torch's fused code paths, which read the raw weights of quantized layers.

    They exist in `nn.MultiheadAttention` around a quantized ``out_proj``, and in `nn.TransformerEncoderLayer`, for
    which `nn.TransformerEncoder` converts padded inputs to nested tensors.
    """
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and isinstance(cast(nn.Module, module.out_proj), QATLayer):
            swap_layer(module, None, None)
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        quantized = any(isinstance(part, QATLayer | QATParts) for part in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer):
            known = {"relu": 1, "gelu": 2}.get(getattr(module.activation, "__name__", ""), 0)
            module.activation_relu_or_gelu = 0 if quantized else known
        elif quantized:
            module.__dict__.setdefault(_NESTED, module.use_nested_tensor)
            module.use_nested_tensor = False
        else:
            module.use_nested_tensor = module.__dict__.pop(_NESTED, module.use_nested_tensor)


def strip_qat(model: nn.Module) -> list[str]:
    """Convert fake-quantized layers back to plain layers with the latent weights, in place.

    Returns:
        The names of the layers that changed.
    """
    unplace(model)
    attention = [name for name, module in attention_modules(model) if hasattr(module, KV_PARTS[0])]
    for name in attention:
        strip_kv(model.get_submodule(name))
    names = [name for name, module in model.named_modules() if isinstance(module, QATLayer | QATParts)]
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, QATParts):
            for part in layer.part_names():
                if (inputs := layer.input_quantizer(part)) is not None and inputs.shared:
                    inputs.unshare(layer)
                for own in (f"{part}_fake_quant", f"{part}_input_fake_quant"):
                    layer._modules.pop(own, None)  # missing after an interrupted swap
            layer.__class__ = cast("type[QATParts]", layer.plain_class())
            continue
        fake_quant = layer.input_fake_quant
        if isinstance(fake_quant, FakeQuantize) and fake_quant.shared:
            fake_quant.unshare(model.get_submodule(name.rpartition(".")[0]))
        del layer.weight_fake_quant, layer.input_fake_quant
        layer.__class__ = next(kind for kind in type(layer).__mro__ if swap_of(kind) is not None)
    set_fast_paths(model)
    return names + attention


def qat_layers(model: nn.Module) -> list[tuple[str, QATLayer]]:
    """Return the fake-quantized layers of a model with their names, except layers with multiple weights."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QATLayer)]


def fake_quantizers(model: nn.Module) -> list[tuple[str, FakeQuantize]]:
    """Return the fake quantizers of a model with their names; a shared quantizer is returned once."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FakeQuantize)]


@dataclass(frozen=True)
class QATWeight:
    """A weight of a quantized layer."""

    name: str
    """The name of the layer, followed by the part name if the layer has multiple weights."""
    layer: QATLayer | QATParts
    part: str = ""

    @property
    def matrix(self) -> Tensor:
        """Return the latent weight ``[out, in, ...]``."""
        return self.layer.matrix(self.part) if isinstance(self.layer, QATParts) else self.layer.matrix

    @property
    def weight_fake_quant(self) -> FakeQuantize | None:
        """The fake quantizer of the weight, or None."""
        if isinstance(self.layer, QATParts):
            return self.layer.weight_quantizer(self.part)
        return self.layer.weight_fake_quant

    @property
    def input_fake_quant(self) -> FakeQuantize | None:
        """The fake quantizer of the input, or None."""
        return (
            self.layer.input_quantizer(self.part) if isinstance(self.layer, QATParts) else self.layer.input_fake_quant
        )


def qat_weights(model: nn.Module) -> list[QATWeight]:
    """Return the weights of all quantized layers of a model, in model order."""
    weights: list[QATWeight] = []
    for name, module in model.named_modules():
        if isinstance(module, QATLayer):
            weights.append(QATWeight(name, module))
        elif isinstance(module, QATParts):
            parts = [QATWeight(f"{name}.{part}" if name else part, module, part) for part in module.part_names()]
            weights += [part for part in parts if part.weight_fake_quant or part.input_fake_quant]
    return weights


def schemes_of(model: nn.Module) -> dict[str, Scheme]:
    """Return the quantization of each layer of a prepared model, by name; empty for a plain model."""

    def spec(fake_quant: FakeQuantize | None) -> QuantSpec | None:
        return None if fake_quant is None else fake_quant.spec

    return {
        weight.name.removesuffix(f".{weight.part}"): Scheme(
            spec(weight.weight_fake_quant), spec(weight.input_fake_quant)
        )
        for weight in qat_weights(model)
    }


def quantized_weights(model: nn.Module) -> list[tuple[str, Tensor, FakeQuantize]]:
    """Return every fake-quantized weight ``[out, in, ...]`` with its name and quantizer.

    The name is the layer name, followed by the part name if the layer has multiple weights.
    """
    return [(w.name, w.matrix, w.weight_fake_quant) for w in qat_weights(model) if w.weight_fake_quant is not None]


def swap_layer(layer: nn.Module, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
    """Fake-quantize one plain layer, in place."""
    if (kind := parts_class(layer)) is not None:
        layer.__class__ = kind
        assert isinstance(layer, QATParts)
        _add_quantizers(layer, weight, activation)
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


def _add_quantizers(layer: QATParts, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
    first: FakeQuantize | None = None
    for part in layer.part_names():
        matrix = layer.matrix(part)
        if weight is not None:
            layer.register_module(f"{part}_fake_quant", _weight_quantizer(matrix, weight))
        if activation is not None:
            inputs = FakeQuantize(activation, "activation", (1,), matrix.device)
            if inputs.dynamic and first is not None:  # an input that several parts read is quantized once
                inputs = first
                inputs.share(layer)
            first = inputs
            layer.register_module(f"{part}_input_fake_quant", inputs)


def share_quantizers(model: nn.Module, names: Sequence[str], static: bool) -> None:
    """Share fake quantizers between layers with the same input, and between tied weights.

    Dynamic input quantizers are always shared: they cache only the last input, and release it when the parent module
    returns. Tied weights share one quantizer, so that a single tensor is exported. Static input quantizers are shared
    if `static` is set.
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
