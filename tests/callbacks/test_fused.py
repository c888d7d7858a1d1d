"""Distillation of causal language models without their logits trains what distillation over logits trains."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from qatkit.callbacks import CompressionMonitor, HiddenMatch, KnowledgeDistillation, QuantizationAwareTraining
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qatkit import QatkitError, QuantSpec
from qatkit.distillation.cache import CachedTeacher, cache_teacher
from qatkit.distillation.teacher import Teacher
from tests.callbacks.modules import Classifier, trainer
from tests.support.texts import loader as texts_loader
from tests.support.texts import texts

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def llama(seed: int, vocabulary: int = 300, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.5, **(shape | config)))


class LanguageModel(Classifier):
    """As users train a transformers model."""

    logits: list[Any]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        output = self.net(**batch)
        self.logits = [*getattr(self, "logits", []), output.logits]
        return output.loss + 0.1 * self.net.get_input_embeddings().weight.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batch() -> dict[str, Tensor]:
    content = texts()
    present = torch.ones_like(content["labels"])
    present[::2, :3] = 0  # padding on the left: the first token after it is predicted from padding
    content["labels"][::2, :3] = -100
    return content | {"attention_mask": present}


def loader() -> DataLoader[Any]:
    return texts_loader(4, content=batch())


def trained(
    student: nn.Module, teacher: Any, fused: bool, *callbacks: Any, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float], LanguageModel]:
    """Weights after three steps, what was logged, and the module."""
    module = LanguageModel(copy.deepcopy(student))
    distil = KnowledgeDistillation(teacher, student="net", fused=fused, **options)
    fit = trainer(*callbacks, distil, max_steps=3)
    fit.fit(module, loader())
    metrics = {name: float(value) for name, value in fit.callback_metrics.items()}
    return {name: value.detach() for name, value in module.state_dict().items()}, metrics, module


def assert_equal_training(student: nn.Module, teacher: Any, *callbacks: Any, **options: Any) -> LanguageModel:
    start = student.state_dict()
    whole, whole_metrics, _ = trained(student, teacher, False, *copy.deepcopy(callbacks), **options)
    ours, metrics, module = trained(student, teacher, True, *callbacks, **options)
    for name, value in whole.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=2e-6)
    assert any(not torch.equal(whole[f"net.{name}"], value) for name, value in start.items() if f"net.{name}" in whole)
    assert metrics.keys() == whole_metrics.keys()
    for name, value in whole_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    return module


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_without_logits_the_same_is_trained_and_logged(loss: Any, alpha: float) -> None:
    module = assert_equal_training(llama(1), llama(2), loss=loss, alpha=alpha, temperature=2.0, beta=0.3, ramp=0.5)
    assert module.logits == [None] * 3


def test_another_family_with_tied_embeddings_is_distilled_alike() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, **dict.fromkeys(DROPOUTS, 0.0))
    assert assert_equal_training(GPT2LMHeadModel(config), llama(2)).logits == [None] * 3


def test_a_masked_language_model_keeps_its_logits_as_its_labels_are_no_next_tokens() -> None:
    def bert(seed: int) -> BertForMaskedLM:
        torch.manual_seed(seed)
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return BertForMaskedLM(BertConfig(vocab_size=300, initializer_range=0.5, **shape, **dropouts))

    assert None not in assert_equal_training(bert(1), bert(2)).logits


def test_hidden_states_are_compared_beside_it_and_the_monitor_counts_the_same_agreement() -> None:
    hidden = HiddenMatch({"model.layers.0": "model.layers.1"})
    module = assert_equal_training(llama(1), llama(2), CompressionMonitor(every=3), hidden=hidden)
    assert module.logits == [None] * 3


@pytest.mark.parametrize(("student", "teacher"), [(300, 310), (310, 320), (320, 310)])
def test_padded_vocabularies_are_trimmed_in_the_divergence_alone(student: int, teacher: int) -> None:
    module = assert_equal_training(llama(1, student), llama(2, teacher), vocab_size=300)
    assert module.logits == [None] * 3


def test_a_teacher_of_another_dtype_stays_in_it() -> None:
    teacher = Teacher(llama(2), dtype=torch.bfloat16)
    _, metrics, module = trained(llama(1), teacher, True)
    _, expected, _ = trained(llama(1), llama(2), True)
    assert {weight.dtype for weight in teacher.model.parameters()} == {torch.bfloat16}
    assert metrics["train/kd_loss"] == pytest.approx(expected["train/kd_loss"], rel=5e-2)
    assert metrics["train/kd_loss"] != expected["train/kd_loss"]
    assert module.logits == [None] * 3


class Capped(LlamaForCausalLM):
    """Logits that are not what the output layer returns, as Gemma's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        output = super().forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        if labels is not None:
            output.loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=300)
        return output


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("quantized", "the student's logits are not the output of a plain linear layer"),
        ("capped student", "the student's logits are not the output of a plain linear layer"),
        ("capped teacher", "the teacher's logits are not the output of a plain linear layer"),
        ("mse", "loss 'mse' has no fused kernel"),
        ("outputs", "outputs ['logits'] are compared"),
    ],
)
def test_logits_are_materialized_where_they_are_needed_and_a_line_says_why(
    case: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = llama(1), llama(2)
    if case == "capped student":
        student = Capped(student.config)
    if case == "capped teacher":
        teacher = Capped(teacher.config)
    callbacks = [QuantizationAwareTraining(QuantSpec(8), include=["net.lm_head"])] if case == "quantized" else []
    options: dict[str, Any] = {"mse": {"loss": "mse"}, "outputs": {"outputs": ["logits"]}}.get(case, {})
    with caplog.at_level(logging.INFO, "qatkit.callbacks.distillation"):
        module = assert_equal_training(student, teacher, *callbacks, **options)
    assert [logits.shape for logits in module.logits] == [(4, 12, 300)] * 3
    assert message in caplog.text


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (lambda step: step() + step(), "called the student 2 times.*use fused=False"),
        (lambda step: 2 * step(), r"multiplies the student's loss, .* by 2\.0.*use fused=False"),
    ],
)
def test_a_step_that_does_more_than_take_the_loss_is_refused(times: Any, message: str) -> None:
    class Otherwise(LanguageModel):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return times(lambda: super(Otherwise, self).training_step(batch, batch_idx))

    with pytest.raises(QatkitError, match=message):
        trainer(KnowledgeDistillation(llama(2), student="net", fused=True)).fit(Otherwise(llama(1)), loader())


