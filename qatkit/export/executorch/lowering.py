"""Trace a model of decomposed layers with PyTorch, and lower it to a ``.pte`` file whose layers XNNPACK runs."""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.executorch.content import METADATA
from qatkit.export.onnx.inputs import Inputs
from qatkit.export.output_tensors import outputs_of, tensors

INSTEAD = "use export: {format: onnx}"
_GEMM = {"linear", "convolution", "addmm", "mm"}
"""Operators that may compute a quantized layer."""
_MOVES = ("max_pool2d", "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "slice", "clone")
"""Operators whose results are values of their input."""


def lower(model: nn.Module, inputs: Inputs) -> bytes:
    """Return the bytes of a file that computes the outputs of a model.

    Dynamic dimensions may be as large as in the example, because ExecuTorch allocates memory when it loads a file.

    Args:
        model: A model converted by `to_decomposed`. Its `forward` is replaced to return a list of tensors.
        inputs: The inputs of one call.

    Raises:
        QatkitError: the model fails on the example or does not return a tensor; PyTorch or ExecuTorch cannot trace it;
            or XNNPACK would compute a quantized layer in floating point.
    """
    with _quiet():
        names = list(outputs_of(model, inputs.tensors))
    _return_tensors(model)
    try:
        with _quiet(), torch.no_grad():
            return _lowered(model, inputs, names)
    except QatkitError:
        raise
    except Exception as error:  # torch.export and ExecuTorch raise whatever a forward leads to
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise QatkitError(
            f"ExecuTorch cannot convert this model: {type(error).__name__}: {' '.join(lines[:2])}",
            advice=f"make `forward` traceable by torch.export, or {INSTEAD}",
        ) from error


def _lowered(model: nn.Module, inputs: Inputs, outputs: list[str]) -> bytes:
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS, CatConfig, GeluConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_xnnpack_edge_compile_config
    from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    sizes = {name: inputs.tensors[of].shape[axis] for of, axes in inputs.axes.items() for axis, name in axes.items()}
    dims = {name: torch.export.Dim(name, min=1, max=max(size, 2)) for name, size in sizes.items()}
    shapes = {of: {axis: dims[name] for axis, name in axes.items()} for of, axes in inputs.axes.items()}
    program = torch.export.export(model, (), kwargs=inputs.tensors, dynamic_shapes=shapes, strict=False)
    _keep_codes(program)

    class ExactGelu(GeluConfig):  # type: ignore[misc]  # without types
        """XNNPACK has one GELU, and the partitioner does not read which approximation a node asks for."""

        def check_constraints(self, node: Any, ep: Any) -> bool:
            exact: bool = node.kwargs.get("approximate", "none") == "none"
            return exact and super().check_constraints(node, ep)

    # XNNPACK concatenates codes only if their scales are equal, which the partitioner does not check
    configs = [each for each in ALL_PARTITIONER_CONFIGS if each not in (CatConfig, GeluConfig)]
    partitioner = XnnpackPartitioner(configs=[*configs, ExactGelu])
    lowered = to_edge_transform_and_lower(program, partitioner=[partitioner]).exported_program()
    _check_integer(lowered)
    described = {"inputs": list(inputs.tensors), "outputs": outputs, "layers": _layers(model, lowered)}
    edge = EdgeProgramManager(lowered, {METADATA: json.dumps(described)}, get_xnnpack_edge_compile_config())
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    return bytes(edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer)


def _keep_codes(program: Any) -> None:
    """Quantize the results of operations that only move or select codes once more, so that XNNPACK reads codes."""
    ops, aten = torch.ops.quantized_decomposed, torch.ops.aten
    quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    moves = {getattr(aten, name) for name in _MOVES}
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.op == "call_function" and node.args else None
        if getattr(node.target, "overloadpacket", None) not in moves or getattr(source, "target", "") != dequantize:
            continue
        with graph.inserting_after(node):
            codes = graph.call_function(quantize, (node, *source.args[1:]))
        with graph.inserting_after(codes):
            values = graph.call_function(dequantize, (codes, *source.args[1:]))
        codes.meta |= node.meta | {"val": node.meta["val"].to(torch.int8)}
        values.meta |= node.meta
        node.replace_all_uses_with(values, delete_user_cb=lambda user, own=codes: user is not own)
        program.graph_signature.replace_all_uses(node.name, values.name)
    program.graph_module.recompile()


def _check_integer(program: Any) -> None:
    """Raise an error if a weight is decoded outside of XNNPACK's graphs.

    Raises:
        QatkitError: there is such a layer.
    """
    for node in program.graph.nodes:
        if node.op == "call_function" and "dequantize_per_channel" in node.target.__name__:
            name = _path(node).removesuffix("weight").removesuffix(".")
            raise QatkitError(
                f"layer '{name}': XNNPACK would compute it in floating point, because what it reads or writes is not "
                "quantized",
                advice="exclude the layer",
            )


def _path(node: Any) -> str:
    """The module in which a node of a graph is computed."""
    path: str = [path for path, _ in (node.meta.get("nn_module_stack") or {"": ("", None)}).values()][-1]
    return path


def _layers(model: nn.Module, program: Any) -> dict[str, str]:
    """The name of the layer that a node of XNNPACK's graphs computes, by the number of the node."""
    first = {id(layer): name for name, layer in model.named_modules()}
    found = {}
    for _, delegate in program.graph_module.named_children():
        for node in delegate.original_module.graph.nodes:
            if node.op != "call_function" or not _GEMM & set(node.target.__name__.split(".")):
                continue
            found[str(node.meta["debug_handle"])] = first[id(model.get_submodule(_path(node)))]
    return found


def _return_tensors(model: nn.Module) -> None:
    """Let a model return the list of its output tensors: torch.export does not know every container."""
    forward = model.forward

    @functools.wraps(forward)
    def listed(*args: Any, **kwargs: Any) -> list[Tensor]:
        return list(tensors(forward(*args, **kwargs)).values())

    model.forward = listed


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence log messages and warnings of torch.export, torchao and ExecuTorch."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
