"""The blocks of a stage: their checks on a meta-device model, and the callbacks that apply them.

A block has a dataclass in `qatkit.recipe` and a module here. `check` raises a `QatkitError` whose key is relative to
the block; `callback` builds the callback for training. Layer names in a recipe are relative to the model, which is the
attribute ``model`` of the LightningModule.
"""

from qatkit.stages import distill, lora, prune, quantize, rewind, samples, shrink

__all__ = ["distill", "lora", "prune", "quantize", "rewind", "samples", "shrink"]