def test_after_an_error_the_output_layer_makes_logits_again() -> None:
    class Broken(LanguageModel):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return self.net(**batch, position_ids="nonsense").loss

    module = Broken(llama(1))
    with pytest.raises((TypeError, AttributeError)):
        trainer(KnowledgeDistillation(llama(2), student="net", fused=True)).fit(module, loader())
    assert "forward" not in module.net.lm_head.__dict__
    assert module.net(batch()["input_ids"]).logits.shape == (8, 12, 300)


@pytest.mark.parametrize("fused", [True, False])
def test_from_a_cache_the_same_is_trained_as_from_the_live_teacher(fused: bool, tmp_path: Path) -> None:
    teacher, rows = llama(2).eval(), batch()
    parts = [{key: value[part] for key, value in rows.items()} for part in (slice(0, 3), slice(3, 8))]

    def answer(part: Any) -> Tensor:
        logits: Tensor = teacher(**{key: value for key, value in part.items() if key != "labels"}).logits
        return logits

    cache_teacher(answer, parts, tmp_path, {}, k=299, temperature=2.0)
    options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.7}
    live, live_metrics, _ = trained(llama(1), teacher, fused, **options)
    cached, metrics, module = trained(llama(1), CachedTeacher(tmp_path, {}), fused, **options)
    assert (module.logits == [None] * 3) == fused
    for name, value in live.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-2, atol=1e-4)  # half precision
    for name, value in live_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=2e-3), name
