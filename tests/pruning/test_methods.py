"""The tables of pruning methods and importance measures: every row works, and a new method needs only a new row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qatkit import QatkitError
from qatkit.common.tables import implementation
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.pruning.methods import IMPORTANCES, METHODS, TARGETS, ImportanceMeasure, PruningMethod
from qatkit.pruning.weight_importance import magnitude_importance
from qatkit.recipe import PruneConfig
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run

DOCS = Path(__file__).parents[2] / "docs"
RECIPE = """
name: methods
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 5}
  prune: {max_steps: 2, prune: {sparsity: 0.5, method: largest, calibration_batches: 2}}
"""


def largest_first(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Score weights so that the largest of each row are pruned first."""
    assert input_norm.shape == weight.shape[1:]
    return 1 / (1 + weight.detach().abs())


LARGEST = PruningMethod(
    "largest",
    "largest weights first",
    ("sparsity", "calibration_batches"),
    function=f"{__name__}:largest_first",
    measures="input_norms",
    linear_only=True,
)


def recipe_of(folder: Path, *overrides: str) -> Any:
    (folder / "methods.yaml").write_text(RECIPE)
    return load_recipe(str(folder / "methods.yaml"), list(overrides))


def test_a_method_that_only_has_a_row_is_validated_and_prunes_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(QatkitError, match=r"stages\.prune\.prune\.method: unknown pruning method 'largest'; "):
        recipe_of(tmp_path)
    monkeypatch.setattr(METHODS, "_rows", {**METHODS._rows, "largest": LARGEST})
    validate_recipe(recipe_of(tmp_path))
    with pytest.raises(
        QatkitError, match=r"prune\.method: 'largest' requires unsharded weights, but fsdp2 shards them"
    ):
        recipe_of(tmp_path, "trainer.strategy=fsdp2")
    with pytest.raises(QatkitError, match=r"prune\.nm: method largest needs sparsity, got nm; use sparsity: 0.5"):
        recipe_of(tmp_path, "stages.prune.prune={nm: [2, 4], method: largest}")
    convolutions = "model={factory: 'qatkit.models:cnn'}"
    with pytest.raises(QatkitError, match="'largest' prunes only linear layers, but layer 'conv1' is a Conv2d"):
        validate_recipe(recipe_of(tmp_path, convolutions))
    run = Run(recipe_of(tmp_path), tmp_path / "run")
    run_stages(run)
    before, after = (load_file(run.folder(name) / "model" / "model.safetensors") for name in ("dense", "prune"))
    for key in ("1.weight", "3.weight"):
        pruned = after[key] == 0
        assert (pruned.sum(dim=1) == pruned.shape[1] // 2).all()
        magnitude = before[key].abs()
        assert (magnitude.masked_fill(~pruned, torch.inf).amin(1) >= magnitude.masked_fill(pruned, 0).amax(1)).all()


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
def test_a_row_names_real_code_and_takes_keys_of_the_block(row: PruningMethod) -> None:
    assert set(row.keys) <= {field.name for field in fields(PruneConfig)}
    assert row.targets
    assert bool(row.function) != bool(row.callback)
    assert bool(row.function) == bool(row.measures) == ("calibration_batches" in row.keys)
    if row.callback:
        parameters = inspect.signature(implementation(row.callback)).parameters
        assert {*row.keys, "include", "exclude"} <= set(parameters)
    else:
        parameters = inspect.signature(implementation(row.function)).parameters
        assert len(parameters) >= (4 if row.measures == "gram" else 2)


def test_the_documentation_lists_every_method_and_measure_as_its_row_describes_it() -> None:
    page = (DOCS / "pruning.md").read_text()
    for method in METHODS.values():
        keys = [f"`{key}`" for key in TARGETS if key in method.keys]
        assert f"| `{method.name}` | {', '.join(keys)} | {method.description} |" in page
    page = (DOCS / "shrinking.md").read_text()
    for measure in IMPORTANCES.values():
        assert f"| `{measure.name}` | {measure.description} |" in page


def reversed_importance(model: nn.Module, batches: Iterable[Any], run: Callable[[Any], object]) -> Any:
    """Score parts so that those with the largest weights are removed first."""
    for batch in batches:
        run(batch)
    return type(magnitude_importance(model))(
        **{key: -value for key, value in vars(magnitude_importance(model)).items()}
    )


def test_an_importance_measure_that_only_has_a_row_decides_what_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    from qatkit.models import llama
    from qatkit.recipe import ShrinkConfig
    from qatkit.stages.shrink import apply

    def calls(model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch).logits
        return logits

    with pytest.raises(QatkitError, match="importance: unknown importance measure 'reversed'; "):
        ShrinkConfig(neurons=8, importance="reversed")
    row = ImportanceMeasure("reversed", "", transformer=f"{__name__}:reversed_importance", measures="outputs")
    monkeypatch.setattr(IMPORTANCES, "_rows", {**IMPORTANCES._rows, "reversed": row})
    torch.manual_seed(0)
    model: Any = llama(32, hidden=16, layers=1, heads=2, kv_heads=2, intermediate=12)
    model.model.layers[0].mlp.up_proj.weight.data[3] *= 100  # the most important neuron by magnitude
    tokens = [torch.zeros(1, 4, dtype=torch.long)]
    rows = model.model.layers[0].mlp.up_proj.weight
    for importance, kept in (("magnitude", True), ("reversed", False)):
        config = ShrinkConfig(neurons=8, importance=importance)
        smaller: Any = apply(config, model, tokens, calls, calls)
        left = smaller.model.layers[0].mlp.up_proj.weight
        assert left.shape == (8, 16)
        assert any(torch.equal(row, rows[3]) for row in left) == kept
