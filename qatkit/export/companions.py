"""Companion files of a transformers model's weights: config, generation config and tokenizer."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qatkit.common.files import naming

_IGNORED = {"quantization_config", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Keys of JSON files that an export adds or that name the writer's version."""


def export_config(model: nn.Module) -> Any:
    """Return a config that matches a model's weights; None if the model has no transformers config.

    With ``tie_word_embeddings: true``, a config would make `from_pretrained` overwrite separate output weights, so the
    exported config sets it to false if the weights are not tied.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return None
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return config
    outputs, inputs = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]  # transformers
    if outputs is None or inputs is None or outputs.weight is inputs.weight:
        return config
    untied: Any = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    return untied


def save_companions(names: Iterable[str], model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save the named companion files that exist.

    Args:
        names: Any of "config", "generation_config" and "tokenizer".
        model: The exported model.
        tokenizer: The tokenizer of the data, or None.
        folder: The output folder.
    """
    companions = {
        "config": export_config(model),
        "generation_config": getattr(model, "generation_config", None),
        "tokenizer": tokenizer,
    }
    for name in names:
        if hasattr(companion := companions[name], "save_pretrained"):
            with naming(folder):
                companion.save_pretrained(folder)


def compare_companions(
    names: Iterable[str], model: nn.Module, tokenizer: Any, folder: Path, skip: Collection[str] = ()
) -> list[str]:
    """Compare the companion files in an exported folder to the trained model's.

    Args:
        names: The companions that the format saves; others are compared if they exist in the folder.
        model: The trained model.
        tokenizer: The tokenizer of the data, or None.
        folder: The exported folder.
        skip: Companions that are not compared.

    Returns:
        Descriptions of all differences.
    """
    failures: list[str] = []
    for name in sorted({"config", "generation_config", "tokenizer"}.difference(skip)):
        with tempfile.TemporaryDirectory() as temporary:
            save_companions([name], model, tokenizer, Path(temporary))
            for expected in sorted(Path(temporary).iterdir()):
                exported = folder / expected.name
                if exported.is_file():
                    failures += _compare(expected, exported)
                elif name in names:
                    failures.append(f"{expected.name}: not in the folder")
    return failures


def _compare(expected: Path, exported: Path) -> list[str]:
    if expected.read_bytes() == exported.read_bytes():
        return []
    if expected.suffix != ".json":
        return [f"{exported.name}: the content differs from the trained model's"]
    trained = json.loads(expected.read_text(encoding="utf-8"))
    try:
        saved = json.loads(exported.read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"{exported.name} is not JSON ({error})"]
    if not isinstance(trained, dict) or not isinstance(saved, dict):
        return [f"{exported.name}: the content differs from the trained model's"]
    return [
        json_difference(exported.name, key, saved.get(key), trained.get(key))
        for key in sorted({*trained, *saved} - _IGNORED)
        if trained.get(key) != saved.get(key)
    ]


def json_difference(file: str, key: str, saved: Any, trained: Any) -> str:
    """Describe a value in a JSON file that differs from the trained model's.

    Example:
        >>> json_difference("config.json", "vocab_size", 5, None)
        "config.json: 'vocab_size' is 5, but null in the trained model"
    """
    return f"{file}: '{key}' is {_short(saved)}, but {_short(trained)} in the trained model"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
