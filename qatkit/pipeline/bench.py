"""The bench step, which measures the speed of a run's exported files, and names those whose speed it cannot measure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError
from qatkit.export.decoding import Decoder
from qatkit.export.format_row import ExportFormat
from qatkit.export.separate import SeparateError
from qatkit.export.verification import check_python
from qatkit.pipeline.export import first_batch, held_out_data
from qatkit.pipeline.serving import Bench, bench_run
from qatkit.pipeline.verify import export_digests
from qatkit.report.decoding import Decoded, content, time_decoders
from qatkit.run.exports import Exported, exports_of, interpreter_of
from qatkit.run.folder import Run
from qatkit.tasks import declared_task, task_of

PROMPT_TOKENS, NEW_TOKENS = 128, 32
"""The defaults, if they fit into the model's context."""


RECORD, SCHEMA = "decoding.json", 1
"""The file in a run folder, and the version of its content."""


@dataclass(frozen=True)
class _Record:
    """The content of ``decoding.json``: by export, what was measured, and the digests of the files."""

    files: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What is measured; None is the default."""

    batch_sizes: Sequence[int] | None = None
    against: bool = False
    """Also measure the runtime's own quantization of the floating-point file."""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    threads: int = 1
    python: Path | None = None
    """The interpreter of an environment with the runtime, for formats that need one."""


@dataclass(frozen=True)
class Decodings:
    """The measured language models of a run."""

    prompt_tokens: int
    new_tokens: int
    files: dict[str, Decoded]
    """Measurements by export."""
    dense: dict[str, str]
    """The dense export in the same format, for every other export."""


@dataclass(frozen=True)
class Speeds:
    """The speed of a run's exported files."""

    latency: Bench | None
    """Files that are called once per batch; None if the run has none."""
    decoding: Decodings | None
    """Language models that write text; None if the run has none."""
    not_measured: dict[str, str]
    """The reason for every other export."""


def measure_speeds(run: Run, request: Request) -> Speeds:
    """Measure every exported file of a run. Speeds of language models are also written to ``decoding.json``.

    Raises:
        QatkitError: no speed can be measured, a file is missing, or an option has no effect or does not fit.
    """
    run.check_writes()
    run.check_recipe()
    exports, data = exports_of(run), held_out_data(run)
    check_python([exported.format for exported in exports], request.python, "--python")
    for exported in exports:
        if not exported.path.exists():
            raise QatkitError("there is no such file", key=str(exported.path), advice=f"run `qatkit export {run.out}`")
    batch = first_batch(data)
    causal = task_of(batch, declared_task(data)).name == "causal"
    called = [exported for exported in exports if exported.format.benchmark]
    written = [exported for exported in exports if exported.format.decoder] if causal else []
    reasons = {exported.name: exported.format.untimed for exported in exports if exported not in (*called, *written)}
    _check_options(request, bool(called), bool(written))
    decoding = _decode(run, written, batch, request, reasons) if written else None
    if not called and (decoding is None or not decoding.files):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise QatkitError(f"no speed can be measured ({why})", key="export.format", advice="export another format")
    if decoding is not None and decoding.files:
        _write(run, exports, decoding, request.threads)
    latency = (
        bench_run(run, called, request.batch_sizes or [1, 64], request.threads, request.against) if called else None
    )
    return Speeds(latency, decoding, reasons)


def _check_options(request: Request, called: bool, written: bool) -> None:
    """Raise an error if an option has no effect."""
    for option, given, used, what in (
        ("--batch", request.batch_sizes, called, "onnx or openvino"),
        ("--against", request.against, called, "onnx"),
        ("--prompt-tokens", request.prompt_tokens, written, "causal language models"),
        ("--new-tokens", request.new_tokens, written, "causal language models"),
    ):
        if given and not used:
            raise QatkitError(f"has no effect, because the run has no exports of {what}", key=option, advice="omit it")


