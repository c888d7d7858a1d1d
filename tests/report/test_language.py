"""Sliding windows count every token once; the distance to the dense model equals a float64 reference."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.common.labels import IGNORED
from qatkit.data.packing import window
from qatkit.data.text import END_OF_TEXT, train_tokenizer
from qatkit.pipeline.validation import validate_recipe
from qatkit.recipe.loading import load_recipe
from qatkit.report.language import check_harness, harness, score, texts_of, windows
from qatkit.tasks import evaluate
from tests.support.texts import VOCAB, tiny_llama

TEXT = torch.randint(VOCAB, (45,), generator=torch.Generator().manual_seed(0))


def perplexity_of_transformers(model: torch.nn.Module, tokens: Tensor, context: int, stride: int) -> float:
    """The loop from the transformers page on perplexity of fixed-length models, with an exact mean."""
    total = count = end_before = 0.0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        inputs = tokens[None, begin:end]
        labels = inputs.clone()
        labels[:, : -(end - int(end_before))] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(inputs, labels=labels).loss) * scored if scored else 0.0
        count += scored
        end_before = end
        if end == len(tokens):
            break
    return math.exp(total / count)


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (16, 5), (12, 12), (16, 1), (64, 32)])
def test_perplexity_is_that_of_the_loop_in_the_documentation_of_transformers(context: int, stride: int) -> None:
    model = tiny_llama().eval()
    found = score(model, None, [(TEXT, TEXT)], context, stride, batch_size=3)
    assert found.perplexity == pytest.approx(perplexity_of_transformers(model, TEXT, context, stride), rel=1e-5)
    assert (found.context, found.stride, found.agreement, found.kl) == (context, stride, 1.0, 0.0)


@pytest.mark.parametrize("length", [2, 15, 16, 17, 45])
@pytest.mark.parametrize(("context", "stride"), [(16, 8), (16, 7), (16, 16), (2, 1)])
def test_every_token_but_the_first_is_predicted_once(length: int, context: int, stride: int) -> None:
    predicted = [
        token for begin, end, new in windows(length, context, stride) for token in range(max(new, begin + 1), end)
    ]
    if stride < context:
        assert predicted == list(range(1, length))
    else:  # the first token of a window has nothing before it
        assert predicted == [token for token in range(1, length) if token % stride]


def test_agreement_and_kl_are_those_of_float64() -> None:
    dense, rounded = tiny_llama().eval(), tiny_llama().eval()
    prepare_qat(rounded, QuantSpec(2), exclude=["lm_head"])
    with torch.no_grad():  # a distance that float32 gives to four digits on every processor
        rounded.lm_head.weight.mul_(30)
    labels = TEXT.clone()
    labels[10:20] = IGNORED
    found = score(rounded, dense, [(TEXT[:16], labels[:16])], context=16, stride=8)
    with torch.no_grad():
        p, q = (model(TEXT[None, :16]).logits[0, :9].double().log_softmax(-1) for model in (dense, rounded))
    assert found.tokens == 9
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.kl > 0.05
    assert found.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.loss == pytest.approx(float(-q[range(9), TEXT[1:10]].mean()), rel=1e-5)


def test_windows_of_a_stream_are_one_text_and_padded_rows_are_texts_of_their_own() -> None:
    rows = TEXT[:40].view(5, 8)
    ((tokens, labels),) = texts_of([{"input_ids": part, "labels": part} for part in rows.split(2)])
    assert torch.equal(tokens, TEXT[:40])
    assert torch.equal(labels, TEXT[:40])
    mask = torch.ones_like(rows)
    mask[1, 5:] = 0
    padded = texts_of([{"input_ids": rows, "labels": rows, "attention_mask": mask}])
    assert [len(tokens) for tokens, _ in padded] == [8, 5, 8, 8, 8]
    with pytest.raises(QatkitError, match=r"evaluate: .* the task is classification"):
        texts_of([(torch.rand(2, 3), torch.zeros(2))])
    with pytest.raises(QatkitError, match=r"evaluate: .* the task is masked \(.*\); remove evaluate"):
        texts_of([{"input_ids": rows, "labels": rows, "task": "masked"}])


def test_documents_of_a_window_are_texts_of_their_own_so_that_none_sees_another() -> None:
    parts = [window(TEXT[:16].numpy(), np.array([5, 6])), window(TEXT[16:32].numpy(), np.array([], np.int64))]
    batch = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    assert [len(tokens) for tokens, _ in texts_of([batch])] == [5, 1, 10, 16]
    model = tiny_llama().eval()
    found = score(model, None, texts_of([batch]), context=16, stride=8)
    assert found.tokens == 28
    assert found.loss == pytest.approx(evaluate(model, [batch])["loss"], rel=1e-5)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(QatkitError, match=r"evaluate\.stride: 9 with context 8 is out of range"):
        score(tiny_llama(), None, [(TEXT, TEXT)], context=8, stride=9)
    nothing = torch.full_like(TEXT, IGNORED)
    with pytest.raises(QatkitError, match="all labels in the test split are -100, so no metric"):
        score(tiny_llama().eval(), None, [(TEXT, nothing)], context=16, stride=8)


def test_tasks_name_the_extra_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(QatkitError, match=r"evaluate\.tasks: .*pip install 'qatkit\[lm-eval\]'"):
        check_harness(["arc_easy"], [])
    recipe = load_recipe("llm/int4_qat_lora", ["evaluate={tasks: [arc_easy]}"])
    with pytest.raises(QatkitError, match=r"evaluate\.tasks: .*pip install 'qatkit\[lm-eval\]'"):
        validate_recipe(recipe)  # not after hours of training


QUESTIONS = [{"question": f"{a} + {b} =", "choices": [str(a + b), str(a - b), "no"]} for a in (3, 5, 7) for b in (1, 2)]
TASKS = {
    "sums": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "words": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}


def written_tasks(folder: Path) -> list[str]:
    """Two harness tasks in files, with their questions in a third file."""
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + task)
    return [str(folder / f"{name}.yaml") for name in TASKS]


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, tokens: list[int], known: int) -> float:
    """The log-likelihood of the tokens after the first `known` ones."""
    log_p = model(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)
    return sum(float(log_p[at - 1, tokens[at]]) for at in range(known, len(tokens)))


def test_tasks_of_the_harness_give_what_the_model_s_likelihoods_say(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = tiny_llama().eval()
    made = train_tokenizer([row["question"] for row in QUESTIONS], VOCAB)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT)
    found = harness(model, tokenizer, written_tasks(tmp_path))
    right = words = total = 0.0
    for row in QUESTIONS:
        question = tokenizer(row["question"])["input_ids"]
        answers = [tokenizer(f"{row['question']} {choice}")["input_ids"] for choice in row["choices"]]
        said = [log_likelihood(model, answer, len(question)) for answer in answers]
        right += said[0] == max(said)
        total += log_likelihood(model, [tokenizer.eos_token_id, *question], 1)
        words += len(row["question"].split())
    assert 0 < right < len(QUESTIONS)
    assert found == {
        "sums acc": pytest.approx(right / len(QUESTIONS)),
        "words word_perplexity": pytest.approx(math.exp(-total / words), rel=1e-3),
    }
