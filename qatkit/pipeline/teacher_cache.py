"""The teacher cache of a stage: its fingerprint and batches, and how it is written and opened."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from qatkit import stages as blocks
from qatkit.common.device import device_count, device_type
from qatkit.data.streaming import StreamLoader
from qatkit.distillation.cache import CachedTeacher, cache_teacher
from qatkit.distillation.manifest import is_complete, read_manifest
from qatkit.errors import QatkitError
from qatkit.pipeline.vocabulary import vocabulary
from qatkit.recipe import DistillConfig, TrainerConfig
from qatkit.run.fingerprint import stage_inputs
from qatkit.run.folder import Run
from qatkit.run.stage_files import check_files
from qatkit.tasks import model_inputs, to_logits

WEIGHTS = ("config.json", "*.safetensors")
"""Files in a model folder that determine the outputs of the model."""


def cache_folder(run: Run, stage: str) -> Path:
    """Return the folder of a stage's teacher cache."""
    cache = _block(run, stage).cache
    return Path(cache.folder) if cache is not None and cache.folder else run.out / "teachers" / stage


def write_caches(run: Run) -> Iterator[str]:
    """Write the cache of every stage that uses one, and yield a line of text for each.

    Raises:
        QatkitError: no stage uses a teacher cache, a cache would be written outside the run's folder, or for the same
            reasons as in `write_cache`.
    """
    run.check_writes(training=True)
    wanted = [name for name, stage in run.recipe.stages.items() if stage.distill is not None and stage.distill.cache]
    if not wanted:
        raise QatkitError(
            f"no stage of {list(run.recipe.stages)} uses a teacher cache",
            key="stages",
            advice="set distill: {cache: {top_k: 64}} in one of these stages",
        )
    for stage in wanted:
        started = time.perf_counter()
        folder = write_cache(run, stage)
        cached, _ = open_cache(run, stage)
        size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
        yield (
            f"stage {stage}: {len(cached):,} samples, {cached.tokens:,} tokens, "
            f"{size / max(cached.tokens, 1):.0f} bytes per token, in {time.perf_counter() - started:.1f} s: {folder}"
        )


