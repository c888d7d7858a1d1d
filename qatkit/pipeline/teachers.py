"""Who teaches a stage of a recipe: a model, or the cache of what it said of the training data."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from qatkit import stages as blocks
from qatkit.data.streaming import StreamLoader
from qatkit.distillation.cache import CachedTeacher, cache_teacher, fingerprint_of, is_complete
from qatkit.distillation.vocabulary import Tokenizer, shared_vocab_size
from qatkit.errors import QatkitError
from qatkit.recipe import DistillConfig, TrainerConfig
from qatkit.run.architecture import Architecture
from qatkit.run.fingerprint import stage_inputs
from qatkit.tasks import model_inputs, to_logits

if TYPE_CHECKING:
    from qatkit.distillation.teacher import Teacher
    from qatkit.pipeline.loop import Run

WEIGHTS = ("config.json", "*.safetensors")
"""What decides what a model in a folder computes."""


@dataclass(frozen=True)
class Teaching:
    """What a stage learns from."""

    block: DistillConfig
    """With a name for every layer that is compared."""
    teacher: Teacher | CachedTeacher
    vocab_size: int | None
    """Tokens that student and teacher share, where their logits are padded to different widths."""


def teaching(run: Run, stage: str, first_process: bool) -> Teaching:
    """The teacher of a stage; one process makes the cache where the recipe wants one that is not there.

    Args:
        run: The recipe and its folder.
        stage: One with a distill block.
        first_process: Whether this process writes.

    Raises:
        QatkitError: the cache is of something else, or the two models do not share a vocabulary.
    """
    shapes = _shapes(run, stage)
    distill = blocks.distill.resolved(_block(run, stage), *shapes)
    data = run.build_data(run.recipe.stages[stage].batch_size)
    if distill.cache is None:
        model = run.load_model(run.recipe.teacher_of(stage))
        return Teaching(distill, blocks.distill.teacher(distill, model), vocabulary(*shapes, data, stage))
    if first_process:
        write_cache(run, stage)
    else:
        _wait_for(cache_folder(run, stage))
    cached, size = open_cache(run, stage)
    return Teaching(distill, cached, size)


def cache_folder(run: Run, stage: str) -> Path:
    """Where the cache of a stage's teacher is."""
    cache = _block(run, stage).cache
    return Path(cache.folder) if cache is not None and cache.folder else run.out / "teachers" / stage


