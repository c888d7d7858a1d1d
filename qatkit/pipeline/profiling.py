"""Batches with the shape of a recipe's data, on which its model is profiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from qatkit.pipeline.export import first_batch, held_out_data
from qatkit.recipe import Recipe
from qatkit.run.folder import Run
from qatkit.tasks import one_sample


def meta_inputs(recipe: Recipe, batch: int, allow: Sequence[str] = ()) -> Any:
    """Return a batch on the meta device, with samples shaped like the first one in the recipe's test split.

    Args:
        recipe: The recipe.
        batch: Number of samples.
        allow: Packages, in addition to qatkit, whose factories may be used.

    Raises:
        QatkitError: the data cannot be read.
    """
    sample = one_sample(first_batch(held_out_data(Run(recipe, Path(), list(allow)))))

    def grown(tensor: Tensor) -> Tensor:
        return torch.empty(batch, *tensor.shape[1:], dtype=tensor.dtype, device="meta")

    if isinstance(sample, Mapping):  # models inspect the values of a mask, which are missing here; all tokens count
        sample = {key: value for key, value in sample.items() if not key.endswith("attention_mask")}
    return tree_map_only(Tensor, grown, sample)
