"""Folders for torchao: transformers loads the trained codes and scales, outputs are equal, and changes are found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from qatkit import QatkitError, QuantSpec, Scheme, prepare_qat, scheme
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.torchao_folder import export_torchao
from qatkit.export.verification import verify
from qatkit.models import llama, untrained_model

TOKENS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}
Q = "model.layers.1.self_attn.q_proj"


def made(weight: QuantSpec, layers: dict[str, Scheme] | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = llama(vocab_size=300, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=96).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    prepare_qat(model, weight, exclude=["lm_head"], layers=layers)
    return model


@pytest.mark.parametrize(
    ("weight", "layers"),
    [
        (QuantSpec(4, strategy="group", group_size=32), None),
        (QuantSpec(3, symmetric=False), None),
        (QuantSpec(8), {"*.mlp.*": Scheme(QuantSpec(2, strategy="group", group_size=32))}),
    ],
    ids=["int4 in groups", "int3 with zero points", "int8 and int2"],
)
def test_transformers_computes_exactly_what_was_trained(
    weight: QuantSpec, layers: dict[str, Scheme] | None, tmp_path: Path
) -> None:
    model = made(weight, layers)
    export_torchao(model, tmp_path / "model")
    result = verify(model, tmp_path / "model", [BATCH])
    assert result.failures == []
    assert (result.format, result.layers, result.mean_error, result.agreement) == ("torchao", 14, 0.0, 1.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert type(loaded.get_submodule(Q).weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert type(loaded.lm_head.weight) is nn.Parameter


def test_a_classifier_and_a_plain_model_are_exported_too(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = untrained_model("bert", "SequenceClassification", shape | {"vocab_size": 300}).eval()
    batch = {"input_ids": TOKENS, "labels": torch.zeros(2).long()}
    export_torchao(model, tmp_path / "plain")
    assert format_of_path(tmp_path / "plain").name == "compressed_tensors"  # a plain folder of transformers
    assert verify(model, tmp_path / "plain", [batch], format="torchao").failures == []
    prepare_qat(model, QuantSpec(8), exclude=["classifier"])
    export_torchao(model, tmp_path / "int8")
    assert verify(model, tmp_path / "int8", [batch]).failures == []
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def change(name: str, how: Callable[[Tensor], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "model.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
        how(tensors[name])
        save_file(tensors, file, metadata=metadata)

    return changed


def one_ulp(values: Tensor) -> None:
    values[0, 0] = torch.nextafter(values[0, 0], torch.tensor(1.0))


def one_code(values: Tensor) -> None:
    values[3, 2] ^= 1


def swapped_rows(values: Tensor) -> None:
    values[[0, 1]] = values[[1, 0]]


def zeroed(values: Tensor) -> None:
    values.zero_()


def float_layer(folder: Path) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_type"] = "unknown"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = made(QuantSpec(4, strategy="group", group_size=32, symmetric=False))
    folder = tmp_path_factory.mktemp("torchao") / "model"
    export_torchao(model, folder)
    return model, folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change(f"{Q}._weight_scale", one_ulp), f"'{Q}.weight': 1 of 128 scales differ, the first at [0, 0]"),
        (change(f"{Q}._weight_qdata", one_code), f"'{Q}.weight': 1 of 4096 codes differ, the first at [3, 2]"),
        (change(f"{Q}._weight_qdata", swapped_rows), f"'{Q}.weight': "),
        (change(f"{Q}._weight_zero_point", zeroed), f"'{Q}.weight': "),
        (change("model.norm.weight", zeroed), "'model.norm.weight': 64 of 64 values differ"),
        (float_layer, "transformers cannot load model"),
    ],
)
def test_every_change_is_found_and_named(
    exported: tuple[nn.Module, Path], tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    model, folder = exported
    shutil.copytree(folder, tmp_path / "model")
    damage(tmp_path / "model")
    result = verify(model, tmp_path / "model", [BATCH], format="torchao")
    assert not result.passed
    assert said in result.failures[0], result.failures


@pytest.mark.parametrize(
    ("planned", "said"),
    [
        (Scheme(QuantSpec(8), QuantSpec(8, strategy="token")), "multiplies by the reciprocal of an input's scale"),
        (Scheme(QuantSpec(8, type="float")), "stores only integer weights"),
        (Scheme(QuantSpec(8, strategy="tensor")), "with one scale per output channel or group"),
        (Scheme(None, QuantSpec(8, strategy="token")), "does not quantize the input of a layer alone"),
        (scheme("Q4_K"), "a weight with scale_dtype 'uint6' has minima"),
    ],
)
def test_schemes_that_it_cannot_hold_are_refused_before_training(planned: Scheme, said: str) -> None:
    model = llama(vocab_size=300, hidden=64, layers=1, heads=2, kv_heads=1, intermediate=96)
    with pytest.raises(QatkitError, match=f"layer 'model.layers.0.mlp.up_proj': .*{said}"):
        FORMATS["torchao"].check_model(model, {"model.layers.0.mlp.up_proj": planned})


def test_other_models_tied_and_half_precision_layers_are_refused() -> None:
    check, int8 = FORMATS["torchao"].check_model, Scheme(QuantSpec(8))
    model = llama(vocab_size=300, hidden=64, layers=1, heads=2, kv_heads=1, intermediate=96)
    with pytest.raises(QatkitError, match=r"layer 'lm_head': the weight is tied to 'model\.embed_tokens'"):
        check(model, {"lm_head": int8})
    with pytest.raises(QatkitError, match="supports only linear layers, but this is a Embedding"):
        check(model, {"model.embed_tokens": int8})
    with pytest.raises(QatkitError, match=r"the weight is bfloat16, in which torchao's products round differently"):
        check(model.bfloat16(), {"model.layers.0.mlp.up_proj": int8})
    with pytest.raises(QatkitError, match="supported only for transformers models, but the model is a Linear"):
        check(nn.Linear(4, 4), {"": int8})
