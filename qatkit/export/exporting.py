"""Export one model in any format of the table, and verify the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qatkit.errors import QatkitError, under
from qatkit.export.companions import compare_companions, save_companions
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import FORMATS
from qatkit.export.interface import ExportContext
from qatkit.export.outputs import Forward
from qatkit.export.verification import Verification, check_python, judge_of, verify
from qatkit.quantization.targets import TARGETS
from qatkit.tasks import TASKS, Task

if TYPE_CHECKING:
    from torchmetrics import Metric


def export_model(
    model: nn.Module,
    format: str,
    path: Path | str,
    batches: Iterable[Any],
    *,
    tokenizer: Any = None,
    target: str | None = None,
    task: Task | str | None = None,
    forward: Forward | None = None,
    metric: Metric | None = None,
    class_dim: int | None = None,
    threads: int | None = None,
    python: Path | None = None,
) -> Verification:
    """Export a model, load the file in its runtime, and compare it to the model.

    All arguments are checked before anything is written. The file is written atomically. If transformers needs a config
    and a tokenizer to load it, they are written to the same folder.

    Args:
        model: A plain model, or one prepared by `prepare_qat` and calibrated. It is not changed.
        format: A name in `qatkit.export.FORMATS`, such as "gguf".
        path: The file, whose suffix is that of the format, or the folder if the format writes one. It is replaced.
        batches: Batches for verification, as in `verify`. Formats that trace the model use the first.
        tokenizer: The fast tokenizer of transformers to store with the model.
        target: A runtime in `qatkit.quantization.TARGETS`, for formats whose files depend on it.
        task: As in `verify`.
        forward: As in `verify`.
        metric: As in `verify`.
        class_dim: As in `verify`.
        threads: As in `verify`.
        python: As in `verify`.

    Returns:
        The comparison. If the file differs from the model, `passed` is False, and the differences are in `failures`.

    Raises:
        QatkitError: the format does not support the model, the tokenizer, the target or the suffix; a package is
            missing; there are no batches; or an argument of `verify` is invalid.

    Example:
        >>> import tempfile, torch
        >>> from qatkit import QuantSpec, prepare_qat
        >>> model, x = nn.Sequential(nn.Linear(8, 4)), torch.rand(16, 8)
        >>> _ = prepare_qat(model, weight=QuantSpec(num_bits=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model.safetensors"
        ...     export_model(model, "dense", file, [(x, torch.zeros(16).long())]).passed
        True
    """
    row, path = FORMATS.row(format, "format"), Path(path)
    row.check_packages()
    _check_path(row, path)
    check_python([row], python)
    known = TASKS.row(task, "task") if isinstance(task, str) else task
    judge_of(known, metric, class_dim)  # raises an error for an invalid argument
    row.check_model(model, task=known)
    if row.check_tokenizer:
        with under("tokenizer"):
            row.call("check_tokenizer", tokenizer)
    runtime = None if target is None else TARGETS.row(target, "target")
    if runtime is not None and row.name not in runtime.formats:
        formats = " or ".join(runtime.formats)
        raise QatkitError(f"'{target}' does not load '{row.name}' files", key="target", advice=f"use {formats}")
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise QatkitError("there are no batches", key="batches", advice="pass at least one batch for verification")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _evaluating(model):
        write_export(row, model, path, ExportContext(first, known, runtime, tokenizer))
    result = verify(model, path, chain([first], iterator), row.name, threads, known, forward, metric, class_dim, python)
    return with_companions(result, row, model, path, tokenizer, first)


def write_export(row: ExportFormat, model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write a model and the companion files of its format.

    Args:
        row: The format.
        model: The model in eval mode.
        path: The file, or the folder if the format writes one.
        context: Further inputs of the format, such as a batch.
    """
    row.call("write", model, path, context)
    save_companions(row.companions, model, context.tokenizer, row.folder_of(path))


def with_companions(
    verification: Verification, row: ExportFormat, model: nn.Module, path: Path, tokenizer: Any, batch: Any
) -> Verification:
    """Add the comparison of companion files, and of the tokenizer that a file may contain, to a verification.

    Args:
        verification: The comparison of weights and outputs.
        row: The format.
        model: The exported model.
        path: The file or folder.
        tokenizer: The tokenizer of the data, or None.
        batch: One batch.
    """
    failures = compare_companions(row.companions, model, tokenizer, row.folder_of(path), row.own_files)
    if row.compare_data:
        failures += row.call("compare_data", path, tokenizer, batch)
    return verification.with_failures(failures)


def _check_path(row: ExportFormat, path: Path) -> None:
    if row.is_folder and path.is_file():
        raise QatkitError(f"is a file, but '{row.name}' writes a folder", key=str(path), advice="pass a folder")
    if not row.is_folder and (path.suffix != row.suffix or path.is_dir()):
        seen = "is a folder" if path.is_dir() else f"does not end in {row.suffix}"
        raise QatkitError(
            f"{seen}, but '{row.name}' writes a {row.suffix} file",
            key=str(path),
            advice=f"pass a path such as {row.file_name}",
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and restore their modes at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
