"""Read back a GGUF file: the gguf package decodes every tensor, and transformers loads the model."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.export.companions import export_config
from qatkit.export.dense import dense_state
from qatkit.export.gguf.architectures import architecture_of
from qatkit.export.gguf.packing import BLOCK_TYPES
from qatkit.export.gguf.pooling import POOLING, pooling_of, pooling_type
from qatkit.export.gguf.tensors import Stored, file_metadata, stored_tensors
from qatkit.export.gguf.tokenizer import tokenizer_metadata
from qatkit.export.interface import ReadBack
from qatkit.quantization.prepare import quantized_weights, strip_qat

_UNREADABLE = (ValueError, OSError, IndexError, KeyError)
"""Exceptions that the gguf package raises for a file that is truncated or not GGUF."""


@torch.no_grad()
def compare_and_load(trained: nn.Module, path: Path) -> ReadBack:
    """Compare a file's metadata, scales and decoded tensors to a model, and load it with transformers.

    Args:
        trained: The model, in eval mode on the CPU.
        path: A file written by `export_gguf`.
    """
    import gguf

    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    try:
        reader = gguf.GGUFReader(path)
    except _UNREADABLE as error:
        return ReadBack(weights, [f"{path.name} cannot be read: {error}"], None)
    tensors = stored_tensors(trained)
    expected = file_metadata(trained, tensors)
    failures = _metadata_differences(reader, expected)
    own = f"{expected['general.architecture']}."
    extra = [key for key in reader.fields if key.startswith(own) and key not in {*expected, POOLING}]
    failures += [f"metadata '{key}': the trained model has no such entry" for key in extra]
    found = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in tensors:
        failures += _tensor_differences(tensor, found.pop(tensor.name, None))
    failures += [f"'{name}': the trained model has no such tensor" for name in found]
    if architecture_of(trained).loader == "none":
        return ReadBack(weights, failures, _filled(trained, tensors, reader))
    try:
        loaded = _load(trained, path)
    except Exception as error:  # the exceptions of transformers share no base class
        reason = " ".join(str(error).split())[:300]
        return ReadBack(weights, [*failures, f"transformers cannot load {path.name}: {reason}"], None)
    values, offsets = loaded.state_dict(), {tensor.key: tensor.offset for tensor in tensors}
    for key, value in dense_state(trained).items():
        found_value, offset = values.get(key), offsets.get(key, 0.0)
        if found_value is not None and offset:  # the sum is rounded in the file, as it is in the forward pass
            found_value, value = found_value + offset, value + offset
        failures += _differences(key, "values that transformers loads", found_value, value)
    return ReadBack(weights, failures, loaded)


def _filled(trained: nn.Module, tensors: list[Stored], reader: Any) -> nn.Module | None:
    """The plain model with the tensors of a file, decoded by the gguf package; None if they are others."""
    from gguf.quants import dequantize

    plain = copy.deepcopy(trained)
    strip_qat(plain)
    names = {tensor.name: tensor.key for tensor in tensors}
    state = plain.state_dict()
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    if shapes != {name: tuple(state[key].shape) for name, key in names.items()}:
        return None
    for tensor in reader.tensors:
        state[names[tensor.name]].copy_(torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))))
    return plain


def compare_data(path: Path, tokenizer: Any, batch: Any) -> list[str]:
    """Compare the parts of a file that come from the data: the tokenizer and, for a BERT, the pooling."""
    import gguf

    try:
        fields = (reader := gguf.GGUFReader(path)).fields
    except _UNREADABLE:
        return []  # the comparison of the weights says so
    architecture = fields["general.architecture"].contents() if "general.architecture" in fields else None
    pooling = {POOLING: pooling_type(pooling_of(batch))} if architecture == "bert" else {}
    return compare_tokenizer(path, tokenizer) + _metadata_differences(reader, pooling)


def compare_tokenizer(path: Path, tokenizer: Any) -> list[str]:
    """Compare the tokenizer in a file to the tokenizer of the data; None stands for a file without vocabulary."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except _UNREADABLE:
        return []  # the comparison of the weights says so
    embeddings = next((int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    expected = tokenizer_metadata(tokenizer, embeddings)
    extra = [key for key in reader.fields if key.startswith("tokenizer.") and key not in expected]
    unknown = [f"metadata '{key}': the trained model's tokenizer has no such entry" for key in extra]
    return _metadata_differences(reader, expected) + unknown


def _metadata_differences(reader: Any, expected: dict[str, Any]) -> list[str]:
    failures = []
    for key, value in expected.items():
        if key not in reader.fields:
            failures.append(f"metadata '{key}': not in the file")
            continue
        found = reader.fields[key].contents()
        if isinstance(value, float):
            value = float(np.float32(value))
        if found == value:
            continue
        at = ""
        if isinstance(value, list) and isinstance(found, list):
            pairs = zip_longest(found, value)
            at, found, value = next((f"[{i}]", a, b) for i, (a, b) in enumerate(pairs) if a != b)
        failures.append(f"metadata '{key}'{at} is {_short(found)}, but {_short(value)} in the trained model")
    return failures


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tensor_differences(expected: Stored, found: Any) -> list[str]:
    from gguf.quants import dequantize

    if found is None:
        return [f"'{expected.label}': the file has no tensor '{expected.name}'"]
    if found.tensor_type.name != expected.type:
        return [f"'{expected.label}': of type {found.tensor_type.name} instead of {expected.type}"]
    values, failures = expected.values(), []
    if (shape := [int(size) for size in reversed(found.shape)]) != list(values.shape):
        return [f"'{expected.label}': of shape {shape} instead of {list(values.shape)}"]
    if (scales := expected.scales()) is not None:
        block = BLOCK_TYPES[expected.type]
        stored = torch.from_numpy(block.read_scales(found.data.reshape(*scales.shape[:2], -1)))
        failures += _differences(expected.label, "scales", stored.view(scales.shape), scales)
    decoded = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type)))
    return failures + _differences(expected.label, "values", decoded, values)


def _differences(key: str, what: str, found: Tensor | None, expected: Tensor) -> list[str]:
    if found is None:
        return [f"'{key}': there are no {what}"]
    if found.shape != expected.shape:
        return [f"'{key}': {what} of shape {list(found.shape)} instead of {list(expected.shape)}"]
    wrong = found.float() != expected.float()
    if not wrong.any():
        return []
    first = wrong.nonzero()[0].tolist()
    return [f"'{key}': {int(wrong.sum())} of {wrong.numel()} {what} differ, the first at {first}"]


def _load(trained: nn.Module, path: Path) -> nn.Module:
    """The model that transformers loads, with the trained config: the loader does not read all of the metadata."""
    import transformers

    model, name = cast(Any, trained), architecture_of(trained).loader
    kind = getattr(transformers, name) if name else type(model)
    settings = {key: value for key, value in export_config(model).to_dict().items() if key != "model_type"}
    config = kind.config_class.from_dict(settings, attn_implementation=model.config._attn_implementation)
    with _quietly():
        loaded: nn.Module = kind.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=model.dtype, local_files_only=True
        )
    return loaded.eval()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide the progress bars of transformers, which have no option for it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
