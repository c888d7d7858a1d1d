"""Models for classes, masked tokens and embeddings: loaded as asked, and refused where they do not fit the data."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from qatkit import QatkitError
from qatkit.data import Source, text_classification
from qatkit.hub import locate
from qatkit.models import causal_lm, embedding_model, masked_lm, sequence_classifier
from qatkit.run.compatibility import check_data
from tests.data.corpus import SENTENCES, save_tokenizer, write_lines
from tests.models.families import tiny
from tests.support.hub_server import hub


def saved(folder: Path, family: str, kind: str = "CausalLM", **config: Any) -> str:
    tiny(family, kind, **config).save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


def test_each_factory_gives_the_model_of_its_kind_also_without_memory(tmp_path: Path) -> None:
    bert, llama = saved(tmp_path / "bert", "bert", "MaskedLM"), saved(tmp_path / "llama", "llama")
    for device in ("cpu", "meta"):
        with torch.device(device):
            found = [
                masked_lm(bert),
                sequence_classifier(bert, 3),
                embedding_model(bert),
                sequence_classifier(llama, 2),
                embedding_model(llama, dtype="bfloat16", attn_implementation="eager", gradient_checkpointing=True),
            ]
        assert [type(model).__name__ for model in found] == [
            "BertForMaskedLM", "BertForSequenceClassification", "BertModel", "LlamaForSequenceClassification",
            "LlamaModel",
        ]  # fmt: skip
        assert next(found[4].parameters()).dtype == torch.bfloat16
        assert found[4].config._attn_implementation == "eager"  # type: ignore[union-attr]
        assert found[4].is_gradient_checkpointing


def test_a_model_trained_for_other_classes_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "bert", "SequenceClassification", num_labels=3)
    with pytest.raises(QatkitError, match=r"name_or_path: .* cannot be loaded as a sequence classifier"):
        sequence_classifier(folder, 5)
    with pytest.raises(QatkitError, match=r"num_classes: 1 is out of range; use 2 or more"):
        sequence_classifier(folder, 1)


@pytest.mark.parametrize("named", [None, 7])
def test_a_decoder_reads_the_class_off_the_end_of_a_text_however_a_batch_is_filled_up(
    named: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = saved(tmp_path / "model", "llama", vocab_size=301, eos_token_id=2, pad_token_id=named)
    tokenizer = save_tokenizer(tmp_path / "model", pad_token="<pad>")
    records = write_lines(tmp_path / "texts.jsonl", [{"text": t, "label": "ab"[len(t) % 2]} for t in SENTENCES])
    texts = text_classification(Source(str(records)), tokenizer, ["a", "b"], context=64, batch_size=8)
    batch = next(iter(texts.train_dataloader()))
    assert (batch["attention_mask"] == 0).any(dim=1).all()
    model = sequence_classifier(folder, 2).eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        alone = torch.cat([model(input_ids=row[mask][None]).logits for row, mask in rows])
    torch.testing.assert_close(logits, alone)
    check_data(model, texts)
    model.config.pad_token_id = 2  # type: ignore[union-attr]
    with pytest.raises(QatkitError, match=r"the data is padded with token 300, but the model, .*, expects token 2"):
        check_data(model, texts)


def data(**values: Any) -> Any:
    return SimpleNamespace(**{"batch_size": 4, **values})


def test_data_that_the_model_was_not_made_for_is_refused_before_training() -> None:
    model = tiny("gpt2")
    check_data(model, data(tokenizer=range(300), context=64))
    with pytest.raises(QatkitError, match=r"the tokenizer has 301 tokens, but the model's vocabulary has 300"):
        check_data(model, data(tokenizer=range(301)))
    with pytest.raises(QatkitError, match=r"data\.args\.context: 65 exceeds the model's 64 positions"):
        check_data(model, data(context=65))
    classifier = tiny("bert", "SequenceClassification", num_labels=3)
    with pytest.raises(QatkitError, match=r"data\.args\.classes: 2 classes do not match the 3 outputs"):
        check_data(classifier, data(classes=["a", "b"]))
    model.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    with pytest.raises(QatkitError, match=r"separates packed documents only with batch_size 1; use batch_size: 1"):
        check_data(model, data(packed=True))
    check_data(model, data(packed=True, batch_size=1))
    check_data(torch.nn.Linear(2, 2), data(tokenizer=range(301)))


def test_a_model_with_code_of_its_own_is_refused_without_a_question(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}'
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(QatkitError, match=r"cannot be loaded as a causal language model"):
        causal_lm(str(tmp_path))


def test_the_hub_is_asked_for_a_name_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "team" / "asked_once").mkdir(parents=True)
    (tmp_path / "models" / "team" / "asked_once" / "config.json").write_text("{}")
    wrong = "'team/none' is not a folder, and the request to the hub failed"
    with hub(tmp_path) as (address, requests):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for _ in range(3):
            assert locate("team/asked_once", "name_or_path", "a model", "config.json") == ("team/asked_once", False)
            with pytest.raises(QatkitError, match=wrong):
                locate("team/none", "name_or_path", "a model", "config.json")
    assert [len([line for line in requests if name in line]) for name in ("asked_once", "none")] == [1, 3]


def test_an_encoder_that_sees_later_tokens_is_no_causal_language_model(tmp_path: Path) -> None:
    said = r"name_or_path: '.*' is an encoder \(bert\), which also attends to later tokens.* or factory: .*masked_lm"
    folder = saved(tmp_path / "encoder", "bert", "MaskedLM")
    for device in ("cpu", "meta"):
        with torch.device(device), pytest.raises(QatkitError, match=said):
            causal_lm(folder)
    causal_lm(saved(tmp_path / "decoder", "bert", is_decoder=True))
    causal_lm(saved(tmp_path / "gpt2", "gpt2"))


def test_a_damaged_folder_is_named_with_what_is_wrong_in_it(tmp_path: Path) -> None:
    folder = Path(saved(tmp_path / "model", "llama"))
    config, weights = folder / "config.json", folder / "model.safetensors"
    plain, whole = json.loads(config.read_text()), weights.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not mapped from the file
    for content, problem in (
        ([], "no readable config.json .the file contains a list, not an object"),
        (plain | {"model_type": ["llama"]}, "has no model_type"),
        (plain | {"hidden_size": "x"}, "cannot be loaded as a causal language model .*hidden_size"),
        (plain | {"hidden_act": [1]}, "cannot be loaded as a causal language model"),
        (plain | {"num_hidden_layers": 3}, r"lack .* weights of a llama model, such as 'model\.layers\.2\."),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(QatkitError, match=f"name_or_path: .*{problem}"):
            causal_lm(str(folder))
    config.write_text("[" * 9999)
    with pytest.raises(QatkitError, match=r"no readable config\.json"):
        causal_lm(str(folder))
    config.write_text(json.dumps(plain))
    for damaged in (b"", whole[:99], whole[: len(whole) // 2], b"\xff" * 99):
        weights.write_bytes(damaged)
        with pytest.raises(QatkitError, match=r"name_or_path: '.*model' cannot be loaded as a causal language model"):
            causal_lm(str(folder))
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, weights, metadata={"format": "pt"})
    with pytest.raises(QatkitError, match=f"the weight '{name}' of '.*model' has non-finite values"):
        causal_lm(str(folder))


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (
            {"weight_map": {"a": "../outside.safetensors"}},
            r"refers to '\.\./outside\.safetensors', which is not a file in",
        ),
        ({"weight_map": {"a": "/outside.safetensors"}}, "refers to '/outside"),
        ({"weight_map": {"a": None}}, "is not a weight index"),
        ({"weight_map": []}, "is not a weight index"),
        ({}, "is not a weight index"),
        ([], "is not a weight index"),
    ],
)
def test_an_index_names_files_of_its_folder_only(index: Any, problem: str, tmp_path: Path) -> None:
    folder = Path(saved(tmp_path / "model", "llama"))
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(QatkitError, match=rf"name_or_path: .*model\.safetensors\.index\.json {problem}"):
        causal_lm(str(folder))
