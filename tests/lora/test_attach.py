"""Which layers get adapters, and what plain peft makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.lora.adapter_files import save_adapter
from qatkit.lora.attachment import Adapter, attach, base_layers, merge, target_layers
from tests.lora.test_bits import moved
from tests.support.texts import VOCAB, tiny_llama

INPUTS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
BLOCK += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(INPUTS).logits
    return found


def test_a_star_takes_every_linear_layer_but_the_output_layer() -> None:
    model = tiny_llama()
    assert target_layers(model) == [f"model.layers.0.{name}" for name in BLOCK] == base_layers(model)
    assert target_layers(model, ["*.q_proj", "*.v_proj"]) == [f"model.layers.0.{BLOCK[i]}" for i in (0, 2)]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["*.q_prj"], r"targets\[0\]: '\*\.q_prj' matches no linear layer; did you mean '\*\.q_proj'"),
        (["*", "*.norm"], r"targets\[1\]: '\*\.norm' matches no linear layer"),
        (["lm_head"], r"layer 'lm_head' shares its weight with 'model\.embed_tokens'"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(targets: list[str], message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        target_layers(tiny_llama(), targets)


@pytest.mark.parametrize("dora", [False, True])
def test_the_merge_is_that_of_peft_and_its_folder_loads_in_plain_peft(dora: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    names = target_layers(model, ["*.q_proj", "*.down_proj"])
    attach(model, names, Adapter(rank=4, alpha=12, dora=dora))
    moved(model)
    trained = logits(model)
    save_adapter(model, tmp_path, base="somebody/model")
    merge(model)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path)  # type: ignore[arg-type]  # a transformers model
    torch.testing.assert_close(logits(theirs), trained)
    merged = theirs.merge_and_unload().state_dict()
    assert sorted(merged) == sorted(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, merged[key]), key
    assert not torch.equal(model.state_dict()[f"{names[0]}.weight"], tiny_llama().state_dict()[f"{names[0]}.weight"])


def test_an_update_inside_the_weight_merges_as_peft_merges_it(tmp_path: Path) -> None:
    model = tiny_llama()
    prepare_qat(model, weight=QuantSpec(8, observer="lsq"), exclude=["lm_head"])
    attach(model, target_layers(model), Adapter(rank=4, alpha=12))
    moved(model)
    save_adapter(model, tmp_path)
    merge(model)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path).merge_and_unload().state_dict()  # type: ignore[arg-type]
    for key, value in theirs.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-7)


def test_it_starts_as_peft_starts() -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    torch.manual_seed(11)
    attach(ours, target_layers(ours), Adapter(4, 8))
    torch.manual_seed(11)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))  # type: ignore[assignment,arg-type]
    prefix = "base_model.model."
    assert {prefix + key for key in ours.state_dict()} == set(theirs.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[prefix + key]), key
    frozen = {prefix + name for name, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in theirs.named_parameters() if not p.requires_grad}


def test_layers_of_gpt2_are_adapted_by_peft_and_refused_inside_the_weight() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    names = target_layers(model)
    assert [name.rpartition("h.0.")[2] for name in names] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    attach(model, names, Adapter(rank=4))
    moved(model)
    trained = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), trained)
    prepare_qat(model, weight=QuantSpec(4), exclude=["lm_head"])
    with pytest.raises(QatkitError, match=r"a QATConv1D that is quantized in the same stage, cannot have an adapter"):
        attach(model, names, Adapter(rank=4))


@pytest.mark.parametrize("wrong", [{"dora": True}, {"dropout": 0.1}])
def test_what_cannot_be_inside_a_weight_is_refused_before_anything_changes(wrong: dict[str, float]) -> None:
    model = tiny_llama()
    prepare_qat(model, weight=QuantSpec(4), exclude=["lm_head"])
    key = next(iter(wrong))
    with pytest.raises(
        QatkitError, match=rf"{key}: .* is not supported for a layer that is quantized in the same stage"
    ):
        attach(model, target_layers(model), Adapter(**wrong))  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_that_peft_would_let_fill_zeros_is_not_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    names = target_layers(model)
    attach(model, names, Adapter(rank=4), held=names[:1])
    with pytest.raises(
        QatkitError, match="has a sparsity mask, which merging with peft would ignore; use merge instead"
    ):
        save_adapter(model, tmp_path)


def recomputed(kind: str) -> nn.Module:
    layer = nn.Linear(6, 6)
    if kind == "parametrizations":
        return nn.utils.parametrizations.weight_norm(layer)
    if kind == "prune":
        from torch.nn.utils import prune

        return prune.random_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-any-return, no-untyped-call]
    return getattr(nn.utils, kind)(layer)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ["parametrizations", "weight_norm", "spectral_norm", "prune"])
def test_a_weight_that_is_computed_on_each_call_cannot_have_an_adapter(kind: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), recomputed(kind))
    for refused in (lambda: target_layers(model), lambda: attach(model, ["1"], Adapter(2))):
        with pytest.raises(QatkitError, match=r"^targets: layer '1' recomputes its weight on each call"):
            refused()  # type: ignore[no-untyped-call]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert target_layers(model, ["0"]) == ["0"]


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "LoHaConfig"])
def test_a_model_with_an_adapter_of_its_own_is_refused(method: str) -> None:
    import peft

    options = {"feedforward_modules": []} if method == "IA3Config" else {}
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    peft.inject_adapter_in_model(getattr(peft, method)(target_modules=["0"], **options), model, adapter_name="old")
    for refused in (lambda: target_layers(model), lambda: attach(model, ["1"], Adapter(2))):
        with pytest.raises(QatkitError, match=r"^model: layer '0' already has an adapter; merge the adapter first"):
            refused()  # type: ignore[no-untyped-call]


def test_adapters_of_ours_are_not_attached_twice() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    attach(model, ["0"], Adapter(2), held=["0"])
    with pytest.raises(QatkitError, match=r"^model: layer '0' already has an adapter"):
        target_layers(model)
