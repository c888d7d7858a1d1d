"""Search the smallest or fastest formats of anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatkit.errors import QatkitError
from qatkit.schemes import Scheme, scheme

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

    from qatkit.trials.bounded import Found, Goal


def search(
    module: LightningModule,
    data: LightningDataModule,
    max_loss: float = 0.01,
    runtime: str = "onnx",
    *,
    candidates: Sequence[str] | Mapping[str, Scheme] = ("W8A16", "W4A16"),
    minimize: Goal = "size",
    batch: int = 1,
    sparsity: str = "",
    depth: str = "",
    width: str = "",
    steps: int | None = None,
    budget: float | str = 2.0,
    distill: bool = True,
    student: str | None = None,
    model: str = "",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: Path | str = "runs/search",
    quiet: bool = False,
) -> Found:
    """Find the smallest or fastest formats of a trained module whose metric loses at most a given part.

    The module is trained in different formats, with its own `training_step` and `configure_optimizers`. The validation
    split decides; the result is measured in its runtime on the test split. The module is not changed.

    Args:
        module: A trained module. ``module(inputs)`` returns logits, or an object with ``.logits``.
        data: Training, validation and test splits; see `qatkit.tasks` for batches.
        max_loss: The largest loss of the metric: points if it is in percent, otherwise relative to `module`.
        runtime: An export format, such as "openvino", or a runtime in `qatkit.quantization.TARGETS`.
        candidates: Names of schemes, or schemes by name.
        minimize: "size" of the file, or "latency" in its runtime.
        batch: Samples per call, for latency.
        sparsity: Also try pruned weights: fractions or patterns, such as "0.5,2:4".
        depth: Also try fewer layers: fractions of the layers of the transformer `model` to keep, such as "0.5".
        width: Also try a narrower `model`: fractions of its channels or MLP neurons to keep.
        steps: Optimizer steps of a full training; the default is one pass over the training data.
        budget: Cost of all trainings: in full ones, or a string such as "30min" or "6trials".
        distill: Whether `module` is the teacher of all trainings.
        student: The submodule that `training_step` calls, if it is not the module itself.
        model: The submodule that is exported, if it is not the module itself.
        include: Globs over the names of layers whose formats are searched.
        exclude: Globs over the names of layers that are not quantized.
        trainer: Further arguments of the Trainer, such as ``{"accelerator": "gpu"}``.
        seed: Seed of every training.
        out: Folder of the exported files, ``search.json`` and ``search.html``.
        quiet: Whether to print nothing.

    Returns:
        The result. ``found.kept`` says whether the promise is kept on the test split; ``found.file`` is the exported
        file, and ``found.trained.model()`` the trained module.

    Raises:
        QatkitError: an argument is invalid, the data has no validation or test split, or a training fails.

    Example:
        >>> import tempfile, torch
        >>> from lightning.pytorch import LightningModule
        >>> from qatkit import QuantSpec, Scheme, search
        >>> from qatkit.data import SplitDataModule
        >>> class Linear(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(8, 2)
        ...     def forward(self, inputs):
        ...         return self.layer(inputs)
        ...     def training_step(self, batch, index):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), 1e-2)
        >>> _ = torch.manual_seed(0)
        >>> module, inputs = Linear(), torch.randn(64, 8)
        >>> samples = torch.utils.data.TensorDataset(inputs, module(inputs).argmax(-1))
        >>> data = SplitDataModule(samples, samples, samples, batch_size=16)
        >>> formats = {f"int{bits}": Scheme(QuantSpec(num_bits=bits)) for bits in (8, 2)}
        >>> with tempfile.TemporaryDirectory() as out:
        ...     found = search(module, data, 0.2, "dense", candidates=formats, steps=4, out=out, quiet=True)
        >>> found.kept, [each.group for each in found.decisions]
        (True, ['layer'])
    """
    from qatkit.trials.bounded import find
    from qatkit.trials.budget import Budget, parse_budget
    from qatkit.trials.module_subject import ModuleSubject
    from qatkit.trials.search_report import summary, write_report
    from qatkit.trials.variants import parse_variants

    if not 0 <= max_loss < 1:
        raise QatkitError(f"{max_loss} is out of range", key="max_loss", advice="use a part such as 0.01")
    if minimize not in ("size", "latency"):
        raise QatkitError(f"'{minimize}' is unknown", key="minimize", advice="use size or latency")
    formats = candidates if isinstance(candidates, Mapping) else {name: scheme(name) for name in candidates}
    limit = parse_budget(budget) if isinstance(budget, str) else Budget(budget)
    variants, folder = parse_variants(sparsity, depth, width), Path(out)
    subject = ModuleSubject(
        module, data, runtime, folder, steps, distill, student, model, include, exclude, trainer or {}, seed
    )
    folder.mkdir(parents=True, exist_ok=True)
    say = (lambda line: None) if quiet else print
    found = find(subject, formats, variants, max_loss, minimize, limit, batch, say)
    write_report(folder, type(module).__name__, found)
    for line in summary(found):
        say(line)
    return found