def _decode(run: Run, exports: Sequence[Exported], batch: Any, request: Request, reasons: dict[str, str]) -> Decodings:
    """Time the files of each format alternately; `reasons` receives those that cannot be opened."""
    config: Any = getattr(run.load_model(exports[-1].stage), "config", None)
    prompt, new = lengths(request.prompt_tokens, request.new_tokens, getattr(config, "max_position_embeddings", None))
    ids = batch["input_ids"].flatten().tolist()
    ids = (ids * (prompt // len(ids) + 1))[:prompt]
    files: dict[str, Decoded] = {}
    dense: dict[str, str] = {}
    for row in dict.fromkeys(exported.format for exported in exports):
        own = [exported for exported in exports if exported.format is row]
        files |= _decode_format(run, row, own, (ids, new), request, reasons)
        plain = next((each.name for each in own if each.stage in run.uncompressed and each.name in files), None)
        dense |= {each.name: plain for each in own if plain and each.name in files and each.name != plain}
    return Decodings(prompt, new, files, dense)


def _decode_format(
    run: Run,
    row: ExportFormat,
    exports: Sequence[Exported],
    text: tuple[list[int], int],
    request: Request,
    reasons: dict[str, str],
) -> Mapping[str, Decoded]:
    python = (request.python or interpreter_of(run.recipe, row)) if row.environment else None
    if row.environment and python is None:
        reason = f"{row.runtime} runs in its own environment: run `qatkit environment {row.name} FOLDER`, pass --python"
        reasons |= {exported.name: reason for exported in exports}
        return {}
    with ExitStack() as stack:
        opened = {}
        for exported in exports:
            try:
                row.check_packages()
                opened[exported.name] = Decoder(row, exported.path, request.threads, python)
                stack.callback(opened[exported.name].close)
            except (QatkitError, SeparateError) as error:
                reasons[exported.name] = f"{row.runtime.rstrip(',')} cannot open it: {error}"
        if not opened:
            return {}
        sizes = {exported.name: exported.bytes for exported in exports}
        try:
            return time_decoders(opened, sizes, *text)
        except SeparateError as error:
            reasons |= {name: f"{row.runtime.rstrip(',')} fails: {error}" for name in opened}
            return {}


def _write(run: Run, exports: Sequence[Exported], found: Decodings, threads: int) -> None:
    """Write the measurements to the run folder, for the report."""
    text = {"prompt_tokens": found.prompt_tokens, "new_tokens": found.new_tokens, "threads": threads}
    digests = {each.name: export_digests(run, each) for each in exports if each.name in found.files}
    files = {
        name: {"measured": text | file, "digests": digests[name]}
        for name, file in content(found.files, found.dense).items()
    }
    write_signed(run.out / RECORD, {"files": files}, SCHEMA, partial(json.dumps, indent=1))


def read_decoding(run: Run, exports: Sequence[Exported]) -> dict[str, dict[str, Any]]:
    """Return the measurements of language models by export, without those of files that have changed since.

    Raises:
        QatkitError: the record is corrupt.
    """
    found = read_signed(run.out / RECORD, _Record, SCHEMA, f"run `qatkit bench {run.out}`")
    files = {} if found is None else found["files"]
    return {
        exported.name: files[exported.name]["measured"]
        for exported in exports
        if exported.name in files and files[exported.name]["digests"] == export_digests(run, exported)
    }


def lengths(prompt: int | None, new: int | None, context: int | None) -> tuple[int, int]:
    """Return the numbers of prompt tokens and new tokens.

    Args:
        prompt: The given number of prompt tokens; None takes 128, or half of a shorter context.
        new: The given number of new tokens; None takes 32, or what a shorter context leaves.
        context: The largest number of tokens of the model; None if it has no limit.

    Raises:
        QatkitError: they do not fit into the context.

    Example:
        >>> lengths(None, None, 2048), lengths(None, None, 64), lengths(16, None, None)
        ((128, 32), (32, 31), (16, 32))
    """
    limit = context or PROMPT_TOKENS + NEW_TOKENS + (prompt or 0) + (new or 0) + 1
    first = prompt or max(1, min(PROMPT_TOKENS, limit // 2, limit - 1 - (new or 0)))
    then = new or max(2, min(NEW_TOKENS, limit - 1 - first))
    if first + then >= limit:  # onnxruntime-genai keeps room for one more token
        raise QatkitError(
            f"{first} prompt tokens and {then} new tokens do not fit into the model's context of {context} tokens",
            key="--prompt-tokens" if prompt else "--new-tokens",
            advice="use fewer tokens",
        )
    return first, then
