"""The ``quantize`` block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qatkit.errors import QatkitError
from qatkit.quantization.prepare import prepare_qat, strip_qat
from qatkit.quantization.ptq.runner import check_method
from qatkit.recipe import QuantizeConfig
from qatkit.stages.layer_names import inside, inside_keys

if TYPE_CHECKING:
    from qatkit.callbacks import QuantizationAwareTraining


def check(config: QuantizeConfig, model: nn.Module) -> list[str]:
    """The layers that are quantized, after everything that can be known of them was checked."""
    names = prepare_qat(model, **config.arguments)
    try:
        if config.init is not None:
            check_method(model, config.init)
    except QatkitError as error:
        raise QatkitError(f"init: {error}") from None
    finally:
        strip_qat(model)
    return names


def callback(config: QuantizeConfig) -> QuantizationAwareTraining:
    """What fake-quantizes."""
    from qatkit.callbacks import QuantizationAwareTraining

    how = config.arguments
    how |= {key: inside(how[key]) for key in ("include", "exclude")} | {"layers": inside_keys(how["layers"])}
    return QuantizationAwareTraining(**how, init=config.init, calibration_batches=config.calibration_batches)
