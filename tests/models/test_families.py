"""Every family of models: prepared, trained for a step, stripped, and loaded again by plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from qatkit import QuantSpec, prepare_qat, strip_qat
from qatkit.export.dense import export_dense
from qatkit.tasks import answers, call, token_loss
from tests.models.families import CAUSAL, tiny

KINDS = [
    *((family, "CausalLM") for family in CAUSAL),
    *(("bert", k) for k in ("MaskedLM", "SequenceClassification", "")),
]


def batch_for(kind: str) -> dict[str, torch.Tensor | str]:
    ids = torch.randint(1, 300, (4, 12), generator=torch.Generator().manual_seed(3))
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "MaskedLM":
        return {**whole, "labels": ids, "task": "masked"}
    if kind == "SequenceClassification":
        return {**whole, "labels": torch.tensor([0, 1, 1, 0])}
    if kind == "":
        return {**whole, "labels": torch.arange(2), "task": "pairs", "pooling": "mean"}
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(("family", "kind"), KINDS, ids=[f"{family}-{kind or 'Model'}" for family, kind in KINDS])
def test_what_was_trained_is_what_plain_transformers_loads(family: str, kind: str, tmp_path: Path) -> None:
    model, batch = tiny(family, kind), batch_for(kind)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    # tied to an embedding that stays as it is, or not trained
    exclude = {"CausalLM": ["lm_head"], "MaskedLM": ["*decoder"], "": ["*pooler*"]}.get(kind, [])
    prepare_qat(model, weight=QuantSpec(num_bits=4, strategy="channel", observer="lsq"), exclude=exclude)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = None
    for _ in range(2):
        optimizer.zero_grad()
        loss, count = token_loss(*answers(call(model, batch), batch))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        first = first if first is not None else float(loss.detach())
    assert int(count) > 0
    assert float(loss.detach()) < first
    model.eval()
    with torch.no_grad():
        trained = call(model, batch)
    export_dense(model, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)  # type: ignore[union-attr]  # of a transformers model
    factory = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    loaded = factory.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(call(loaded, batch), trained)
    # stripped, it is the plain model with its latent weights again
    strip_qat(model)
    assert type(model).__mro__ == type(tiny(family, kind)).__mro__
    assert set(model.state_dict()) == set(start)
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "latent")  # type: ignore[operator]
    again = factory.from_pretrained(tmp_path / "latent").eval()
    with torch.no_grad():
        assert torch.equal(call(again, batch), call(model, batch))
        assert not torch.equal(call(again, batch), trained), "rounding must matter here"
