"""Limitations of the format: which decoders, layers and tokenizers a folder for openvino-genai can hold."""

from __future__ import annotations

from typing import Any

from torch import nn

from qatkit.errors import QatkitError
from qatkit.export.formats import FORMATS
from qatkit.export.genai.decoders import check_decoder, check_float32
from qatkit.export.interface import PlannedExport
from qatkit.export.openvino_genai.graph import TYPES
from qatkit.export.transformers_folder import untied_linear_layers
from qatkit.schemes import Scheme

INSTEAD = "use export: {format: onnx_genai} or {format: gguf}"


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if a model cannot be exported for openvino-genai. Weights are not read.

    Raises:
        QatkitError: the model's architecture or the quantization of a layer or of the KV cache is not supported, or a
            package is missing.
    """
    check_decoder(model, planned, "openvino_genai", "openvino-genai", INSTEAD)
    for name in untied_linear_layers(model, planned.schemes, "openvino_genai", INSTEAD):
        _check_scheme(name, planned.schemes[name])
    check_float32(model)
    FORMATS["openvino_genai"].check_packages()


def _check_scheme(name: str, scheme: Scheme) -> None:
    weight = scheme.weight
    fits = (
        weight is not None
        and (weight.num_bits, weight.symmetric) in TYPES
        and weight.type == "int"
        and weight.strategy in ("channel", "group")
        and not weight.has_minimum
    )
    if scheme.activation is not None or not fits:
        raise QatkitError(
            f"layer '{name}': 'openvino_genai' supports only integer weights of 4 or 8 bits with scales per output "
            "channel or group, and inputs that are not quantized",
            advice=f"set weight: {{num_bits: 4, strategy: group, group_size: 64}}, remove activation, or {INSTEAD}",
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Raise an error if there is no tokenizer, or openvino-tokenizers cannot convert it.

    Raises:
        QatkitError: as above.
    """
    converted_tokenizer(tokenizer)


def converted_tokenizer(tokenizer: Any) -> tuple[Any, Any]:
    """Return a tokenizer and its detokenizer as OpenVINO models.

    Raises:
        QatkitError: the tokenizer is None, or openvino-tokenizers cannot convert it.
    """
    if tokenizer is None:
        raise QatkitError(
            "'openvino_genai' stores a tokenizer beside the model, but the data has none",
            advice="use text data such as qatkit.data:text, or pass tokenizer=, or use export: {format: dense}",
        )
    FORMATS["openvino_genai"].check_packages()
    from openvino_tokenizers import convert_tokenizer

    try:
        tokens, text = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # openvino_tokenizers raises exceptions of many kinds
        raise QatkitError(
            f"openvino-tokenizers cannot convert the {type(tokenizer).__name__}: {error}", advice=INSTEAD
        ) from error
    return tokens, text
