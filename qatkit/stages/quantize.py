"""The ``quantize`` block of a stage: its checks and its callback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qatkit.errors import under
from qatkit.quantization.coverage import Coverage, coverage
from qatkit.quantization.prepare import prepare_qat, schemes_of, strip_qat
from qatkit.quantization.ptq.runner import check_method
from qatkit.quantization.targets import warn_of_slow_layers
from qatkit.recipe import QuantizeConfig
from qatkit.stages.layer_names import inside, inside_keys

if TYPE_CHECKING:
    from qatkit.callbacks import QuantizationAwareTraining


def check(config: QuantizeConfig, model: nn.Module) -> Coverage:
    """Check the block against a model, and return the layers to quantize."""
    prepare_qat(model, **config.arguments)
    try:
        if config.target is not None:
            warn_of_slow_layers(model, config.target, schemes_of(model))
        if config.init is not None:
            with under("init"):
                check_method(model, config.init)
        return coverage(model)
    finally:
        strip_qat(model)


def callback(config: QuantizeConfig) -> QuantizationAwareTraining:
    """Return the callback that fake-quantizes the model."""
    from qatkit.callbacks import QuantizationAwareTraining

    arguments = config.arguments
    arguments |= {key: inside(arguments[key]) for key in ("include", "exclude")}
    arguments |= {"layers": inside_keys(arguments["layers"])}
    return QuantizationAwareTraining(
        **arguments, init=config.init, calibration_batches=config.calibration_batches, target=config.target
    )
