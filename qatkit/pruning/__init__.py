"""Pruning: masks, scores and schedules as pure functions, one-shot pruning, and structured pruning.

The callbacks in `qatkit.callbacks` apply these during training. Importing the package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.pruning.channel_importance import channel_scores as channel_scores
    from qatkit.pruning.channel_importance import taylor_channel_scores as taylor_channel_scores
    from qatkit.pruning.channels import prune_channels as prune_channels
    from qatkit.pruning.gradient import gradient_scores as gradient_scores
    from qatkit.pruning.gradient import prune_by_gradient as prune_by_gradient
    from qatkit.pruning.layers import prunable_layers as prunable_layers
    from qatkit.pruning.masks import apply_mask as apply_mask
    from qatkit.pruning.masks import block_mask as block_mask
    from qatkit.pruning.masks import global_masks as global_masks
    from qatkit.pruning.masks import magnitude_mask as magnitude_mask
    from qatkit.pruning.masks import nm_mask as nm_mask
    from qatkit.pruning.methods import IMPORTANCES as IMPORTANCES
    from qatkit.pruning.methods import METHODS as METHODS
    from qatkit.pruning.one_shot import prune_one_shot as prune_one_shot
    from qatkit.pruning.schedule import Ramp as Ramp
    from qatkit.pruning.scores import row_mask as row_mask
    from qatkit.pruning.scores import taylor_scores as taylor_scores
    from qatkit.pruning.scores import wanda_scores as wanda_scores
    from qatkit.pruning.semi_structured import use_sparse_kernels as use_sparse_kernels
    from qatkit.pruning.storage import load_sparse as load_sparse
    from qatkit.pruning.storage import save_sparse as save_sparse
    from qatkit.pruning.storage import stored_bytes as stored_bytes
    from qatkit.pruning.structure import Importance as Importance
    from qatkit.pruning.structure import Shape as Shape
    from qatkit.pruning.structure import importance as importance
    from qatkit.pruning.structure import shrink as shrink
    from qatkit.pruning.weight_importance import magnitude_importance as magnitude_importance
    from qatkit.pruning.weight_importance import taylor_importance as taylor_importance

_HOMES = {
    "qatkit.pruning.channel_importance": ["channel_scores", "taylor_channel_scores"],
    "qatkit.pruning.channels": ["prune_channels"],
    "qatkit.pruning.gradient": ["gradient_scores", "prune_by_gradient"],
    "qatkit.pruning.layers": ["prunable_layers"],
    "qatkit.pruning.masks": ["apply_mask", "block_mask", "global_masks", "magnitude_mask", "nm_mask"],
    "qatkit.pruning.methods": ["IMPORTANCES", "METHODS"],
    "qatkit.pruning.one_shot": ["prune_one_shot"],
    "qatkit.pruning.schedule": ["Ramp"],
    "qatkit.pruning.scores": ["row_mask", "taylor_scores", "wanda_scores"],
    "qatkit.pruning.semi_structured": ["use_sparse_kernels"],
    "qatkit.pruning.storage": ["load_sparse", "save_sparse", "stored_bytes"],
    "qatkit.pruning.structure": ["Importance", "Shape", "importance", "shrink"],
    "qatkit.pruning.weight_importance": ["magnitude_importance", "taylor_importance"],
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)
