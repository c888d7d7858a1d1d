"""Texts written while training: on time, the model's own, resumed, and without a trace in the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from qatkit.callbacks import QuantizationAwareTraining, TextSamples
from qatkit.callbacks.samples import _line, _rows
from transformers import AutoTokenizer

from qatkit import QatkitError, QuantSpec
from qatkit.pipeline.module import CompressionModule
from qatkit.recipe import StageConfig
from tests.callbacks.modules import Classifier, batches, trainer
from tests.data.corpus import save_tokenizer
from tests.models.families import tiny
from tests.support.texts import loader

PROMPTS = ["Ada counts the", "Alan"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def module() -> CompressionModule:
    """With dropout, so that every random number that is drawn in training tells."""
    model = tiny("gpt2", initializer_range=0.5, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    return CompressionModule(model, StageConfig(max_steps=6, lr=5e-2), seed=3)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What transformers writes for a prompt alone."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        found = model.eval().generate(
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
        )
    text: str = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_they_come_on_time_and_are_what_transformers_would_write(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "samples.jsonl"
    samples = TextSamples(3, PROMPTS, path, max_new_tokens=8, tokenizer=tokenizer)
    trainer(samples, accumulate_grad_batches=2, max_steps=6).fit(module(), loader(1))
    expected = []
    for step in (3, 6):
        trained = module()
        trainer(accumulate_grad_batches=2, max_steps=step).fit(trained, loader(1))
        texts = [greedy(trained.model, tokenizer, prompt, 8) for prompt in PROMPTS]
        expected += [{"step": step, "prompt": p, "text": text} for p, text in zip(PROMPTS, texts, strict=True)]
    assert rows(path) == expected


@pytest.mark.parametrize("quantized", [False, True])
def test_training_ends_with_the_same_bits_as_without(quantized: bool, tmp_path: Path, tokenizer: Any) -> None:
    ended = []
    for samples in ([], [TextSamples(2, PROMPTS, tmp_path / "samples.jsonl", 8, tokenizer)]):
        qat = [QuantizationAwareTraining(QuantSpec(4, observer="lsq"), exclude=["*.lm_head"])] if quantized else []
        trained = module()
        trainer(*qat, *samples, max_steps=6).fit(trained, loader(2))
        assert all(part.training for part in trained.model.modules())
        ended.append({name: value.clone() for name, value in trained.state_dict().items()})
    assert len(rows(tmp_path / "samples.jsonl")) == 6
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "samples.jsonl"

    def samples() -> TextSamples:
        return TextSamples(2, PROMPTS[:1], path, 8, tokenizer)

    kept = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=4)
    trainer(samples(), kept, enable_checkpointing=True, max_steps=6).fit(module(), loader(2))
    path.write_text(path.read_text() + '{"step": 8, "pro')  # a killed process may leave half a line
    trainer(samples(), max_steps=8).fit(module(), loader(2), ckpt_path=tmp_path / "last.ckpt")
    assert [row["step"] for row in rows(path)] == [2, 4, 6, 8]


def test_tensorboard_shows_them(tmp_path: Path, tokenizer: Any) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoardLogger(tmp_path)
    trainer(TextSamples(3, PROMPTS, tmp_path / "s.jsonl", 4, tokenizer), logger=board).fit(module(), loader(2))
    found = events.EventAccumulator(board.log_dir)
    found.Reload()
    assert {f"samples/{index}/text_summary" for index in (0, 1)} <= set(found.Tags()["tensors"])


def test_what_cannot_write_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "samples.jsonl"
    with pytest.raises(QatkitError, match="prompts: the data has no tokenizer"):
        trainer(TextSamples(1, PROMPTS, path)).fit(module(), loader(2))
    with pytest.raises(QatkitError, match="prompts: Classifier cannot generate text"):
        trainer(TextSamples(1, PROMPTS, path, tokenizer=tokenizer)).fit(Classifier(), batches())
    with pytest.raises(QatkitError, match=r"prompts: .* add up to \d+ tokens, but the model has only 64 positions"):
        trainer(TextSamples(1, PROMPTS, path, 60, tokenizer)).fit(module(), loader(2))
    with pytest.raises(QatkitError, match=r"prompts: 'Ada' is not a list; use \['Ada'\]"):
        TextSamples(1, "Ada", path)
    assert not path.exists()


def test_a_text_with_other_line_ends_is_one_sample_and_a_line_that_is_no_sample_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    row = {"step": 1, "prompt": "a", "text": "b\u2028c\u0085d"}
    path.write_text(_line(row) + _line(row) + '{"step": 2, "pro')
    assert _rows(path) == [row, row]
    for line in ("[1]", "null", '{"step": true}', "{}"):
        path.write_text(line + "\n")
        with pytest.raises(
            QatkitError, match=r"samples\.jsonl contains a line that is not a sample .*; delete the line"
        ):
            _rows(path)
