"""The table of PTQ methods for `quantize.init`, which does not import torch.

To add a method, write a function and add a row here. A row implements one or two of three hooks: `from_weight`,
`from_inputs` and `move_scales`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qatkit.common.tables import Table


@dataclass(frozen=True)
class Method:
    """A post-training method that sets the starting point of training."""

    name: str
    description: str
    from_weight: str = ""
    """``module:function(weight, spec)`` that returns a scale and a zero point; such a method does not use batches."""
    from_inputs: str = ""
    """``module:function(weight, hessian, spec)`` that returns the weight, a scale and a zero point; the weight may be
    rounded to the grid."""
    move_scales: str = ""
    """``module:function(shared_input)`` that returns the scales of a `SharedInput`, float32 ``[in]``, or None. The
    input is divided by the scales, and the weights of layers that read it are multiplied by them.
    """
    needs_weights: bool = True
    """Whether the method has no effect unless a weight is quantized."""
    stored_scales: bool = False
    """Whether the method sets weight scales; scales that are computed in every forward pass then raise an error."""
    second_moment: bool = True
    """Whether the second moment ``[in, in]`` of the inputs is accumulated; otherwise, a sample of their rows is kept.
    """
    keeps_zeros: bool = True
    """Whether pruned weights stay zero."""

    @property
    def reads_batches(self) -> bool:
        """Whether the method runs the model."""
        return bool(self.from_inputs or self.move_scales)

    @property
    def changes_weights(self) -> bool:
        """Whether the method changes the initial weights of training."""
        return self.reads_batches


_PTQ = "qatkit.quantization.ptq"

METHODS = Table(
    "PTQ method",
    [
        Method(
            "rtn",
            "round to nearest, with scales from the range of the weights",
            from_weight="qatkit.quantization.estimators:computed_qparams",
        ),
        Method(
            "mse",
            "scales that minimize the squared error of the weights",
            from_weight="qatkit.quantization.estimators:mse_qparams",
            stored_scales=True,
        ),
        Method(
            "importance",
            "scales that minimize the squared error of the weights, weighted by the mean square of their inputs "
            "(llama.cpp's importance matrix)",
            from_inputs=f"{_PTQ}.importance:importance",
            stored_scales=True,
        ),
        Method(
            "gptq",
            "round the weights one column at a time, each correcting the errors before it (GPTQ)",
            from_inputs=f"{_PTQ}.gptq:gptq",
            stored_scales=True,
            keeps_zeros=False,
        ),
        Method(
            "awq",
            "scale up the weights of salient inputs, then clip ranges to minimize the output error (AWQ)",
            from_inputs=f"{_PTQ}.awq:clipped_weight",
            move_scales=f"{_PTQ}.awq:awq_fold",
            stored_scales=True,
        ),
        Method(
            "smoothquant",
            "move outliers of the activations into the weights (SmoothQuant)",
            move_scales=f"{_PTQ}.smoothquant:smoothquant_fold",
            needs_weights=False,
            second_moment=False,
        ),
    ],
)
"""Every PTQ method by name."""
