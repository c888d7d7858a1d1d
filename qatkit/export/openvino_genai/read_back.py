"""Compare a folder for openvino-genai to the model, and run it on whole texts, token by token, and greedily."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.genai.graph import digest
from qatkit.export.interface import InputError, ReadBack
from qatkit.export.openvino.runtime import PRECISE, compiled, evaluate, read_model
from qatkit.export.openvino_genai.graph import is_float_constant
from qatkit.export.transformers_folder import compare_tensors
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.prepare import qat_layers, quantized_weights

GRAPH = "openvino_model.xml"
"""The file that openvino-genai opens."""
EXACT_CACHE = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
"""The options without which OpenVINO quantizes activations and the cache."""
STEPS = 16
"""The number of tokens that are read one at a time, and of tokens that are generated."""


@torch.no_grad()
def compare_and_load(trained: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare codes, scales, zero points, decoded weights and all other parameters, and load the graph.

    Args:
        trained: The model, in eval mode on the CPU.
        path: A folder written by `export_openvino_genai`.
        threads: Number of threads that OpenVINO uses.
    """
    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    try:
        read = read_model(path / GRAPH)
        failures = _weight_failures(trained, read) + _parameter_failures(trained, read)
        runtime = Decoder(trained, path, read, threads)
    except QatkitError as error:
        return ReadBack(weights, [f"{path.name} cannot be read: {error}"], None)
    return ReadBack(weights, failures, runtime, runtime.generation_failures)


def _weight_failures(trained: nn.Module, read: Any) -> list[str]:
    from openvino import opset13 as ops

    nodes = {node.get_friendly_name(): node for node in read.get_ordered_ops()}
    layers = dict(qat_layers(trained))
    ending = ".weight.codes"
    failures = [
        f"'{key}': the model has no such quantized layer"
        for key in nodes
        if key.endswith(ending) and key.removesuffix(ending) not in layers
    ]
    for name, layer in layers.items():
        assert layer.weight_fake_quant is not None
        spec = layer.weight_fake_quant.spec
        scale, zero_point = layer.weight_fake_quant.qparams(layer.matrix)
        expected = {"codes": quantize(layer.matrix, scale, zero_point, spec), "scale": scale}
        if not spec.symmetric:
            expected["zero_point"] = zero_point.expand(scale.shape)
        for part, values in expected.items():
            key = f"{name}.weight.{part}"
            found = None
            if (node := nodes.get(key)) is not None:
                found = torch.from_numpy(evaluate(ops.convert(node, "f32")).reshape(values.shape))
            failures += compare_tensors(key, part.replace("_", " ") + "s" * (part != "codes"), found, values)
        decoder = nodes.get(f"{name}.weight")
        if decoder is None or [each.get_node().get_type_name() for each in decoder.output(0).get_target_inputs()] != [
            "MatMul"
        ]:
            failures.append(f"layer '{name}': no product of {GRAPH} reads its weight")
        else:
            decoded = torch.from_numpy(evaluate(decoder))
            failures += compare_tensors(f"{name}.weight", "decoded values", decoded, layer.fake_quantized_weight())
    return failures


def _parameter_failures(trained: nn.Module, read: Any) -> list[str]:
    """The parameters that are not quantized are constants with the same values."""
    stored = {digest(node.data.reshape(-1)) for node in read.get_ordered_ops() if is_float_constant(node)}
    packed = {f"{name}.weight" for name, _ in qat_layers(trained)}
    return [
        f"'{key}': {GRAPH} does not contain these values"
        for key, value in trained.named_parameters()
        if key not in packed and "fake_quant" not in key and digest(value.detach().numpy().reshape(-1)) not in stored
    ]


def compare_data(path: Path, tokenizer: Any, batch: Any) -> list[str]:
    """Compare how openvino-genai and the data's tokenizer encode and decode the first text of a batch."""
    import openvino_genai

    ids = batch["input_ids"][0].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    try:
        found = openvino_genai.Tokenizer(str(path))
        encoded = found.encode(text).input_ids.data[0].tolist()
        decoded, end = found.decode(ids), found.get_eos_token_id()
    except Exception as error:  # openvino_genai's exceptions share no base class
        return [f"openvino-genai cannot run the tokenizer of {path.name}: {error}"]
    compared = {
        "encodes a text": (encoded, tokenizer(text).input_ids),
        "decodes a text": (decoded, text),
        "ends a text": (end, tokenizer.eos_token_id),
    }
    return [
        f"the tokenizer of {path.name} {what} differently from the tokenizer of the data"
        for what, (own, expected) in compared.items()
        if own != expected and expected is not None
    ]


