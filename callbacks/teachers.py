"""Teachers for `KnowledgeDistillation`: accepted types, checks against the student, and the teacher call."""

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


def live_teacher(teacher: Any) -> Teacher | None:
    """Wrap a module as a `Teacher`. Return None for "self", which is copied later, and for a cached teacher.

    Raises:
        QatkitError: the teacher is not a model.
    """
    if teacher == "self" or isinstance(teacher, CachedTeacher):
        return None
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return Teacher(teacher)
    seen = f"'{teacher}'" if isinstance(teacher, str) else type(teacher).__name__
    raise QatkitError(
        f"{seen} is not a model",
        key="teacher",
        advice="pass a torch.nn.Module, a Teacher, a CachedTeacher or 'self'",
    )


def frozen_copy(student: nn.Module, trainer: Trainer) -> nn.Module:
    """Copy the student as its own teacher.

    Raises:
        QatkitError: the student is already quantized.
    """
    if fake_quantizers(student):
        raise QatkitError(
            "the module is already quantized, so a copy of it would teach its quantization error",
            key="teacher",
            advice="put KnowledgeDistillation before QuantizationAwareTraining in the list of callbacks, or pass a "
            "model instead of 'self'",
        )
    # a LightningModule holds its Trainer, which holds the data: neither is part of a teacher
    return copy.deepcopy(student, {id(trainer): None}).requires_grad_(False)


def check_not_part(teacher: nn.Module, module: LightningModule) -> None:
    """Raise an error if the teacher is a submodule of the LightningModule.

    Raises:
        QatkitError: the teacher is a submodule.
    """
    if any(part is teacher for part in module.modules()):
        raise QatkitError(
            "the teacher is part of the module being trained, so it would teach itself",
            key="teacher",
            advice="pass copy.deepcopy(teacher)",
        )


def check_not_trained(teacher: nn.Module, trainer: Trainer) -> None:
    """Raise an error if an optimizer trains a parameter of the teacher.

    Raises:
        QatkitError: an optimizer trains a parameter; the message includes its name.
    """
    trained = {id(weight) for optimizer in trainer.optimizers for weight in _weights(optimizer)}
    for name, weight in teacher.named_parameters():
        if id(weight) in trained:
            raise QatkitError(
                f"the optimizer trains the teacher's parameter '{name}', so the teacher would follow the student",
                key="teacher",
                advice="pass copy.deepcopy(teacher), or leave the teacher out of configure_optimizers",
            )


def call_teacher(teacher: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the teacher with the inputs of the student.

    Raises:
        QatkitError: the teacher does not accept these inputs.
    """
    try:
        return teacher(*args, **kwargs)
    except (torch.OutOfMemoryError, QatkitError):  # these errors carry their own advice
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        inputs = [_shown(value) for value in args] + [f"{name}={_shown(value)}" for name, value in kwargs.items()]
        raise QatkitError(
            f"the teacher fails on the student's inputs ({', '.join(inputs)}): {error}",
            key="teacher",
            advice="pass a model for the same task that accepts the same inputs",
        ) from error


def _shown(value: Any) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if isinstance(value, Tensor)
        else repr(value)[:40]
    )


def _weights(optimizer: Optimizer | Any) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]