def write_cache(run: Run, stage: str) -> Path:
    """Write the teacher outputs for all training samples of a stage, unless they exist; resume after an interruption.

    Raises:
        QatkitError: the teacher's stage is not finished, or the folder contains a cache that is corrupt or has a
            different fingerprint.
    """
    folder, distill = cache_folder(run, stage), resolved_block(run, stage)
    assert distill.cache is not None
    rows, prints, size = _inputs(run, stage)
    if is_complete(folder):
        CachedTeacher(folder, _served(folder, prints))  # raises if something differs
        return folder
    device = torch.device(distill.teacher_device or device_type(run.recipe.trainer.accelerator))
    model = run.load_model(run.recipe.teacher_of(stage))
    teacher = blocks.distill.teacher(distill, model).to(device)
    teacher.device = device  # inputs are moved to it
    layers = blocks.distill.compared_layers(distill)
    with _recorded(teacher.model, layers) as states, _precision(run.recipe.trainer, device):

        def outputs(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            args, kwargs = model_inputs(batch)
            logits = to_logits(teacher(*args, **kwargs))
            return logits[..., :size], dict(states)

        try:
            cache_teacher(outputs, rows, folder, prints, distill.cache.top_k, distill.temperature)
        except QatkitError as error:
            if error.key == "k":  # the argument's name; the recipe calls it top_k
                raise error.with_fields(key=f"stages.{stage}.distill.cache.top_k") from None
            raise
    return folder


def open_cache(run: Run, stage: str) -> tuple[CachedTeacher, int | None]:
    """Open a stage's teacher cache; also return the vocabulary size if logits were trimmed to it.

    Raises:
        QatkitError: the cache is missing, incomplete or corrupt, or has a different fingerprint.
    """
    _, prints, size = _inputs(run, stage)
    command = f"`qatkit cache-teacher RECIPE --out {run.out}`"
    folder = cache_folder(run, stage)
    return CachedTeacher(folder, _served(folder, prints), command), size


def _inputs(run: Run, stage: str) -> tuple[Iterable[Any], dict[str, str], int | None]:
    """The batches to cache, the fingerprint of the cache, and the vocabulary size if logits are trimmed to it."""
    config, distill = run.recipe.stages[stage], _block(run, stage)
    data = run.build_data(config.batch_size)
    data.prepare_data()
    data.setup("fit")
    rows, samples = _batches(run, stage, data)
    source = run.recipe.teacher_of(stage)
    if source is not None and run.find(source) is None:
        raise QatkitError(
            f"the teacher, stage '{source}', is not finished in {run.out}",
            key=f"stages.{stage}.distill",
            advice=f"run `qatkit run RECIPE --out {run.out} --until {source}` first",
        )
    if source is not None:
        check_files(run.folder(source), run.record(source))
    models = run.stage_models()
    size = vocabulary(models[stage], models.teacher(stage), data, stage)
    prints = {"teacher": source or "the model that the factory builds"}
    inputs = stage_inputs(run.recipe, stage)
    if source is None:
        prints |= {key: str(value) for key, value in inputs.items() if key.startswith("model.")}
        folders = [Path(value) for value in run.recipe.model.args.values() if isinstance(value, str)]
        prints["teacher weights"] = _hash_files(folder for folder in folders if folder.is_dir())
        prints["seed"] = str(run.recipe.seed)
    else:
        prints["teacher weights"] = _hash_files([run.folder(source) / "model", run.folder(source)])
    prints |= {key: str(value) for key, value in inputs.items() if key.startswith("data.")}
    if (tokenizer := getattr(data, "tokenizer", None)) is not None:
        prints["tokenizer"] = _hash(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    assert distill.cache is not None
    prints |= {"top_k": str(distill.cache.top_k), "temperature": str(distill.temperature), "samples": samples}
    prints["classes"] = "all" if size is None else str(size)
    prints["hidden"] = ", ".join(blocks.distill.compared_layers(resolved_block(run, stage))) or "none"
    precision = (run.recipe.trainer.precision, distill.teacher_dtype, distill.teacher_bits)
    return rows, prints | {"precision": " ".join(str(part) for part in precision if part is not None)}, size


def _batches(run: Run, stage: str, data: LightningDataModule) -> tuple[Iterable[Any], str]:
    """All training samples of a stage, each once, and their description for the fingerprint."""
    loader, config = data.train_dataloader(), run.recipe.stages[stage]
    processes = device_count(run.recipe.trainer.accelerator, run.recipe.trainer.devices)
    if isinstance(loader, StreamLoader):  # its epochs are not passes: each starts where the last one ended
        calibration = config.quantize.calibration_batches if config.quantize else 0
        count = (config.max_steps * config.accumulate + calibration) * processes
        return islice(chain.from_iterable(repeat(loader)), count), f"{count * config.batch_size} of the stream"
    if not isinstance(loader, DataLoader):
        return loader, "all"
    rows, samples = loader.dataset, "all"
    if isinstance(loader.sampler, DistributedSampler):
        wanted = config.max_steps * config.accumulate * config.batch_size * processes
        # the number of samples dropped so that the last batch is full depends on the number of processes
        if wanted <= len(rows) - processes * len(loader.sampler):  # type: ignore[arg-type]  # a map-style data set
            order: list[int] = []
            epoch = 0
            while len(order) < wanted:
                loader.sampler.set_epoch(epoch)
                order += list(loader.sampler)
                epoch += 1
            rows, samples = Subset(rows, order[:wanted]), f"{wanted} in the order of seed {run.recipe.seed}"
    return DataLoader(rows, config.batch_size, collate_fn=loader.collate_fn), samples


def resolved_block(run: Run, stage: str) -> DistillConfig:
    """Return the ``distill`` block of a stage, with globs replaced by layer names."""
    models = run.stage_models()
    return blocks.distill.resolved(_block(run, stage), models[stage], models.teacher(stage))


def _block(run: Run, stage: str) -> DistillConfig:
    distill = run.recipe.stages[stage].distill
    assert distill is not None
    return distill


def _served(folder: Path, prints: dict[str, str]) -> dict[str, str]:
    """The fingerprint that a cache must have: a cache of all samples serves a stage that trains on fewer."""
    manifest = read_manifest(folder)
    samples = manifest.fingerprint.get("samples") if manifest is not None else None
    return prints | {"samples": samples} if samples == "all" else prints


def wait_for(folder: Path) -> None:
    """Wait until rank 0 has written a cache.

    Raises:
        QatkitError: the process that launched this one ended first.
    """
    starter = os.getppid()
    while not is_complete(folder):
        if os.getppid() != starter:  # no other process would write it
            raise QatkitError(
                f"rank 0 ended before {folder} was complete",
                key="teacher cache",
                advice="see the error of rank 0",
            )
        time.sleep(1)


@contextmanager
def _recorded(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the latest output of layers by name."""
    states: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[name] = output[0] if isinstance(output, (tuple, list)) else output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _precision(trainer: TrainerConfig, device: torch.device) -> torch.autocast:
    """The autocast context that a live teacher has in a training step."""
    dtype = torch.float16 if trainer.precision == "16-mixed" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=trainer.precision != "32-true")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _hash_files(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
