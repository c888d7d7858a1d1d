"""Distillation on a GPU: the fused loss against float64, and a cache whose tensors are on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatkit.distillation import chunked_op
from qatkit.distillation.cache import CachedTeacher, cache_teacher
from qatkit.distillation.chunked import linear_kd_loss
from tests.distillation.tensors import sines
from tests.distillation.test_chunked import assert_equal, example, gradients, plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("parts_of", [1 << 30, 1 << 15])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
def test_the_fused_loss_equals_that_of_full_logits_in_float64(
    kind: str, dtype: torch.dtype, bound: float, parts_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked_op.WORKSPACE, "cuda", parts_of)  # all rows at once, or some at a time
    there = {name: part.detach().cuda().requires_grad_(part.requires_grad) for name, part in example(dtype).items()}
    exact = {  # from the values that the GPU gets
        name: part.detach().cpu().to(torch.float64 if part.is_floating_point() else part.dtype)
        .requires_grad_(part.requires_grad)
        for name, part in there.items()
    }  # fmt: skip
    found = linear_kd_loss(**there, temperature=2.0, alpha=0.7, kind=kind)
    expected = plain(exact, 2.0, 0.7, kind)
    assert found.item() == pytest.approx(expected.item(), rel=bound)
    assert_equal(
        [part.cpu() for part in gradients(found, there)],
        [part.to(dtype) for part in gradients(expected, exact)],
        2 * bound,
    )


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_hidden_states_at_positions_that_do_not_count_reach_no_gradient(kind: str, bad: float) -> None:
    results = []
    for value in (0.0, bad):
        there = {name: part.detach().cuda().requires_grad_(part.requires_grad) for name, part in example().items()}
        uncounted = ~there["mask"] | (there["labels"] == -100)
        for name in ("student_hidden", "teacher_hidden"):
            part = there[name].detach().masked_fill(uncounted[:, None], value)
            there[name] = part.requires_grad_(there[name].requires_grad)
        loss = linear_kd_loss(**there, temperature=2.0, kind=kind)
        results.append([loss.detach(), *gradients(loss, there)])
    for clean, dirty in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(dirty, clean)


def test_autocast_computes_the_fused_loss_in_bfloat16_with_gradients_in_float32() -> None:
    there = {name: part.detach().cuda().requires_grad_(part.requires_grad) for name, part in example().items()}
    exact = {name: part.detach().cpu().requires_grad_(part.requires_grad) for name, part in there.items()}
    with torch.autocast("cuda", torch.bfloat16):
        found = linear_kd_loss(**there, temperature=2.0, alpha=0.7)
    expected = plain(exact, 2.0, 0.7, "kl")
    assert found.item() == pytest.approx(expected.item(), rel=2e-2)
    assert_equal([part.cpu() for part in gradients(found, there)], gradients(expected, exact), 4e-2)


def test_a_cache_serves_a_padded_batch_on_the_gpu(tmp_path: Path) -> None:
    tokens = torch.randint(300, (4, 6))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = mask[3, 2:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    logits = sines(1, 4, 6, 301, scale=6)
    cache_teacher(lambda batch: logits.cuda(), [batch], tmp_path, {}, k=8)
    cached = CachedTeacher(tmp_path, {})
    ours = cached.outputs_for((), {name: part.cuda() for name, part in batch.items()})
    theirs = cached.outputs_for((), batch)
    for name in ("indices", "log_p", "log_tail", "mask"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    best = logits.topk(8, dim=-1).indices
    assert torch.equal(ours.indices[mask.bool()], best[mask.bool()])
    student = sines(2, 4, 6, 301, scale=6)
    wanted = torch.arange(4)
    assert cached.loss(student.cuda(), wanted).item() == pytest.approx(cached.loss(student, wanted).item(), rel=1e-5)
