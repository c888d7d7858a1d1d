"""The fused loss against plain torch over full logits, and against Liger Kernel."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qatkit import QatkitError
from qatkit.distillation import chunked_op
from qatkit.distillation.chunked import linear_kd_loss
from qatkit.distillation.losses import jsd_loss, kd_loss, reverse_kl_loss
from tests.distillation import tensors
from tests.distillation.references import REFERENCES

POSITIONS, CLASSES, WIDTH, TEACHER_WIDTH = 50, 301, 16, 12
DIVERGENCES: dict[str, Callable[..., Tensor]] = {"kl": kd_loss, "reverse_kl": reverse_kl_loss, "jsd": jsd_loss}


def example(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    labels = torch.arange(POSITIONS) * 7 % CLASSES
    labels[::5] = -100
    return {
        "student_hidden": tensors.sines(1, POSITIONS, WIDTH, scale=2).to(dtype).requires_grad_(),
        "student_weight": tensors.sines(2, CLASSES, WIDTH).to(dtype).requires_grad_(),
        "teacher_hidden": tensors.sines(3, POSITIONS, TEACHER_WIDTH, scale=2).to(dtype),
        "teacher_weight": tensors.sines(4, CLASSES, TEACHER_WIDTH).to(dtype),
        "labels": labels,
        "student_bias": tensors.sines(5, CLASSES).to(dtype).requires_grad_(),
        "teacher_bias": tensors.sines(6, CLASSES).to(dtype),
        "mask": torch.arange(POSITIONS) % 7 != 0,
    }


def plain(parts: dict[str, Tensor], temperature: float, alpha: float, kind: str) -> Tensor:
    """The same over full logits, with the losses that have their own tests."""
    student = F.linear(parts["student_hidden"], parts["student_weight"], parts.get("student_bias"))
    teacher = F.linear(parts["teacher_hidden"], parts["teacher_weight"], parts.get("teacher_bias"))
    mask = parts.get("mask", torch.ones(len(student), dtype=torch.bool))
    divergence = DIVERGENCES[kind](student, teacher, temperature, mask=mask, labels=parts["labels"])
    labels = torch.where(mask, parts["labels"], -100)
    return alpha * divergence + (1 - alpha) * F.cross_entropy(student, labels)


def gradients(loss: Tensor, parts: dict[str, Tensor]) -> list[Tensor]:
    wanted = [part for part in parts.values() if part.requires_grad]
    return list(torch.autograd.grad(3 * loss, wanted))  # not 1: the backward pass has to scale


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_loss_and_gradients_are_those_of_plain_torch_for_any_cut_into_rows(
    kind: Any, temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked_op.WORKSPACE, "cpu", rows * 2 * CLASSES * 4)
    monkeypatch.setitem(chunked_op.CACHED, "cpu", 3 * CLASSES)
    parts = example()
    loss, expected = (
        linear_kd_loss(**parts, temperature=temperature, alpha=0.7, kind=kind),
        plain(parts, temperature, 0.7, kind),
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_equal(gradients(loss, parts), gradients(expected, parts), 1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_in_float64_it_is_the_formula_to_twelve_digits(kind: Any) -> None:
    parts, beta, temperature = example(torch.float64), 0.3, 2.0
    logits = F.linear(parts["student_hidden"], parts["student_weight"], parts["student_bias"])
    q = (logits / temperature).softmax(-1)
    p = F.linear(parts["teacher_hidden"], parts["teacher_weight"], parts["teacher_bias"]).div(temperature).softmax(-1)
    m = beta * p + (1 - beta) * q
    divergence = {
        "kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": beta * p * (p / m).log() + (1 - beta) * q * (q / m).log(),
    }[kind].sum(-1)
    counted = parts["mask"] & (parts["labels"] != -100)
    hard = -logits.log_softmax(-1).gather(1, parts["labels"].clamp(min=0)[:, None])[:, 0]
    expected = (0.7 * temperature**2 * divergence + 0.3 * hard)[counted].mean()
    loss = linear_kd_loss(**parts, temperature=temperature, alpha=0.7, kind=kind, beta=beta)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_equal(gradients(loss, parts), gradients(expected, parts), 1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_are_those_of_liger_kernel(beta: float, temperature: float) -> None:
    hidden, weight = tensors.hidden(1).requires_grad_(), tensors.weight(1).requires_grad_()
    kind: Any = {0.0: "kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    labels = tensors.LABELS.flatten()
    share = beta if kind == "jsd" else 0.5
    loss = linear_kd_loss(hidden, weight, tensors.hidden(2), tensors.weight(2), labels, temperature, 0.7, kind, share)
    loss.backward()
    key = f"liger beta={beta} T={temperature}"
    assert loss.item() == pytest.approx(REFERENCES[key], rel=1e-5)
    for name, part in (("hidden", hidden), ("weight", weight)):
        assert part.grad is not None
        assert part.grad.double().norm().item() == pytest.approx(REFERENCES[f"{key} |{name}.grad|"], rel=1e-5)


def test_the_full_matrix_of_logits_is_never_materialized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked_op.WORKSPACE, "cpu", 4 << 20)
    positions, classes = 4096, 16384
    hidden = torch.randn(positions, 4, requires_grad=True)
    weight = torch.randn(classes, 4, requires_grad=True)
    labels = torch.zeros(positions, dtype=torch.long)
    linear_kd_loss(hidden[:8], weight, hidden[:8].detach(), weight.detach(), labels[:8]).backward()  # loads the library

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1000 * int(next(line.split()[1] for line in lines if line.startswith(key)))

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    linear_kd_loss(hidden, weight, hidden.detach(), weight.detach(), labels).backward()
    assert status("VmHWM") - before < positions * classes * 4 / 8


def test_inputs_that_need_no_gradient_get_none() -> None:
    parts = example()
    parts["student_weight"].requires_grad_(False)
    loss = linear_kd_loss(**parts, temperature=2.0)
    loss.backward()
    assert parts["student_weight"].grad is None
    for name in ("student_hidden", "student_bias"):
        expected = torch.autograd.grad(plain(parts, 2.0, 0.5, "kl"), parts[name])
        found = parts[name].grad
        assert found is not None
        assert_equal([found], list(expected), 1e-5)
    with torch.no_grad():
        assert torch.equal(linear_kd_loss(**parts, temperature=2.0), loss.detach())


def test_labels_may_be_left_out_where_they_have_no_weight() -> None:
    parts = example()
    labels = parts.pop("labels")
    everything = torch.zeros_like(labels)
    loss = linear_kd_loss(**parts, alpha=1.0)
    expected = plain(parts | {"labels": everything}, 1.0, 1.0, "kl")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_equal(gradients(loss, parts), gradients(expected, parts), 1e-5)


def test_where_no_position_counts_loss_and_gradients_are_0() -> None:
    parts = example() | {"labels": torch.full((POSITIONS,), -100)}
    loss = linear_kd_loss(**parts)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, parts))


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_without_a_graph_break() -> None:
    parts = example()

    def step(**parts: Tensor) -> Tensor:
        return linear_kd_loss(**parts, temperature=2.0) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(**parts)
    expected = step(**parts)
    assert torch.equal(compiled, expected)
    assert_equal(gradients(compiled, parts), gradients(expected, parts), 0)


def test_autocast_multiplies_in_bf16_and_sums_in_float32() -> None:
    parts = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_kd_loss(**parts, temperature=2.0)
    assert loss.dtype == torch.float32
    expected = plain(parts, 2.0, 0.5, "kl")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert loss.item() != expected.item()
    assert_equal(gradients(loss, parts), gradients(expected, parts), 2e-2)


def test_bf16_models_get_bf16_gradients() -> None:
    parts = example(torch.bfloat16)
    exact = {name: part.detach().float().requires_grad_(part.requires_grad) if part.is_floating_point() else part
             for name, part in parts.items()}  # fmt: skip
    found, expected = gradients(linear_kd_loss(**parts), parts), gradients(plain(exact, 1.0, 0.5, "kl"), exact)
    assert {gradient.dtype for gradient in found} == {torch.bfloat16}
    assert_equal([gradient.float() for gradient in found], expected, 2e-2)


def test_a_second_backward_is_refused_as_the_gradients_are_used_up() -> None:
    loss = linear_kd_loss(**example())
    loss.backward(retain_graph=True)
    with pytest.raises(QatkitError, match="backward was called twice"):
        loss.backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_weight": torch.zeros(303, 12)}, r"\[301, 16\]\] \(student\) and \[\[50, 12\], \[303, 12\]\].*trim"),
        ({"kind": "mse"}, "kind: 'mse' has no row kernel; compute it from full logits"),
        ({"labels": None}, "labels: the labels are missing, but alpha=0.5 includes the cross-entropy; pass labels"),
        ({"temperature": 0.0}, "temperature: 0.0 is out of range"),
        ({"alpha": 2.0}, "alpha: 2.0 is out of range"),
        ({"beta": 1.0}, "beta: 1.0 is out of range"),
    ],
)
def test_a_mistake_is_refused_with_advice(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        linear_kd_loss(**(example() | changes))


def test_without_a_c_compiler_the_kernel_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not chunked_op._has_triton.__wrapped__()
    compiler = tmp_path / "gcc"
    compiler.touch(0o755)
    assert chunked_op._has_triton.__wrapped__() == (find_spec("triton") is not None)
    monkeypatch.setenv("CC", "missing")
    assert not chunked_op._has_triton.__wrapped__()
