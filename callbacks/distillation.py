"""Knowledge distillation in anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from qatkit.distillation.losses import kd_loss
from qatkit.distillation.teacher import Teacher
from qatkit.errors import QatkitError


class KnowledgeDistillation(Callback):
    """Adds a teacher to the training loss: ``alpha * kd_loss + (1 - alpha) * loss``.

    The student's logits are taken from the forward pass that `training_step` makes anyway; the teacher gets the same
    inputs. The teacher belongs to the callback: it is never registered in the LightningModule, trained or saved.

    Args:
        teacher: The model that teaches, called as the student is.
        temperature: Divides both sets of logits; above 0.
        alpha: Weight of the distillation term, 0 to 1; the loss that `training_step` returns gets the rest.
        student: Name of the submodule whose output is distilled, such as "model"; by default the
            LightningModule itself.

    Raises:
        QatkitError: the teacher is the student, `student` names no submodule or was never called in `training_step`, or
            `training_step` returned no loss.

    Example:
        >>> from torch import nn
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import KnowledgeDistillation
        >>> trainer = Trainer(callbacks=[KnowledgeDistillation(nn.Linear(4, 2), temperature=2.0, alpha=0.7)])
    """

    def __init__(
        self, teacher: nn.Module, temperature: float = 1.0, alpha: float = 0.5, student: str | None = None
    ) -> None:
        if not temperature > 0:
            raise QatkitError(f"temperature: {temperature} is out of range; write a number above 0")
        if not 0 <= alpha <= 1:
            raise QatkitError(f"alpha: {alpha} is out of range; write a number from 0 to 1")
        self.teacher = Teacher(teacher)
        self.temperature = temperature
        self.alpha = alpha
        self.student = student
        self.watch: Callable[[Tensor, Tensor], None] | None = None
        """Called with the logits of student and teacher, without gradients, in every training step."""
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        self._undo: list[Any] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.teardown(trainer, pl_module, stage)  # what a fit that ended with an error may have left on another module
        if not pl_module.automatic_optimization:
            raise QatkitError(
                "manual optimization: training_step calls backward itself, so no loss is returned that a teacher "
                "could be added to; add qatkit.distillation.losses.kd_loss(student_logits, teacher_logits) to your loss"
            )
        student = self._student(pl_module)
        if any(module is self.teacher.model for module in pl_module.modules()):
            raise QatkitError(
                "teacher: it is part of the module that trains, and would teach itself; pass copy.deepcopy(...) of it"
            )
        step = pl_module.training_step
        own = pl_module.__dict__.get("training_step")

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._calls.clear()
            try:
                result = step(*args, **kwargs)
                return self._distilled(pl_module, result)
            finally:
                self._calls.clear()

        def restore() -> None:
            if own is None:
                del pl_module.training_step
            else:
                pl_module.training_step = own  # type: ignore[method-assign]  # on the instance, as it was

        # on the instance: the class, and other modules made from it, stay as the user wrote them
        pl_module.training_step = training_step  # type: ignore[method-assign]  # on the instance
        hook = student.register_forward_hook(self._record, with_kwargs=True)
        self._undo = [restore, hook.remove]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teacher.to(pl_module.device)
        trainer.precision_plugin.convert_module(self.teacher.model)  # "bf16-true" hands both models bf16 inputs

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning does not call teardown after an error

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _student(self, pl_module: LightningModule) -> nn.Module:
        if self.student is None:
            return pl_module
        try:
            return pl_module.get_submodule(self.student)
        except AttributeError:
            raise QatkitError(f"student: '{self.student}' is no submodule; {_children(pl_module)}") from None

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self._calls.append((args, kwargs, output))

    def _distilled(self, pl_module: LightningModule, result: Any) -> Any:
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if loss is None:
            return result  # Lightning's way to skip a step
        if not isinstance(loss, Tensor):
            raise QatkitError(f"training_step returned {type(loss).__name__}, not a loss tensor; return the loss")
        if not self._calls:
            raise QatkitError(
                f"student: training_step never called '{self.student or type(pl_module).__name__}', so there is "
                f"nothing to distil; {_children(pl_module)}"
            )
        terms = []
        for args, kwargs, output in self._calls:
            student, teacher = _logits(output), _logits(self.teacher(*args, **kwargs))
            terms.append(kd_loss(student, teacher, self.temperature))
            if self.watch is not None:
                self.watch(student.detach(), teacher.detach())
        distillation = torch.stack(terms).mean()
        total = self.alpha * distillation + (1 - self.alpha) * loss
        pl_module.log("train/kd_loss", distillation.detach(), on_step=True)
        pl_module.log("train/label_loss", loss.detach(), on_step=True)
        return {**result, "loss": total} if isinstance(result, Mapping) else total


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise QatkitError(f"distillation needs logits; the model returned {type(output).__name__} without any")
    return logits


def _children(pl_module: LightningModule) -> str:
    names = [name for name, _ in pl_module.named_children()]
    return f"write the name of the submodule that makes the logits, one of {names}"
