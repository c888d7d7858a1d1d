"""What each block of a stage means: its checks on a model without values, and the callback that carries it out.

A block has a dataclass in `qatkit.recipe` and a file here. `check` raises a `QatkitError` that starts with the key
inside the block; `callback` is called for the stage that trains. Layer names in a recipe are those of the model; inside
the LightningModule that trains it, the model is called ``model``.
"""

from qatkit.stages import distill, lora, prune, quantize, rewind, samples, shrink

__all__ = ["distill", "lora", "prune", "quantize", "rewind", "samples", "shrink"]
