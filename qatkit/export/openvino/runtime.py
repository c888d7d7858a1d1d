"""OpenVINO: load an exported model, run it on the CPU, and count the kernels that were chosen."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.export.onnx.runtime import Kernels, named_inputs
from qatkit.export.openvino.kernel_reasons import float_reasons
from qatkit.export.output_tensors import nested

PRECISE = {"INFERENCE_PRECISION_HINT": "f32"}
"""The option that makes OpenVINO reproduce training: by default, it uses bfloat16 on processors with AMX."""
WITHOUT_INTEGERS = {"LP_TRANSFORMS_MODE": "NO"}
"""The option that makes OpenVINO decode all integers, so that no kernel can saturate."""
OUTPUTS = ("qatkit", "outputs")
"""Where the file stores the names of the model's outputs, in order and separated by line breaks; the only output of a
model that returns one tensor has the name "".
"""
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell", "RNNSeq")


class OpenVINORuntime:
    """A loaded OpenVINO model, called with one batch in the same way as the trained model.

    Args:
        compiled: A compiled model.
        outputs: Names of its outputs; "" is the only output of a model that returns one tensor.
    """

    def __init__(self, compiled: Any, outputs: list[str]) -> None:
        self.inputs = [value.any_name for value in compiled.inputs]
        self._compiled = compiled
        self._outputs = outputs

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> Any:
        """The output of the model; multiple tensors are in dicts and tuples, as in the model's own output.

        Raises:
            QatkitError: an input is missing, differs from the file in dtype or size, or is not in the file.
        """
        tensors = named_inputs(self.inputs, args, kwargs)
        try:
            arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in tensors.items()}
            computed = self._compiled(arrays, share_inputs=True)
        except Exception as error:  # openvino's exceptions share no base class
            raise QatkitError(
                f"OpenVINO fails on these inputs: {error}",
                advice="pass tensors with the dtypes and sizes of the example with which the model was exported",
            ) from error
        return nested(dict(zip(self._outputs, map(torch.from_numpy, computed.to_tuple()), strict=True)))


def load_openvino(path: Path | str, threads: int | None = None) -> OpenVINORuntime:
    """Load an OpenVINO model on the CPU, in float32 where it does not compute with integers.

    Args:
        path: The ``.xml`` file, next to its ``.bin`` file.
        threads: Threads per call; None uses the default of OpenVINO.

    Raises:
        QatkitError: OpenVINO is not installed, or cannot load the file.

    Example:
        >>> import tempfile, torch
        >>> from qatkit.export.openvino.format import export_openvino
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_openvino(model, x, Path(folder) / "model.xml")
        ...     load_openvino(Path(folder) / "model.xml", threads=1)(x).shape
        torch.Size([3, 4])
    """
    return runtime_of(read_model(Path(path)), threads)


def runtime_of(model: Any, threads: int | None, options: dict[str, str] | None = None) -> OpenVINORuntime:
    """Compile a model that has been read, with options in addition to `PRECISE`.

    Raises:
        QatkitError: OpenVINO cannot compile it, or the file does not name all outputs.
    """
    if not model.has_rt_info(list(OUTPUTS)):
        raise QatkitError("the model does not name its outputs", advice="export it with qatkit")
    names = model.get_rt_info(list(OUTPUTS)).astype(str).split("\n")
    if len(names) != len(model.outputs):
        raise QatkitError(
            f"the model has {len(model.outputs)} outputs, and names {len(names)}", advice="export it with qatkit"
        )
    return OpenVINORuntime(compiled(model, threads, options or {}), names)


def read_model(path: Path) -> Any:
    """Read an OpenVINO model with OpenVINO's own reader.

    Raises:
        QatkitError: OpenVINO is not installed, or cannot read the file.
    """
    try:
        core()
    except ImportError as error:
        raise QatkitError("openvino is not installed", advice="run: pip install 'qatkit[openvino]'") from error
    try:
        return core().read_model(path)
    except Exception as error:  # openvino's exceptions share no base class
        reason = str(error).strip().splitlines()[-1:]
        raise QatkitError(f"OpenVINO cannot read it: {''.join(reason)}", key=str(path)) from error


@cache
def core() -> Any:
    """OpenVINO's entry point. It is shared, because each instance would load and unload the CPU plugin's threads.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    import openvino

    return openvino.Core()


def compiled(model: Any, threads: int | None, options: dict[str, str]) -> Any:
    """Compile a model that has been read, for the CPU, with options in addition to `PRECISE`.

    Raises:
        QatkitError: OpenVINO cannot compile it.
    """
    given = PRECISE | options | ({} if threads is None else {"INFERENCE_NUM_THREADS": str(threads)})
    try:
        return core().compile_model(model, "CPU", given)
    except Exception as error:  # openvino's exceptions share no base class
        raise QatkitError(f"OpenVINO cannot compile the model: {error}") from error


def evaluate(node: Any) -> np.ndarray[Any, Any]:
    """Compute, with OpenVINO, the value of a node that depends only on constants."""
    import openvino

    if node.get_type_name() == "Constant":
        return np.asarray(node.data)
    return np.asarray(compiled(openvino.Model([node.output(0)], [], "constant"), 1, {})({})[0])


def openvino_kernels(path: Path) -> Kernels:
    """Count the kernels that OpenVINO chooses on this machine.

    Raises:
        QatkitError: OpenVINO is not installed, or cannot load the file.
    """
    integer: Counter[str] = Counter()
    floating: Counter[str] = Counter()
    model, names = read_model(path), list[list[str]]()
    for node in compiled(model, 1, {}).get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        kind, kernel = (str(about[key].value) for key in ("layerType", "primitiveType"))
        if kind in _PRODUCTS:  # "runtimePrecision" is that of the stored weights, even if a kernel decodes them
            if kernel.lower().endswith(("_i8", "_u8")):
                integer[kind] += 1
            else:
                floating[kind] += 1
                names.append(str(about["originalLayersNames"].value).split(","))
    return Kernels(dict(integer), dict(floating), float_reasons(model, names))
