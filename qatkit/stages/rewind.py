"""The ``rewind`` block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qatkit.stages.layer_names import STUDENT

if TYPE_CHECKING:
    from qatkit.callbacks import WeightRewinding


def callback(earlier: nn.Module) -> WeightRewinding:
    """Build the callback that restores the weights of `earlier` under the stage's sparsity mask."""
    from qatkit.callbacks import WeightRewinding

    return WeightRewinding({f"{STUDENT}.{name}": tensor for name, tensor in earlier.state_dict().items()})
