"""Classes, masked tokens and pairs: batches that their models learn from, scored as other libraries score them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from qatkit import QatkitError
from qatkit.common.labels import IGNORED
from qatkit.data import Source, masked_text, text_classification, text_pairs
from qatkit.tasks import answers, call, evaluate, token_loss
from tests.data.corpus import SENTENCES, save_tokenizer, write_lines
from tests.models.families import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return save_tokenizer(tmp_path / "tokenizer", mask_token="<mask>", pad_token="<pad>")


def source(path: Path, records: list[object]) -> Source:
    return Source(str(write_lines(path / "records.jsonl", records)), val_fraction=0.2, test_fraction=0.2)


def test_a_classifier_of_transformers_has_the_loss_and_sklearn_the_scores(tmp_path: Path, tokenizer: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    records = [{"text": text, "label": ("a", 1, "2")[len(text) % 3]} for text in SENTENCES]
    data = text_classification(source(tmp_path, records), tokenizer, ["a", "b", "c", "never"], context=48, batch_size=8)
    model = tiny("bert", "SequenceClassification", num_labels=4, vocab_size=302).eval()
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        loss, count = token_loss(*answers(call(model, batch), batch))
        assert float(loss) == pytest.approx(float(model(**batch).loss), rel=1e-6)
    assert int(count) == 8
    found = evaluate(model, data.test_dataloader())
    labels, answered = [], []
    with torch.no_grad():
        for batch in data.test_dataloader():
            labels += batch["labels"].tolist()
            answered += call(model, batch).argmax(-1).tolist()
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, answered))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, answered, average="macro"))


def test_a_record_of_no_class_and_classes_that_are_none_are_named(tmp_path: Path, tokenizer: str) -> None:
    records = [{"text": text, "label": "a"} for text in SENTENCES]
    made = source(tmp_path, [*records, {"text": "x", "label": "z"}])
    with pytest.raises(QatkitError, match=r"records\.jsonl:81: label \"z\" is neither one of \['a', 'b'\]"):
        text_classification(made, tokenizer, ["a", "b"]).prepare_data()
    with pytest.raises(QatkitError, match=r"classes: \['a', 'a'\] is not a list of two or more different names"):
        text_classification(made, tokenizer, ["a", "a"])
    with pytest.raises(QatkitError, match=r"records\.jsonl:1: has \d+ tokens, but context is 4; use a larger"):
        text_classification(source(tmp_path, records), tokenizer, ["a", "b"], context=4, truncate=False).prepare_data()


def test_a_blank_text_is_passed_over_where_it_stands_alone_and_named_where_it_has_a_class_or_partner(
    tmp_path: Path, tokenizer: str
) -> None:
    full = [{"text": text, "partner": text, "label": "a"} for text in SENTENCES]
    made = source(tmp_path, [*full, {"text": " ", "partner": "b", "label": "a"}])
    data = masked_text(made, tokenizer)
    assert sum(len(split) for split in (data.train, data.val, data.test)) == len(full)  # type: ignore[arg-type]
    for labelled in (text_classification(made, tokenizer, ["a", "b"]), text_pairs(made, tokenizer)):
        with pytest.raises(QatkitError, match=r"records\.jsonl:81: column 'text' is empty"):
            labelled.prepare_data()


def test_hidden_tokens_are_a_share_of_all_and_transformers_has_the_same_loss(tmp_path: Path, tokenizer: str) -> None:
    data = masked_text(
        source(tmp_path, [{"text": t} for t in SENTENCES]), tokenizer, 32, probability=0.3, batch_size=16
    )
    model = tiny("bert", "MaskedLM", vocab_size=302).eval()
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        loss, _ = token_loss(*answers(call(model, batch), batch))
        plain = {name: value for name, value in batch.items() if name != "task"}
        assert float(loss) == pytest.approx(float(model(**plain).loss), rel=1e-5)
        found = evaluate(model, [batch])
    assert found["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
    chosen, present = batch["labels"] != IGNORED, batch["attention_mask"].bool()
    assert float(chosen[present].float().mean()) == pytest.approx(0.3, abs=0.06)
    assert not chosen[~present].any()
    mask = data.tokenizer.mask_token_id
    assert float((batch["input_ids"] == mask)[chosen].float().mean()) == pytest.approx(0.8, abs=0.15)
    untouched = batch["input_ids"][present & ~chosen]
    assert mask not in untouched


def test_a_pass_over_training_texts_hides_other_tokens_and_evaluation_always_the_same(
    tmp_path: Path, tokenizer: str
) -> None:
    data = masked_text(source(tmp_path, [{"text": t} for t in SENTENCES]), tokenizer, 32, batch_size=16)
    first, again, later = ([], [], [])
    for found, number in ((first, 0), (again, 0), (later, 1)):
        data.train.set_pass(number)  # type: ignore[attr-defined]
        data.test.set_pass(number)  # type: ignore[attr-defined]
        found += [[split[row]["labels"].tolist() for row in range(8)] for split in (data.train, data.test)]
    assert first == again
    assert later[0] != first[0]
    assert later[1] == first[1]
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)  # type: ignore[attr-defined]
    assert data.train._pass == 2 // loader.sampler.slices  # type: ignore[attr-defined]


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    plain = save_tokenizer(tmp_path / "plain")
    with pytest.raises(QatkitError, match=r"has no mask token; use a masked language model's tokenizer"):
        masked_text(source(tmp_path, [{"text": t} for t in SENTENCES]), plain).prepare_data()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_loss_of_pairs_is_infonce_over_embeddings_made_text_by_text(
    pooling: str, tmp_path: Path, tokenizer: str
) -> None:
    records = [{"text": text, "partner": text[:9] * (1 + len(text) % 3)} for text in SENTENCES]
    data = text_pairs(source(tmp_path, records), tokenizer, 48, pooling=pooling, batch_size=5)  # type: ignore[arg-type]
    model = tiny("bert", "", vocab_size=302).eval()
    batch = next(iter(data.train_dataloader()))
    embeddings = []
    with torch.no_grad():
        loss, _ = token_loss(*answers(call(model, batch), batch))
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            hidden = model(input_ids=ids[mask.bool()][None]).last_hidden_state[0].double()
            embeddings.append({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling])
    similar = F.cosine_similarity(torch.stack(embeddings[:5])[:, None], torch.stack(embeddings[5:])[None], dim=-1)
    expected = -torch.diag(torch.log_softmax(similar / 0.05, dim=1)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert set(evaluate(model, [batch])) == {"loss", "accuracy"}
