"""Trace a model of QDQ layers with PyTorch, name its tensors after the layers, simplify the graph and save it."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.onnx import packed
from qatkit.export.onnx.constants import decode_when_loaded
from qatkit.export.onnx.dynamic import dynamic_linear
from qatkit.export.onnx.dynamic_recurrent import dynamic_lstm_translation
from qatkit.export.onnx.external import save_model
from qatkit.export.onnx.inputs import Axes, Inputs
from qatkit.export.onnx.packed import PACKED
from qatkit.export.onnx.points import pool_globally
from qatkit.export.onnx.qdq_layers import QDQ
from qatkit.export.onnx.qdq_recurrent import QDQRecurrent
from qatkit.export.onnx.recurrent import BIAS, name_steps, recurrent_translations
from qatkit.export.onnx.runtime import NAMED, ONLY_OUTPUT
from qatkit.export.output_tensors import outputs_of, tensors
from qatkit.spec import QuantSpec


def _translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """The ONNX nodes of the QDQ operators."""
    import onnxscript

    op: Any = getattr(onnxscript, f"opset{opset}")

    def quantize_linear(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int) -> Any:
        codes = op.QuantizeLinear(x, scale, zero_point)
        if qmax - qmin == 255:
            return codes
        # Below 8 bits the codes are clipped, not the values, so that Q stays next to its layer and fuses with it.
        dtype = np.int8 if qmin < 0 else np.uint8
        low, high = (op.Constant(value=onnxscript.ir.tensor(np.array(bound, dtype))) for bound in (qmin, qmax))
        return op.Clip(codes, low, high)

    def dequantize_linear(codes: Any, scale: Any, zero_point: Any = None, block_size: int = 0) -> Any:
        if block_size:
            return op.DequantizeLinear(codes, scale, zero_point, axis=1, block_size=block_size)
        return op.DequantizeLinear(codes, scale, zero_point, axis=0)

    ops = torch.ops.qatkit
    return {
        ops.quantize_linear.default: quantize_linear,
        ops.dequantize_linear.default: dequantize_linear,
        ops.dynamic_linear.default: functools.partial(dynamic_linear, op),
        ops.dynamic_lstm.default: dynamic_lstm_translation(op),
        **recurrent_translations(op),
        **packed.translations(),
    }


def trace(model: nn.Module, inputs: Inputs, opset: int) -> Any:
    """Trace the model to an ONNX program with dynamic batch and, where possible, dynamic task dimensions.

    Args:
        model: A copy of the model whose quantized layers are QDQ layers. Its `forward` is replaced to return a list of
            tensors.
        inputs: The inputs of one call.
        opset: The ONNX operator set.

    Raises:
        QatkitError: the model fails on the example or does not return a tensor, or PyTorch cannot trace it.
    """
    with _quiet():
        found = outputs_of(model, inputs.tensors)
    names = [name or ONLY_OUTPUT for name in found]
    if both := inputs.tensors.keys() & set(names):
        raise QatkitError(
            f"'{min(both)}' is the name of both an input and an output", advice="rename the output of the model"
        )
    _return_tensors(model)
    fixed = sorted({name for axes in inputs.axes.values() for axis, name in axes.items() if axis > 0})
    try:
        return _named(_traced(model, inputs.tensors, names, inputs.axes, opset), found)
    except _NotTraceable as error:
        problem = error
    try:
        program = _traced(model, inputs.tensors, names, inputs.batch_only, opset) if fixed else None
    except _NotTraceable:
        program = None
    if program is None:
        raise QatkitError(
            f"PyTorch cannot export this model with a dynamic batch size: {problem}",
            advice="make `forward` traceable by torch.export, or use export: {format: dense}",
        ) from problem
    warnings.warn(
        f"the exported file fixes {' and '.join(fixed)} to the sizes in the example, because PyTorch cannot export the "
        f"model with dynamic sizes: {problem}",
        QatkitWarning,
        stacklevel=4,
    )
    return _named(program, found)


def _named(program: Any, outputs: dict[str, Tensor]) -> Any:
    """Rename constants that have the name of an input or output, and mark a mapping of one output as such."""
    graph = program.model.graph
    for value in (*graph.inputs, *graph.outputs):
        constant = graph.initializers.get(value.name)
        if constant is not None and constant is not value:
            del graph.initializers[value.name]
            constant.name = f"{value.name}.constant"
            graph.initializers[constant.name] = constant
    if list(outputs) == [ONLY_OUTPUT]:
        program.model.metadata_props[NAMED] = "true"
    return program


class _NotTraceable(Exception):
    """The reason why PyTorch cannot trace a model."""


def _traced(model: nn.Module, kwargs: dict[str, Tensor], outputs: list[str], axes: Axes, opset: int) -> Any:
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
                model,
                (),
                kwargs=kwargs,
                dynamo=True,
                input_names=list(kwargs),
                output_names=outputs,
                dynamic_shapes=axes,
                custom_translation_table=_translations(opset),
                opset_version=opset,
                optimize=False,  # it merges equal tensors and so loses layer names; `save` simplifies instead
                verbose=False,
            )
    except Exception as error:  # torch.onnx wraps whatever a forward raises during tracing
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        heading = 1 + (len(lines) > 1 and lines[0].endswith(":"))
        raise _NotTraceable(" ".join(lines[:heading]) or type(error).__name__) from error


def _return_tensors(model: nn.Module) -> None:
    """Let a model return the list of its output tensors: torch.export does not know every container.

    They are copies, because a tensor that is an input or is returned twice would keep only its last name.
    """
    forward = model.forward

    @functools.wraps(forward)
    def listed(*args: Any, **kwargs: Any) -> list[Tensor]:
        return [tensor.clone() for tensor in tensors(forward(*args, **kwargs)).values()]

    model.forward = listed


def name_after_layers(graph_model: Any, model: nn.Module) -> None:
    """Name the tensors of a shared layer after its first name, because tracing uses a different one."""
    first = {id(layer): name for name, layer in model.named_modules()}
    initializers = graph_model.graph.initializers
    for alias, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (*QDQ.values(), *PACKED.values(), QDQRecurrent)) and first[id(layer)] != alias:
            for key in [key for key in initializers if key.startswith(f"{alias}.")]:
                value = initializers.pop(key)
                value.name = f"{first[id(layer)]}.{key.removeprefix(f'{alias}.')}"
                initializers[value.name] = value


def save(program: Any, specs: dict[str, Any], path: Path) -> None:
    """Simplify a traced program and write it to a file, atomically; large models have a side file.

    Args:
        program: The program returned by `trace`.
        specs: Quantization by layer, stored in the file's metadata.
        path: The file.
    """
    from onnxscript import optimizer, rewriter
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass, CommonSubexpressionEliminationPass

    with _quiet():
        model = program.model
        name_steps(model)
        for _ in range(2):  # rewriting exposes constants to fold, and folding exposes patterns to rewrite
            optimizer.fold_constants(model, should_fold=_keep_tables)
            model = rewriter.rewrite(model)
            optimizer.remove_unused_nodes(model)
        CommonSubexpressionEliminationPass()(model)  # equal constants, and the input of several layers
        pool_globally(model)
        decode_when_loaded(model, _weights_alone(specs))
        ClearMetadataAndDocStringPass()(model)  # source lines and paths of the exporting machine
        for value in (*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs):
            value.metadata_props.clear()
        _shorten_names(model)
        model.producer_name = "qatkit"
        model.metadata_props["qatkit.specs"] = json.dumps(_compact(specs), separators=(",", ":"))
        save_model(model, path)


def _shorten_names(model: Any) -> None:
    """Give the values between QuantizeLinear and DequantizeLinear short names, which a small network's size depends on.

    Layers and constants keep their names.
    """
    graph = model.graph
    outputs = {value.name for value in graph.outputs}
    inner = [value for node in graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None]
    taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *inner)}
    numbers = itertools.count()
    for node in [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        node.name = None
        if node.outputs[0].name not in outputs:
            names = (f"{node.op_type[0].lower()}{number}" for number in numbers)
            node.outputs[0].name = next(name for name in names if name not in taken)


def _keep_tables(node: Any) -> bool | None:
    """False for rows of codes, zero points and the gates of a bias, which would lose their names; None by default."""
    names = [value.name or "" for value in node.inputs if value is not None]
    if node.op_type in ("Split", "Concat") and any(BIAS.search(name) for name in names):
        return False
    table = names[0] if node.op_type in ("Gather", "Cast", "Transpose", "Split", "Unsqueeze") and names else ""
    return False if table.endswith((".codes", ".scale", ".zero_point")) else None


def _compact(specs: dict[str, Any]) -> dict[str, Any]:
    """Return every spec once, without its defaults, and the number of the spec of each layer's parts."""
    defaults = asdict(QuantSpec())
    distinct: list[dict[str, Any]] = []
    layers: dict[str, dict[str, int]] = {}
    for name, parts in specs.items():
        for part, fields in parts.items():
            short = {key: value for key, value in fields.items() if value != defaults[key]}
            if short not in distinct:
                distinct.append(short)
            layers.setdefault(name, {})[part] = distinct.index(short)
    return {"specs": distinct, "layers": layers}


def _weights_alone(specs: dict[str, Any]) -> dict[str, QuantSpec]:
    """The quantization of weights whose layer's input is not quantized, by the name of the codes."""
    return {
        f"{name}.weight.codes".removeprefix("."): QuantSpec(**parts["weight"])
        for name, parts in specs.items()
        if "weight" in parts and "input" not in parts
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's log messages and warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
