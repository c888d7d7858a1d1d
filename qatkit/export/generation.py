"""Let an exported language model continue a prompt in its runtime, greedily and piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from qatkit.errors import QatkitError
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import FORMATS
from qatkit.export.transformers_folder import quietly

Generate = Callable[[Path, str, int, Path | None], Iterator[str]]
"""``(path, prompt, tokens, python)``; yields the pieces of the new text."""


def generate(row: ExportFormat, path: Path, prompt: str, tokens: int, python: Path | None = None) -> Iterator[str]:
    """Yield the pieces of a text that continues a prompt; each token is the most probable one.

    Args:
        row: The format of the file.
        path: The exported file or folder of a causal language model.
        prompt: The beginning of the text.
        tokens: The largest number of new tokens.
        python: The interpreter of an environment with the runtime, for formats that need one.

    Raises:
        QatkitError: the format is not run as a text generator, the file has no tokenizer, or the runtime fails.
    """
    if not row.generate:
        names = [name for name, each in FORMATS.items() if each.generate]
        raise QatkitError(
            f"'{row.name}' files do not generate text", key="--format",
            advice=f"use {', '.join(names[:-1])} or {names[-1]}; `qatkit export RUN --format FORMAT` writes it",
        )  # fmt: skip
    if row.environment and python is None:
        raise QatkitError(
            f"{row.runtime} does not run in the environment of qatkit", key="--python",
            advice=f"run `qatkit environment {row.name} FOLDER`, and pass the interpreter that it prints",
        )  # fmt: skip
    row.check_packages()
    pieces: Iterator[str] = row.call("generate", path, prompt, tokens, python)
    return pieces


def in_transformers(path: Path, prompt: str, tokens: int, python: Path | None) -> Iterator[str]:
    """Generate with transformers from a folder, or from a GGUF file, whose weights it decodes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

    folder = path if path.is_dir() else path.parent
    options: dict[str, Any] = {"local_files_only": True}
    options |= {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        with quietly():
            model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
            model.eval()
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise QatkitError(
            f"transformers cannot load a language model with a tokenizer: {str(error).strip().splitlines()[0]}",
            key=str(path), advice="pass a run whose model is a causal language model and whose data has a tokenizer",
        ) from error  # fmt: skip
    streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[Exception] = []

    def run() -> None:
        try:
            inputs = tokenizer(prompt, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=streamer)
        except Exception as error:  # raised again in the caller's thread
            failed.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise QatkitError(f"transformers failed: {failed[0]}", key=str(path), advice="use a shorter prompt")


def in_genai(path: Path, prompt: str, tokens: int, python: Path | None) -> Iterator[str]:
    """Generate with onnxruntime-genai."""
    import onnxruntime_genai as genai

    try:
        model = genai.Model(str(path))
        tokenizer = genai.Tokenizer(model)
        ids = tokenizer.encode(prompt)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + tokens, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids)
        stream = tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])
    except RuntimeError as error:
        raise QatkitError(
            f"onnxruntime-genai failed: {error}", key=str(path),
            advice="use a shorter prompt or fewer tokens: both must fit into the model's context",
        ) from error  # fmt: skip