class Decoder:
    """Runs the graph of a folder in OpenVINO, called like the model, with an empty cache of keys and values.

    Args:
        trained: The trained model, whose choice of tokens is compared.
        path: The folder.
        read: Its graph.
        threads: Number of threads that OpenVINO uses; None uses its default.

    Raises:
        QatkitError: OpenVINO cannot compile the graph.
    """

    def __init__(self, trained: nn.Module, path: Path, read: Any, threads: int | None) -> None:
        self._trained: Any = trained
        self._path, self._threads = path, threads
        self._request = compiled(read, threads, EXACT_CACHE).create_infer_request()
        self._first: tuple[Tensor, Tensor] | None = None

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> dict[str, Tensor]:
        """The logits ``[batch, tokens, vocabulary]``, by name.

        Raises:
            InputError: a text is padded on the left, or there are inputs that the graph does not have.
        """
        if given := [name for name, value in others.items() if value is not None]:
            raise InputError(f"openvino-genai does not take {', '.join(given)}", advice="pass input_ids only")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if bool((mask.long().diff(dim=1) > 0).any()):
            raise InputError("a text is padded on the left", advice="pad on the right: padding_side='right'")
        self._request.reset_state()
        logits = self._run(input_ids, mask.long(), 0)
        if self._first is None:
            count = min(STEPS, int(mask[0].sum()))  # padding follows the text
            self._first = input_ids[0, :count], logits[0, :count]
        return {"logits": logits}

    def _run(self, ids: Tensor, mask: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        found = self._request.infer(arrays | {"beam_idx": np.arange(len(ids), dtype=np.int32)})
        return torch.from_numpy(found["logits"].copy())

    def generation_failures(self) -> list[str]:
        """Read the first text token by token, and let openvino-genai continue it greedily.

        The logits must equal those of the whole text, up to rounding. Each generated token must be the one that the
        trained model finds most probable, up to rounding.
        """
        if self._first is None:
            return []
        tokens, expected = self._first
        self._request.reset_state()
        found = torch.stack(
            [
                self._run(tokens[None, place : place + 1], torch.ones(1, place + 1, dtype=torch.long), place)[0, 0]
                for place in range(len(tokens))
            ]
        )
        scale = float(expected.abs().mean())
        apart, limit = float((found - expected).abs().mean()) / scale, 1e-4
        failures = []
        if not apart <= limit:
            failures.append(
                f"token by token, the logits differ by {apart:.2g} of their mean magnitude; the limit is {limit:.2g}"
            )
        return failures + self._greedy_failures(tokens, limit * scale)

    @torch.no_grad()
    def _greedy_failures(self, tokens: Tensor, limit: float) -> list[str]:
        import openvino
        import openvino_genai

        prompt = tokens[: len(tokens) // 2 + 1]
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = min(STEPS, self._trained.config.max_position_embeddings - len(prompt))
        config.do_sample, config.ignore_eos = False, True
        ids = prompt[None].contiguous().numpy()
        try:
            given = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
            new = pipeline(self._path, self._threads).generate(given, config).tokens[0]
        except Exception as error:  # openvino_genai's exceptions share no base class
            return [f"openvino-genai cannot run {self._path.name}: {error}"]
        text = torch.cat([prompt, torch.tensor(new)])
        logits = self._trained(input_ids=text[None]).logits[0, len(prompt) - 1 : -1]
        short = logits.max(dim=-1).values - logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        if len(new) != config.max_new_tokens or bool((short > limit).any()):
            return [f"openvino-genai generates the tokens {new}, which the trained model does not"]
        return []


def pipeline(path: Path, threads: int | None = None) -> Any:
    """Open a folder with openvino-genai, with the options with which it computes what training computed."""
    import openvino_genai

    return openvino_genai.LLMPipeline(str(path), "CPU", **pipeline_options(threads))


def pipeline_options(threads: int | None = None) -> dict[str, str]:
    """Return the options of `pipeline`."""
    options = PRECISE | EXACT_CACHE | {"ATTENTION_BACKEND": "SDPA"}
    return options | ({} if threads is None else {"INFERENCE_NUM_THREADS": str(threads)})
