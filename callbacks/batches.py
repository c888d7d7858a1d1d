"""Read the first training batches without changing the batches that training receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import distributed

from qatkit.errors import QatkitError

Result = TypeVar("Result")


def first_batches(loader: Any, count: int) -> Iterator[Any]:
    """Yield the first `count` batches of a loader, then restore its position.

    The random states that determine the training order and the state of a stateful loader are restored.

    Raises:
        QatkitError: the module trains on multiple loaders at once.
    """
    if isinstance(loader, (list, tuple, dict)):
        raise QatkitError(
            f"the training data loader is a {type(loader).__name__} of {len(loader)} loaders, so the calibration "
            "batches are ambiguous",
            key="calibration",
            advice="for a list of batches, pass DataLoader(batches, batch_size=None); for multiple loaders, call "
            "prepare_qat and qatkit.calibrate(module, batches, forward) yourself, or use dynamic activations "
            "(strategy='token')",
        )
    sources = [getattr(loader, "generator", None), getattr(getattr(loader, "sampler", None), "generator", None)]
    generators = [source for source in sources if isinstance(source, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    place = loader.state_dict() if stateful else None
    try:
        yield from islice(loader, count)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if stateful:
            loader.load_state_dict(place)


def as_training_does(
    trainer: Trainer, module: LightningModule, forward: Callable[[LightningModule, Any], Result]
) -> Callable[[Any], Result]:
    """Return a function that runs `forward` on a batch, on the training device and in the training precision.

    Weights that FSDP2 gathers for the forward pass are sharded again afterwards.
    """

    def run(batch: Any) -> Result:
        batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
        with trainer.precision_plugin.forward_context():
            result = forward(module, batch)
        _reshard(module)
        return result

    return run


def _reshard(module: LightningModule) -> None:
    """Shard weights again that FSDP2 keeps whole until a backward; Lightning restores a checkpoint only into shards."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def on_every_process(work: Callable[[], object]) -> None:
    """Run `work` on every process, and raise an error on all processes if it fails on one.

    Without this, the other processes would hang in their next collective.

    Raises:
        Exception: the original error, if `work` failed on this process.
        QatkitError: `work` failed on another process; the error has the fields of the original error.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        work()
        return
    error: Exception | None = None
    try:
        work()
    except Exception as raised:  # errors of any type, because the other processes must stop as well
        error = raised
    errors: list[dict[str, str] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(errors, None if error is None else _fields(error))
    if error is not None:
        raise error
    for rank, failed in enumerate(errors):
        if failed is not None:
            raise QatkitError(f"{failed['problem']} (on rank {rank})", **_without(failed, "problem"))


def module_forward(module: LightningModule, batch: Any) -> object:
    """Call the module with a mapping batch as keyword arguments, or with the first element of a tuple or list.

    Raises:
        QatkitError: the module does not accept these arguments.
    """
    try:
        if isinstance(batch, Mapping):
            return module(**batch)
        return module(batch[0] if isinstance(batch, (tuple, list)) else batch)
    except (TypeError, NotImplementedError) as error:
        raise QatkitError(
            f"calling {type(module).__name__} on a training batch failed ({error})",
            key="calibration_forward",
            advice="pass a function such as lambda module, batch: module.my_model(batch['x'])",
        ) from error


def _fields(error: Exception) -> dict[str, str]:
    """The fields of an error, as another process can raise it."""
    if isinstance(error, QatkitError):
        return {"problem": error.problem, "key": error.key, "advice": error.advice, "origin": error.origin}
    return {"problem": f"{type(error).__name__}: {error}"}


def _without(fields: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in fields.items() if key != name}
