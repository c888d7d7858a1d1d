"""Students cut from teachers compute what the kept layers compute, and reload by plain transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from qatkit import QatkitError
from qatkit.distillation.students import student_from_teacher

SMALL: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "pad_token_id": 0,
    "initializer_range": 0.5,
}  # fmt: skip


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=6))


def gemma() -> Any:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = Gemma3TextConfig(
        **SMALL, num_hidden_layers=6, layer_types=kinds, head_dim=8, num_key_value_heads=1, sliding_window=2
    )
    return Gemma3ForCausalLM(config)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_head=2, n_layer=6, initializer_range=0.5))


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**SMALL, num_hidden_layers=6))


def distilbert() -> Any:
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=31, dim=16, hidden_dim=24, n_heads=2, n_layers=6, initializer_range=0.5)
    )


MODELS = {
    "llama": (llama, "model.layers"),
    "gemma": (gemma, "model.layers"),
    "gpt2": (gpt2, "transformer.h"),
    "bert": (bert, "bert.encoder.layer"),
    "distilbert": (distilbert, "distilbert.transformer.layer"),
}
TOKENS = torch.randint(1, 31, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_a_student_is_the_teacher_whose_other_layers_pass_their_input_on(name: str, tmp_path: Path) -> None:
    make, stack = MODELS[name]
    torch.manual_seed(0)
    teacher = make().eval()
    before = copy.deepcopy(teacher.state_dict())
    student = student_from_teacher(teacher, [1, 3, 5])
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before.items())
    found = student(TOKENS).logits
    assert not torch.allclose(found, teacher(TOKENS).logits)
    assert len(student.get_submodule(stack)) == 3
    student.save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification if "bert" in name else AutoModelForCausalLM
    loaded, notes = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert torch.equal(loaded.eval()(TOKENS).logits, found)
    skipped = teacher.get_submodule(stack)
    for number in (0, 2, 4):
        skipped[number].forward = _pass_on(skipped[number])
    torch.testing.assert_close(
        teacher(TOKENS, use_cache=False).logits if "bert" not in name else teacher(TOKENS).logits, found
    )


def _pass_on(layer: nn.Module) -> Any:
    original = layer.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if isinstance(original(hidden_states, *args, **kwargs), tuple) else hidden_states

    return forward


def test_layer_types_follow_their_layers() -> None:
    student = student_from_teacher(gemma(), 3, keep="last")
    assert student.config.num_hidden_layers == 3
    assert student.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_generation_uses_the_cache_of_the_layers_that_are_left() -> None:
    torch.manual_seed(0)
    student = student_from_teacher(llama().eval(), 3)
    whole = student.generate(TOKENS, max_new_tokens=4, do_sample=False)
    slow = student.generate(TOKENS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(whole, slow)


def test_ties_and_the_number_of_parameters_are_those_of_a_fresh_model() -> None:
    student = student_from_teacher(gpt2(), 2)
    assert student.lm_head.weight is student.transformer.wte.weight
    fresh = GPT2LMHeadModel(student.config)
    assert student.num_parameters() == fresh.num_parameters()


@pytest.mark.parametrize(
    ("make", "layers", "message"),
    [
        (llama, 7, "7 student layers cannot be mapped to 6 teacher layers"),
        (llama, [3, 1], r"layers: \[3, 1\] is not an ascending list of teacher layer indices; .* from 0 to 5"),
        (llama, [6], r"layers: \[6\] is not an ascending list of teacher layer indices"),
        (lambda: nn.Linear(2, 2), 1, "Linear has no config with num_hidden_layers"),
        (
            lambda: BartForConditionalGeneration(
                BartConfig(
                    vocab_size=31, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
                    encoder_attention_heads=2, decoder_attention_heads=2,
                )
            ),
            1,
            "has 2 lists of 2 layers",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_advice(make: Any, layers: Any, message: str) -> None:
    transformers.logging.set_verbosity_error()
    with pytest.raises(QatkitError, match=message):
        student_from_teacher(make(), layers)
