"""The table of divergences: its rows agree with each other, and a new row works everywhere without other changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qatkit import QatkitError, QatkitWarning
from qatkit.common.tables import implementation
from qatkit.distillation import chunked_op
from qatkit.distillation.chunked import linear_kd_loss
from qatkit.distillation.divergences import DIVERGENCES, HIDDEN_LOSSES, Divergence
from qatkit.distillation.losses import masked_mean
from qatkit.distillation.sparse import top_k_log_probabilities
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.distillation.tensors import LABELS, logits

RECIPE = """\
name: l1
seed: 3
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu, devices: 1}
stages:
  dense: {max_steps: 2, batch_size: 16}
  qat:
    max_steps: 2
    batch_size: 16
    distill: {loss: l1, alpha: 0.9}
    quantize: {weight: {num_bits: 4}}
"""
calls: list[torch.Size] = []


def l1_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    calls.append(student.shape)
    return masked_mean((student - teacher).abs().mean(dim=-1), mask)


def l1_rows(s: Tensor, t: Tensor, scratch: list[Tensor], beta: float) -> Tensor:
    """The mean of absolute differences of centred logits, which the reference below centres as well."""
    difference = s - t
    value = difference.abs().mean(dim=1, keepdim=True)
    t.copy_(difference.sign() / t.shape[1])
    return value


@pytest.fixture
def l1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    row = Divergence(
        "l1", "mean absolute difference", f"{__name__}:l1_loss", compares_classes=False, uses_temperature=False
    )
    monkeypatch.setitem(DIVERGENCES._rows, "l1", row)
    calls.clear()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_row_names_functions_that_exist(name: str) -> None:
    row = DIVERGENCES[name]
    for function in (row.on_logits, row.on_top_k, row.rows, row.top_k_rows):
        assert not function or callable(implementation(function))
    assert not row.top_k_rows or row.on_top_k, "a fused form needs the one that it stands for"
    assert not row.triton or row.rows, "the fast path needs its reference"


def test_the_triton_kernel_implements_the_rows_that_say_so() -> None:
    pytest.importorskip("triton")
    from qatkit.kernels.kd_rows_triton import KINDS

    assert [name for name, row in DIVERGENCES.items() if row.triton] == list(KINDS)


def test_a_row_passes_only_the_options_that_its_function_takes() -> None:
    student, teacher = logits(1), logits(2)
    assert DIVERGENCES["mse"].loss(student, teacher, temperature=3.0, beta=0.1) == DIVERGENCES["mse"].loss(
        student, teacher
    )
    jsd = DIVERGENCES["jsd"].loss(student, teacher, temperature=3.0, beta=0.1)
    assert jsd != DIVERGENCES["jsd"].loss(student, teacher, temperature=3.0, beta=0.2)
    top_k = top_k_log_probabilities(teacher, 30, 2.0)
    full = DIVERGENCES["kl"].loss(student, teacher, LABELS != -100, temperature=2.0)
    assert DIVERGENCES["kl"].top_k_loss(student, top_k, LABELS != -100, temperature=2.0) == pytest.approx(
        full.item(), rel=1e-2
    )


def test_a_new_divergence_is_validated_and_trained_through_its_row_alone(l1: Path) -> None:
    recipe = load_recipe(l1 / "recipe.yaml")
    assert validate_recipe(recipe)["qat"]
    assert run_stages(Run(recipe, l1 / "run")) == ["dense", "qat"]
    assert calls == [(16, 10)] * 2


def test_a_divergence_without_a_form_for_top_k_classes_refuses_a_cache(l1: Path) -> None:
    with pytest.raises(
        QatkitError, match=r"distill\.loss: 'l1' needs full teacher outputs.*use kl, or remove the cache"
    ):
        load_recipe(l1 / "recipe.yaml", ["stages.qat.distill.cache={top_k: 4}"])


def test_a_divergence_without_a_row_kernel_refuses_to_be_fused(l1: Path) -> None:
    hidden, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(QatkitError, match="kind: 'l1' has no row kernel; compute it from full logits"):
        linear_kd_loss(hidden, weight, hidden, weight, alpha=1.0, kind="l1")


def test_a_divergence_with_a_row_kernel_is_fused_through_its_row(l1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIVERGENCES._rows, "l1", replace(DIVERGENCES["l1"], rows=f"{__name__}:l1_rows"))
    monkeypatch.setitem(chunked_op.CACHED, "cpu", 8)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, other, theirs = (torch.randn(shape, generator=generator) for shape in ((5, 3), (4, 3)) * 2)
    hidden.requires_grad_()
    loss = linear_kd_loss(hidden, weight, other, theirs, alpha=1.0, kind="l1")
    student, teacher = hidden @ weight.T, other @ theirs.T
    expected = l1_loss(student - student.detach().amax(1, keepdim=True), teacher - teacher.amax(1, keepdim=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (found,), (true,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(found, true)


def test_an_option_that_the_divergence_does_not_use_is_warned_about(l1: Path) -> None:
    recipe = load_recipe(l1 / "recipe.yaml", ["stages.qat.distill.temperature=4"])
    with pytest.warns(QatkitWarning, match=r"distill\.temperature: 4\.0 has no effect with loss 'l1'; remove the key"):
        validate_recipe(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.qat.distill.loss=reverse_lk", "distill.loss: unknown distillation loss 'reverse_lk'; did you mean"),
        (
            "stages.qat.distill.hidden={layers: {a: b}, loss: cos}",
            "distill.hidden.loss: unknown hidden-state loss 'cos'; did you mean 'cosine'",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(override: str, message: str, l1: Path) -> None:
    assert set(HIDDEN_LOSSES) == {"mse", "cosine"}
    with pytest.raises(QatkitError, match=message):
        load_recipe(l1 / "recipe.yaml", [override])


def test_the_docs_list_every_divergence_as_the_table_does() -> None:
    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
    yes = {True: "yes", False: "no"}
    rows = [
        f"| `{name}` | {row.description.replace('||', chr(92) + '|' + chr(92) + '|')} | {yes[row.uses_temperature]} | "
        f"{yes[bool(row.rows)]} | {yes[bool(row.on_top_k)]} |"
        for name, row in DIVERGENCES.items()
    ]
    assert "\n".join(rows) in page
