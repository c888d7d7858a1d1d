"""`nn.MultiheadAttention`: torch's own outputs, from projections that are fake-quantized one by one."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError, QatkitWarning, QuantSpec, calibrate, prepare_qat, strip_qat
from qatkit.export.dense import check, export_dense
from qatkit.export.formats import FORMATS
from qatkit.export.interface import PlannedExport
from qatkit.quantization.measure import layer_table
from qatkit.quantization.monitoring import NUMBERS, LayerWatch, observed_layers
from qatkit.quantization.ptq.runner import apply_ptq
from qatkit.quantization.state import load_quantizers, save_quantizers
from tests.quantization.families import A8, TOKEN, W4, rounded

W8, LSQ = QuantSpec(8), QuantSpec(4, observer="lsq")
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "own widths": {"kdim": 6, "vdim": 10},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "bias": False, "batch_first": True},
}


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, *inputs: Tensor, **options: Any) -> Any:
        return self.attention(*inputs, **options)


def call(model: Layer, batch: tuple[Tensor, ...]) -> Any:
    return model(*batch)


def inputs(options: dict[str, Any], batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (3, 3) if batched else (3,)
    q, k, v = (torch.randn(*shape, options.get(key, 8)) for key in ("qdim", "kdim", "vdim"))
    return q, k, v


def with_rounded_projections(model: Layer, spec: QuantSpec) -> Layer:
    """A plain copy whose weights are the fake-quantized ones, one projection at a time."""
    plain = copy.deepcopy(model)
    attention = plain.attention
    with torch.no_grad():
        for weight in (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight):
            if weight is not None:
                weight.copy_(rounded(weight, spec))
        if attention.in_proj_weight is not None:
            parts = attention.in_proj_weight.view(3, 8, 8)
            parts.copy_(torch.stack([rounded(part, spec) for part in parts]))
        attention.out_proj.weight.copy_(rounded(attention.out_proj.weight, spec))
    return plain


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_attention_is_torchs_own_with_rounded_projections_under_every_mask(options: dict[str, Any]) -> None:
    model = Layer(**options).eval()
    plain, keys = with_rounded_projections(model, W8), list(model.state_dict())
    assert prepare_qat(model, W8) == ["attention", "attention.out_proj"]
    assert [key for key in model.state_dict() if "fake_quant" not in key] == keys
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    padding = torch.tensor([[False, False, True], [False, True, True], [False] * 3])
    for case in (
        {},
        {"need_weights": False},
        {"average_attn_weights": False, "key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal.isinf(), "key_padding_mask": padding, "need_weights": False},
        {"attn_mask": torch.randn(6, 3, 3), "average_attn_weights": False},
    ):
        with torch.no_grad():  # where torch takes its fused path
            q, k, v = inputs(options)
            torch.testing.assert_close(model(q, k, v, **case), plain(q, k, v, **case))
            if "kdim" not in options:
                torch.testing.assert_close(model(q, q, q, **case), plain(q, q, q, **case))
    q, k, v = inputs(options, batched=False)
    masks = {"key_padding_mask": padding[0], "attn_mask": torch.randn(2, 3, 3)}
    torch.testing.assert_close(model(q, k, v, **masks), plain(q, k, v, **masks))


def test_gradients_and_dropout_are_torchs_own() -> None:
    model = Layer(dropout=0.3)
    plain = copy.deepcopy(model)
    prepare_qat(model, QuantSpec(8, type="float"), include=["attention"])
    for part in ("q_proj", "k_proj", "v_proj"):
        del model.attention._modules[f"{part}_fake_quant"]  # nothing is rounded
    grads = []
    for layer in (model, plain):
        torch.manual_seed(1)
        out, weights = layer(*inputs({}))
        (out.square().sum() + weights.square().sum()).backward()
        grads.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_inputs_of_every_projection_are_quantized_static_or_dynamic() -> None:
    q, k, v = inputs({})
    for activation in (A8, TOKEN):
        model = Layer()
        prepare_qat(model, W8, activation)
        calibrate(model, [(q, k, v)], functools.partial(call, model))
        attention: Any = model.attention
        plain = with_rounded_projections(model, W8)
        strip_qat(plain)
        with torch.no_grad():
            plain.attention.in_proj_bias.copy_(attention.shipped()["in_proj_bias"])
        torch.testing.assert_close(plain.attention.in_proj_weight, attention.shipped()["in_proj_weight"])
        quantized = [attention.input_quantizer(part)(x) for part, x in (("q_proj", q), ("k_proj", k), ("v_proj", v))]
        assert not torch.equal(quantized[1], k)
        with torch.no_grad():
            plain.attention.out_proj.weight.copy_(torch.eye(8))
            mixed = plain(*quantized)[0]  # the input of the output projection
        torch.testing.assert_close(model(q, k, v)[0], attention.out_proj(mixed))
        shared = {id(attention.input_quantizer(part)) for part in attention.part_names()}
        assert len(shared) == (1 if activation is TOKEN else 3)
        strip_qat(model)
        assert type(model.attention) is nn.MultiheadAttention
        assert not model.attention._forward_pre_hooks


@pytest.mark.parametrize("include", [["*"], ["*.out_proj"], ["attention"]])
def test_a_copy_a_pickle_and_a_saved_model_compute_the_same(tmp_path: Path, include: list[str]) -> None:
    model = Layer(kdim=6, vdim=10).eval()
    fresh, structure, x = copy.deepcopy(model), str(model), inputs({"kdim": 6, "vdim": 10})
    plain = model(*x)[0]
    prepare_qat(model, LSQ, A8, include=include)
    calibrate(model, [x], functools.partial(call, model))
    expected = model(*x)[0]
    assert not torch.equal(expected, plain)
    save_quantizers(model, tmp_path / "q.safetensors")
    load_quantizers(fresh, tmp_path / "q.safetensors")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(*x)[0], expected)
    strip_qat(model)
    assert str(model) == structure
    assert torch.equal(model(*x)[0], plain)


def test_an_encoder_computes_the_same_in_eval_mode_without_gradients_where_torch_would_fuse_it() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False] * 3])
    expected_names = [f"layers.1.{name}" for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")]
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padding)
    names = prepare_qat(model, QuantSpec(2), include=["layers.1.*"])  # the first layer stays as it is
    assert names == expected_names
    expected = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
        strip_qat(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), plain)


def test_tables_monitor_and_ptq_know_every_projection(tmp_path: Path) -> None:
    model = Layer()
    prepare_qat(model, LSQ, A8)
    names = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"]
    assert [(row.name, row.weights, row.weight_bits, row.activation_bits) for row in layer_table(model)] == [
        (name, 64, 4, 8) for name in names
    ]
    assert [name for name, _ in observed_layers(model)] == names
    watched = dict(zip(NUMBERS, LayerWatch().observe(observed_layers(model)[1][1]).tolist(), strict=True))
    assert watched["weight_error"] == pytest.approx(layer_table(model)[1].weight_error)
    assert apply_ptq(model, "mse", []) == names
    x = inputs({})
    with pytest.warns(QatkitWarning, match=r"keep their scales: attention\.q_proj \(multi-head attention\), .*v_proj"):
        assert apply_ptq(model, "gptq", [x], functools.partial(call, model)) == ["attention.out_proj"]


def test_a_dense_file_holds_the_rounded_projections_and_onnx_accepts_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = Layer().eval()
    plain = Layer().eval()
    prepare_qat(model, W4)
    check(model, PlannedExport.of(model))
    export_dense(model, tmp_path / "model.safetensors")
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = inputs({})
    torch.testing.assert_close(plain(*x), model(*x))
    schemes = PlannedExport.of(model).schemes
    assert list(schemes) == ["attention", "attention.out_proj"]
    FORMATS["onnx"].call("check", model, PlannedExport(schemes))
    strip_qat(model)
    FORMATS["onnx"].call("check", model, PlannedExport(schemes))


def test_what_attention_cannot_do_is_refused_by_name() -> None:
    model = Layer()
    with pytest.raises(QatkitError, match=r"group_size: 16 does not divide in_features=8 of layer 'attention\.q_proj'"):
        prepare_qat(model, QuantSpec(4, strategy="group", group_size=16))
    tied = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    tied[1].in_proj_weight = tied[0].in_proj_weight
    with pytest.raises(QatkitError, match="'q_proj' of layer '0' is tied to '1', but tied weights of multi-head"):
        prepare_qat(tied, W4)
    prepare_qat(model, W4)
    with pytest.raises(QatkitError, match="is_causal=True is only a hint about attn_mask, which is missing"):
        model(*inputs({}), is_causal=True)
    with pytest.raises(QatkitError, match="layer 'attention' is already fake-quantized"):
        prepare_qat(model, W4)
