"""Who may teach, and in what the teacher of a `KnowledgeDistillation` is held."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.teacher import Teacher
from qatkit.errors import QatkitError
from qatkit.quantization.prepare import fake_quantizers


def held(teacher: Any) -> Teacher | None:
    """What a user gave as teacher, as it is held; None where it is to be a copy of the student, or is a cache.

    Raises:
        QatkitError: it is no model.
    """
    if teacher == "self" or isinstance(teacher, CachedTeacher):
        return None
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return Teacher(teacher)
    said = f"'{teacher}'" if isinstance(teacher, str) else type(teacher).__name__
    raise QatkitError(
        f"teacher: {said} is no model; pass a torch.nn.Module, a Teacher or a CachedTeacher, or write 'self'"
    )


def frozen_copy(student: nn.Module, trainer: Trainer) -> nn.Module:
    """The student as it is, for "self".

    Raises:
        QatkitError: it is quantized already.
    """
    if fake_quantizers(student):
        raise QatkitError(
            "teacher: 'self' is quantized already and would teach its own errors; put KnowledgeDistillation before "
            "QuantizationAwareTraining in the list of callbacks, or pass the model itself"
        )
    # a LightningModule holds its Trainer, and that the data: they are no part of a teacher
    return copy.deepcopy(student, {id(trainer): None}).requires_grad_(False)


def refuse_part(teacher: nn.Module, module: LightningModule) -> None:
    """Refuse a teacher that is part of the module that trains.

    Raises:
        QatkitError: it is.
    """
    if any(part is teacher for part in module.modules()):
        raise QatkitError(
            "teacher: it is part of the module that trains, and would teach itself; pass copy.deepcopy(...) of it"
        )


def refuse_trained(teacher: nn.Module, trainer: Trainer) -> None:
    """Refuse a teacher with a parameter that an optimizer trains.

    Raises:
        QatkitError: names it.
    """
    trained = {id(weight) for optimizer in trainer.optimizers for weight in _weights(optimizer)}
    for name, weight in teacher.named_parameters():
        if id(weight) in trained:
            raise QatkitError(
                f"teacher: its parameter '{name}' is one that the optimizer trains, so it would follow the student; "
                "pass copy.deepcopy(...) of it, or keep it out of configure_optimizers"
            )


def asked(teacher: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a teacher answers to a call of the student.

    Raises:
        QatkitError: it does not take what the student takes.
    """
    try:
        return teacher(*args, **kwargs)
    except (torch.OutOfMemoryError, QatkitError):  # says what to do about it by itself
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        given = [_shown(value) for value in args] + [f"{name}={_shown(value)}" for name, value in kwargs.items()]
        raise QatkitError(
            f"teacher: it fails on what the student is called with, ({', '.join(given)}): {error}; pass a model of the "
            "same task, which takes the same inputs"
        ) from error


def _shown(value: Any) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if isinstance(value, Tensor)
        else repr(value)[:40]
    )


def _weights(optimizer: Optimizer | Any) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]
