"""Profile a recipe's model on the shape of its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qatkit.advise.phases import Phases, forward_phases
from qatkit.pipeline.export import first_batch, held_out_data
from qatkit.recipe import Recipe
from qatkit.run.folder import Run
from qatkit.tasks import call, one_sample


def forward_of(recipe: Recipe, model: nn.Module, batch: int, allow: Sequence[str] = ()) -> Phases:
    """Return the costs of a model on `batch` samples shaped like the first one in the recipe's test split.

    Args:
        recipe: The recipe.
        model: Its model, on the meta device.
        batch: Number of samples.
        allow: Packages, in addition to qatkit, whose factories may be used.

    Raises:
        QatkitError: the data cannot be read.
    """
    sample = one_sample(first_batch(held_out_data(Run(recipe, Path(), list(allow)))))

    def grown(tensor: Tensor) -> Tensor:
        return torch.empty(batch, *tensor.shape[1:], dtype=tensor.dtype, device="meta")

    inputs: Any = tree_map_only(Tensor, grown, sample)
    return forward_phases(model, lambda: call(model, inputs))