def write_caches(run: Run) -> Iterator[str]:
    """The caches of all stages that want one; a line about each.

    Raises:
        QatkitError: no stage does, or as `write_cache`.
    """
    wanted = [name for name, stage in run.recipe.stages.items() if stage.distill is not None and stage.distill.cache]
    if not wanted:
        raise QatkitError(
            f"recipe: no stage of {list(run.recipe.stages)} learns from a cache; write "
            "distill: {cache: {top_k: 64}} in one"
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
    """Ask a stage's teacher for all that the stage will see, unless that was done; a killed process goes on.

    Raises:
        QatkitError: the teacher's stage is not finished, or the folder holds a cache of something else.
    """
    folder, distill = cache_folder(run, stage), blocks.distill.resolved(_block(run, stage), *_shapes(run, stage))
    assert distill.cache is not None
    rows, prints, size = _inputs(run, stage)
    if is_complete(folder):
        CachedTeacher(folder, _served(folder, prints))  # says what differs
        return folder
    device = torch.device(distill.teacher_device or blocks.distill.device_of(run.recipe.trainer))
    model = run.load_model(run.recipe.teacher_of(stage))
    teacher = blocks.distill.teacher(distill, model).to(device)
    teacher.device = device  # inputs go where it is
    layers = blocks.distill.compared_layers(distill)
    with _recorded(teacher.model, layers) as states, _precision(run.recipe.trainer, device):

        def answer(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            args, kwargs = model_inputs(batch)
            logits = to_logits(teacher(*args, **kwargs))
            return logits[..., :size], dict(states)

        try:
            cache_teacher(answer, rows, folder, prints, distill.cache.top_k, distill.temperature)
        except QatkitError as error:
            if str(error).startswith("k: "):
                raise QatkitError(f"stages.{stage}.distill.cache.top_{error}") from None
            raise
    return folder


def open_cache(run: Run, stage: str) -> tuple[CachedTeacher, int | None]:
    """The cache of a stage's teacher, and the tokens of the vocabulary where it was trimmed to them.

    Raises:
        QatkitError: it is missing, not complete or of something else.
    """
    _, prints, size = _inputs(run, stage)
    command = f"`qatkit cache-teacher RECIPE --out {run.out}`"
    folder = cache_folder(run, stage)
    return CachedTeacher(folder, _served(folder, prints), command), size


def vocabulary(student: nn.Module, teacher: nn.Module, data: LightningDataModule, stage: str) -> int | None:
    """Tokens that two language models share where their logits are padded to different widths; else None.

    Args:
        student: The model that trains.
        teacher: The model that teaches.
        data: May have the tokenizer that both read, as ``tokenizer``.
        stage: For errors.

    Raises:
        QatkitError: their tokenizers differ, or are not known.
    """
    widths = [_width(model) for model in (student, teacher)]
    if None in widths:
        return None
    tokenizers = [_tokenizer(model) or getattr(data, "tokenizer", None) for model in (student, teacher)]
    key = f"stages.{stage}.distill.teacher"
    if tokenizers[0] is None or tokenizers[1] is None:
        if widths[0] == widths[1]:
            return None
        raise QatkitError(
            f"{key}: the student has logits for {widths[0]} tokens and the teacher for {widths[1]}, and no tokenizer "
            "is known that both use; give the data module an attribute 'tokenizer'"
        )
    try:
        size = shared_vocab_size(tokenizers[0], tokenizers[1])
    except QatkitError as error:
        raise QatkitError(f"{key}: {error}") from None
    return size if widths[0] != widths[1] else None


def _inputs(run: Run, stage: str) -> tuple[Iterable[Any], dict[str, str], int | None]:
    """The batches that are cached, what the cache depends on, and the tokens that count."""
    config, distill = run.recipe.stages[stage], _block(run, stage)
    data = run.build_data(config.batch_size)
    data.prepare_data()
    data.setup("fit")
    rows, told = _batches(run, stage, data)
    source = run.recipe.teacher_of(stage)
    if source is not None and run.find(source) is None:
        raise QatkitError(
            f"stages.{stage}.distill: stage '{source}' teaches and is not finished in {run.out}; run "
            f"`qatkit run RECIPE --out {run.out} --until {source}` first"
        )
    shapes = _shapes(run, stage)
    size = vocabulary(*shapes, data, stage)
    prints = {"teacher": source or "the model as its factory makes it"}
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
    prints |= {"top_k": str(distill.cache.top_k), "temperature": str(distill.temperature), "samples": told}
    prints["classes"] = "all" if size is None else str(size)
    prints["hidden"] = ", ".join(blocks.distill.compared_layers(blocks.distill.resolved(distill, *shapes))) or "none"
    held = (run.recipe.trainer.precision, distill.teacher_dtype, distill.teacher_bits)
    return rows, prints | {"precision": " ".join(str(part) for part in held if part is not None)}, size


def _batches(run: Run, stage: str, data: LightningDataModule) -> tuple[Iterable[Any], str]:
    """All that a stage will see, each sample once, and which they are: all, or the first in the order of training."""
    loader, config = data.train_dataloader(), run.recipe.stages[stage]
    processes = _processes(run.recipe.trainer)
    if isinstance(loader, StreamLoader):  # its epochs are no passes: each begins where the one before it ended
        looked_at = config.quantize.calibration_batches if config.quantize else 0
        count = (config.max_steps * config.accumulate + looked_at) * processes
        return islice(chain.from_iterable(repeat(loader)), count), f"{count * config.batch_size} of the stream"
    if not isinstance(loader, DataLoader):
        return loader, "all"
    rows, told = loader.dataset, "all"
    if isinstance(loader.sampler, DistributedSampler):
        wanted = config.max_steps * config.accumulate * config.batch_size * processes
        # what a pass leaves out for the sake of whole batches may differ with the number of processes
        if wanted <= len(rows) - processes * len(loader.sampler):  # type: ignore[arg-type]  # a map-style data set
            order: list[int] = []
            epoch = 0
            while len(order) < wanted:
                loader.sampler.set_epoch(epoch)
                order += list(loader.sampler)
                epoch += 1
            rows, told = Subset(rows, order[:wanted]), f"{wanted} in the order of seed {run.recipe.seed}"
    return DataLoader(rows, config.batch_size, collate_fn=loader.collate_fn), told


def _served(folder: Path, prints: dict[str, str]) -> dict[str, str]:
    """What a cache must have been made from: one of all samples serves a stage that sees fewer."""
    held = fingerprint_of(folder).get("samples")
    return prints | {"samples": held} if held == "all" else prints


def _shapes(run: Run, stage: str) -> tuple[nn.Module, nn.Module]:
    """Student and teacher without values."""

    def built(source: str | None) -> nn.Module:
        record = run.find(source) if source is not None else None
        return run.build_model(record.architecture if record else None)

    config = run.recipe.stages[stage]
    with torch.device("meta"):
        own = config.model
        student = run.build_model(Architecture(own)) if own is not None else built(run.recipe.parent_of(stage))
        teacher = built(run.recipe.teacher_of(stage))
    return student if config.shrink is None else blocks.shrink.check(config.shrink, student), teacher


def _wait_for(folder: Path) -> None:
    """Until the first process has written a cache.

    Raises:
        QatkitError: the process that started this one ended before.
    """
    starter = os.getppid()
    while not is_complete(folder):
        if os.getppid() != starter:  # nobody else would ever write it
            raise QatkitError(f"teacher cache: the first process ended before {folder} was complete; see its error")
        time.sleep(1)


def _processes(trainer: TrainerConfig) -> int:
    if isinstance(trainer.devices, int):
        return trainer.devices
    return max(torch.cuda.device_count(), 1) if blocks.distill.device_of(trainer) == "cuda" else 1


@contextmanager
def _recorded(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What layers returned last, by their names."""
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
    """As a live teacher computes inside of the training step."""
    dtype = torch.float16 if trainer.precision == "16-mixed" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=trainer.precision != "32-true")


def _width(model: nn.Module) -> int | None:
    get = getattr(model, "get_output_embeddings", None)
    return getattr(get() if get is not None else None, "out_features", None)


def _tokenizer(model: nn.Module) -> Tokenizer | None:
    """That of a pretrained model, where one is beside its weights."""
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not source:
        return None
    from transformers import AutoTokenizer

    try:
        found: Tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return None
    return found


def _block(run: Run, stage: str) -> DistillConfig:
    distill = run.recipe.stages[stage].distill
    assert distill is not None
    return distill


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _hash_files(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
