"""Generated texts: their labels, the distribution they are sampled from, and the state that is restored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from qatkit import QatkitError
from qatkit.distillation.generation import cut_prompts, generated_batch
from tests.support.texts import VOCAB, tiny_llama

WORDS = torch.tensor([[11, 12, 13, 14], [0, 0, 21, 22], [31, 32, 0, 0]])
PRESENT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])


def test_prompts_are_the_first_tokens_of_every_text_wherever_it_is_padded() -> None:
    prompts, mask = cut_prompts({"input_ids": WORDS, "attention_mask": PRESENT}, 3)
    assert prompts.tolist() == [[11, 12, 13], [0, 21, 22], [0, 31, 32]]
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]


def test_prompts_end_where_the_labels_begin() -> None:
    labels = torch.tensor([[-100, -100, -100, 14], [-100, -100, -100, 22], [-100, 32, -100, -100]])
    prompts, mask = cut_prompts({"input_ids": WORDS, "attention_mask": PRESENT, "labels": labels}, None)
    assert prompts.tolist() == [[11, 12, 13], [0, 0, 21], [0, 0, 31]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [
        ({"pixels": WORDS}, 2, r"prompt: a batch contains \['pixels'\], but no 'input_ids'"),
        ([WORDS, WORDS], 2, "prompt: a batch contains list, but no"),
        (
            {"input_ids": WORDS, "position_ids": WORDS},
            2,
            r"contains \['position_ids'\], which generated text does not have",
        ),
        ({"input_ids": WORDS}, None, r"no 'labels'.*set a prompt length, such as prompt: 32"),
        ({"input_ids": WORDS, "labels": WORDS}, None, r"no tokens before its first label.*prompt: 32"),
        (
            {"input_ids": WORDS, "attention_mask": torch.zeros_like(WORDS)},
            2,
            "a sample in a batch is empty; remove empty samples",
        ),
    ],
)
def test_batches_without_prompts_are_refused(batch: object, length: int | None, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        cut_prompts(batch, length)  # type: ignore[arg-type]  # what data of users may be


class Scripted(GPT2LMHeadModel):
    """Generates a given list of tokens per row, whatever its input."""

    script: Tensor
    asked = 0

    def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]  # a stand-in
        result = super().forward(*args, **kwargs)  # type: ignore[arg-type]  # handed on
        result.logits[:, -1] = 100.0 * nn.functional.one_hot(self.script[:, self.asked], VOCAB)
        self.asked += 1
        return result


def test_nothing_after_the_end_of_a_text_counts() -> None:
    model = Scripted(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1, n_positions=32))
    model.script = torch.tensor([[50, 7, 60, 61], [7, 62, 63, 64], [51, 52, 53, 54]])  # 7 ends a text
    prompts, mask = cut_prompts({"input_ids": WORDS, "attention_mask": PRESENT}, 3)
    batch = generated_batch(model, prompts, mask, 4, 1.0, eos=[7], seed=0)
    assert batch["input_ids"].tolist() == [
        [11, 12, 13, 50, 7, 7, 7],  # padded with the end of text, as generate pads
        [21, 22, 7, 7, 7, 7, 7],
        [31, 32, 51, 52, 53, 54, 7],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] * 3 + [0] * 4, [1] * 6 + [0]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 50, 7, -100, -100],
        [-100, -100, 7, -100, -100, -100, -100],
        [-100, -100, 51, 52, 53, 54, -100],
    ]


def test_tokens_are_drawn_from_the_whole_distribution_of_the_model_in_eval_mode() -> None:
    """Of many texts from one prompt, the first tokens are as frequent as the softmax says."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8, embd_pdrop=0.9))
    nn.init.normal_(model.lm_head.weight, std=0.4)
    model.train()
    model.generation_config.top_k, model.generation_config.repetition_penalty = 2, 5.0  # as chat models ship
    settings = model.generation_config
    prompt = torch.tensor([[3, 4]]).expand(8000, -1)
    batch = generated_batch(model, prompt, torch.ones_like(prompt), 1, 1.5, eos=[], seed=5)
    frequency = torch.bincount(batch["labels"][:, -1], minlength=40) / 8000
    assert model.training
    assert model.generation_config is settings
    with torch.no_grad():
        expected = (model.eval()(prompt[:1]).logits[0, -1] / 1.5).softmax(dim=0)
    assert (expected > 0.01).sum() > 10, "a distribution that a top_k would change"
    assert (frequency - expected).abs().max() < 5 * float((expected * (1 - expected) / 8000).sqrt().max())


def test_the_seed_alone_decides_and_the_generator_of_training_is_left_alone() -> None:
    model = tiny_llama()
    prompts = torch.arange(8).view(4, 2)
    state = torch.get_rng_state()
    first, again, other = (
        generated_batch(model, prompts, torch.ones_like(prompts), 6, 1.0, eos=[], seed=seed)["input_ids"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_greedy_text_of_a_short_prompt_is_the_same_beside_longer_ones() -> None:
    """Left padding and the positions of the batch to train on: absolute positions would show a mistake."""
    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    prompts, mask = cut_prompts({"input_ids": WORDS, "attention_mask": PRESENT}, 4)
    together = generated_batch(model, prompts, mask, 5, 0.0, eos=[], seed=0)
    alone = generated_batch(model, WORDS[1:2, 2:], torch.ones(1, 2, dtype=torch.long), 5, 0.0, eos=[], seed=0)
    assert torch.equal(together["input_ids"][1, :7], alone["input_ids"][0])
    # read again without caches and position numbers, the model still finds each token the most probable one
    with torch.no_grad():
        logits = model(input_ids=together["input_ids"], attention_mask=together["attention_mask"]).logits
    counted = together["labels"][:, 1:] != -100
    assert torch.equal(logits[:, :-1].argmax(dim=-1)[counted], together["labels"][:, 1:][counted])
