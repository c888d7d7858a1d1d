"""The first training batches, looked at without changing what training will see."""

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
    """The first `count` batches of a loader, which then stands where it stood.

    The generators that decide the order of training are put back, and a loader that keeps a state of its own, such as
    a stream, is given that again.

    Raises:
        QatkitError: the module trains on several loaders at once, so that there is no one kind of batch.
    """
    if isinstance(loader, (list, tuple, dict)):
        raise QatkitError(
            f"calibration: training reads a {type(loader).__name__} of {len(loader)} loaders, and which of their "
            "batches the module takes is unknown; call prepare_qat and qatkit.calibrate(module, batches, forward) "
            "yourself, or use dynamic activations (strategy='token')"
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
    """`forward` of a batch that is where and in the precision that training has it."""

    def run(batch: Any) -> Result:
        batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
        with trainer.precision_plugin.forward_context():
            return forward(module, batch)

    return run


def on_every_process(work: Callable[[], object]) -> None:
    """Do what looks at a process's own batches, and fail on all of them where it fails on one.

    Otherwise those that saw nothing wrong would wait for it in their next collective.

    Raises:
        Exception: what the work raised here.
        QatkitError: it raised something on another process alone.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        work()
        return
    error: Exception | None = None
    try:
        work()
    except Exception as found:  # whatever it is, the others must hear of it
        error = found
    errors: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(errors, None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(errors):
        if message is not None:
            raise QatkitError(f"process {rank}: {message}")


def module_forward(module: LightningModule, batch: Any) -> object:
    """Call the module on a batch: its items as keywords if it is a mapping, its first element if it is a tuple or list.

    Raises:
        QatkitError: the module takes something else.
    """
    try:
        if isinstance(batch, Mapping):
            return module(**batch)
        return module(batch[0] if isinstance(batch, (tuple, list)) else batch)
    except (TypeError, NotImplementedError) as error:
        raise QatkitError(
            f"calibration: calling {type(module).__name__} on a training batch failed ({error}); write "
            "calibration_forward=lambda module, batch: module.my_model(batch['x'])"
        ) from error
