"""Compare a folder for onnxruntime-genai to the model, and run it on whole texts and token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.export.companions import export_config
from qatkit.export.genai.graph import CONFIG, GRAPH, digest
from qatkit.export.interface import InputError, ReadBack
from qatkit.export.onnx.packed_weights import check_packed, packed_readers
from qatkit.export.onnx.runtime import open_session
from qatkit.quantization.prepare import qat_layers, quantized_weights

STEPS = 24
"""The number of tokens that are read one at a time."""


@torch.no_grad()
def compare_and_load(trained: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare codes, scales, zero points and all other parameters, and load the graph.

    Args:
        trained: The model, in eval mode on the CPU.
        path: A folder written by `export_genai`.
        threads: Number of threads that the runtime uses.
    """
    import onnx

    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    try:
        proto = onnx.load(path / GRAPH)
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))["model"]
        runtime = GenaiRuntime(path, threads)
    except Exception as error:  # protobuf's, onnx's and onnxruntime's exceptions share no base class
        return ReadBack(weights, [f"{path.name} cannot be read: {error}"], None)
    failures = (
        _weight_failures(trained, proto) + _parameter_failures(trained, proto) + _config_failures(trained, config)
    )
    return ReadBack(weights, failures, runtime, runtime.stepwise_failures)


def _weight_failures(trained: nn.Module, proto: Any) -> list[str]:
    readers, layers = packed_readers(proto), dict(qat_layers(trained))
    failures = [f"'{key}': the model has no such quantized layer" for key in readers if _layer(key) not in layers]
    for name, layer in layers.items():
        nodes = readers.get(f"{name}.weight.codes")
        if nodes is None:
            failures.append(f"layer '{name}': no node of {GRAPH} reads its codes")
        elif layer.weight_fake_quant is not None:
            failures += check_packed(proto, nodes, name, layer, layer.weight_fake_quant)
    return failures


def _layer(key: str) -> str:
    return key.removesuffix(".weight.codes")


def _parameter_failures(trained: nn.Module, proto: Any) -> list[str]:
    """The parameters that are not quantized: the builder stores them as they are, or transposed."""
    from onnx import numpy_helper

    stored = set()
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            stored |= {digest(values), digest(values.T)}
    packed = {f"{name}.weight" for name, _ in qat_layers(trained)}
    failures = []
    for key, value in trained.named_parameters():
        if key in packed or "fake_quant" in key:
            continue
        if digest(value.numpy()) not in stored:
            failures.append(f"'{key}': {GRAPH} does not contain these values")
    return failures


def _config_failures(trained: nn.Module, config: Mapping[str, Any]) -> list[str]:
    own = export_config(trained)
    expected = {"vocab_size": own.vocab_size, "context_length": own.max_position_embeddings}
    return [
        f"{CONFIG}: {key} is {config.get(key)}, but {value} in the trained model"
        for key, value in expected.items()
        if config.get(key) != value
    ]


def compare_data(path: Path, tokenizer: Any, batch: Any) -> list[str]:
    """Compare the end token of a folder to that of the data's tokenizer."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError):
        return []  # the comparison of the weights says so
    expected = getattr(tokenizer, "eos_token_id", None)
    found = config.get("eos_token_id")
    ends = found if isinstance(found, list) else [found]
    if expected is None or expected in ends:
        return []
    return [f"{CONFIG}: eos_token_id is {found}, but {expected} in the tokenizer of the data"]


class GenaiRuntime:
    """Runs a folder in ONNX Runtime, called like the model, with an empty cache of keys and values.

    Args:
        path: The folder.
        threads: Number of threads that the runtime uses; None uses its default.

    Raises:
        QatkitError: ONNX Runtime cannot load the graph.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        self.path, self._session = path, open_session(path / GRAPH, threads)
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))["model"]
        self._context = config["context_length"]
        decoder = config["decoder"]
        self._empty = decoder["num_key_value_heads"], 0, decoder["head_size"]
        self._first: tuple[Tensor, Tensor] | None = None

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> dict[str, Tensor]:
        """The logits ``[batch, tokens, vocabulary]``, by name.

        Raises:
            InputError: a text is padded on the left, or there are inputs that the graph does not have.
        """
        if given := [name for name, value in others.items() if value is not None]:
            raise InputError(f"onnxruntime-genai does not take {', '.join(given)}", advice="pass input_ids only")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if bool((mask.long().diff(dim=1) > 0).any()):
            raise InputError("a text is padded on the left", advice="pad on the right: padding_side='right'")
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": mask.long().numpy()}
        for value in self._session.get_inputs():
            if value.name not in inputs:
                inputs[value.name] = np.zeros((len(input_ids), *self._empty), np.float32)
        logits = torch.from_numpy(self._session.run(["logits"], inputs)[0])
        if self._first is None:
            count = min(STEPS, int(mask[0].sum()))  # padding follows the text
            self._first = input_ids[0, :count], logits[0, :count]
        return {"logits": logits}

    def stepwise_failures(self) -> list[str]:
        """Let onnxruntime-genai read the start of the first text token by token, with earlier tokens in its cache.

        The logits must equal those of the whole text, up to rounding: the order of summation differs.
        """
        import onnxruntime_genai as genai

        if self._first is None or not len(self._first[0]):
            return []
        # onnxruntime-genai keeps room for one more token
        tokens, expected = (part[: self._context - 1] for part in self._first)
        try:
            model = genai.Model(str(self.path))
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=self._context, do_sample=False)
            generator = genai.Generator(model, parameters)
            found = []
            for token in tokens.tolist():
                generator.append_tokens(np.array([[token]], np.int32))
                found.append(np.array(generator.get_logits()).reshape(-1))
        except Exception as error:  # genai's exceptions share no base class
            return [f"onnxruntime-genai cannot run {self.path.name}: {error}"]
        apart = float((torch.from_numpy(np.stack(found)) - expected).abs().mean() / expected.abs().mean())
        limit = 1e-4
        if apart > limit:
            return [
                f"token by token, the logits differ by {apart:.2g} of their mean magnitude; the limit is {limit:.2g}"
            ]
        return []
