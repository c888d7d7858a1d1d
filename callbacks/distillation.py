"""Knowledge distillation in anybody's LightningModule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from qatkit.callbacks.divergence import Divergence, NanWatch
from qatkit.callbacks.features import AttentionMatch, FeatureMatch, HiddenMatch
from qatkit.callbacks.fused import Fused, fused
from qatkit.callbacks.generation import Generation, Writers, refuse_plans
from qatkit.callbacks.positions import find, is_causal
from qatkit.callbacks.teacher_outputs import Call, Lesson, cached_lesson, live_lesson
from qatkit.callbacks.teachers import frozen_copy, held, refuse_part, refuse_trained
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.teacher import Teacher
from qatkit.errors import QatkitError

logger = logging.getLogger(__name__)


class KnowledgeDistillation(Callback):
    """Adds a teacher to the training loss: ``alpha * distillation + (1 - alpha) * loss``.

    The student's logits are taken from the forward pass that `training_step` makes anyway; the teacher gets the same
    inputs. The teacher belongs to the callback: it is never registered in the LightningModule, trained or saved.

    Positions do not count where the labels are -100 or the attention mask is 0, if the call of the student or the batch
    has "labels" and "attention_mask" (or the batch is a tuple whose second element is the labels). For a causal
    language model of transformers, whose logits answer to the next label, both are shifted.

    Args:
        teacher: The model that teaches, called as the student is: a module, a `Teacher` with a device or dtype of its
            own, or a `CachedTeacher`, which knows the samples by what the student is called with. "self" for a copy of
            the student as it is before other callbacks quantize it.
        temperature: Divides both sets of logits; above 0. Not used by "mse".
        alpha: Weight of the distillation term, 0 to 1; the loss that `training_step` returns gets the rest.
        student: Name of the submodule whose output is distilled, such as "model"; by default the
            LightningModule itself.
        loss: "kl", "reverse_kl", "jsd" over logits, or "mse" over logits or the numbers of a regression.
        beta: Share of the teacher in the mixture of "jsd", between 0 and 1.
        outputs: Keys or positions of the outputs to compare, such as ``["start_logits", "end_logits"]``; the mean over
            them counts. By default the output itself, or its "logits".
        hidden: Hidden states to compare as well.
        attention: Attention to compare as well.
        ramp: Fraction of training over which `alpha` and the weights of `hidden` and `attention` rise from 0.
        vocab_size: Tokens of the tokenizer that both use, where their logits are padded to different widths.
        on_policy: Lets the student continue the texts of some batches, which are then trained with the distillation
            term alone (Agarwal et al. 2024, https://arxiv.org/abs/2306.13649).
        sequence_level: Lets the teacher continue them, to be trained on as if they were data (Kim and Rush 2016,
            https://arxiv.org/abs/1606.07947); alpha 0 uses nothing else of the teacher.
        fused: Leave out the logits of a causal language model of transformers that `training_step` calls by keywords,
            with labels, for its ``loss``: this is then computed with the distillation term, a few rows at a time, and
            ``logits`` is None. Where that is not possible (a quantized output layer, "mse") logits are made as ever.

    Raises:
        QatkitError: the teacher is the student or trains with it, answers NaN or in another shape, `student` names no
            submodule or was never called in `training_step`, or `training_step` returned no loss.

    Example:
        >>> from torch import nn
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import KnowledgeDistillation
        >>> trainer = Trainer(callbacks=[KnowledgeDistillation(nn.Linear(4, 2), temperature=2.0, alpha=0.7)])
    """

    def __init__(
        self,
        teacher: nn.Module | Teacher | CachedTeacher | Literal["self"],
        temperature: float = 1.0,
        alpha: float = 0.5,
        student: str | None = None,
        loss: Literal["kl", "reverse_kl", "jsd", "mse"] = "kl",
        beta: float = 0.5,
        outputs: Sequence[str | int] | None = None,
        hidden: HiddenMatch | None = None,
        attention: AttentionMatch | None = None,
        ramp: float = 0.0,
        vocab_size: int | None = None,
        on_policy: Generation | None = None,
        sequence_level: Generation | None = None,
        fused: bool = False,
    ) -> None:
        for name, value in (("alpha", alpha), ("ramp", ramp)):
            if not 0 <= value <= 1:
                raise QatkitError(f"{name}: {value} is out of range; write a number from 0 to 1")
        if isinstance(outputs, str):
            raise QatkitError(f"outputs: '{outputs}' is no list; write ['{outputs}']")
        self.divergence = Divergence(loss, temperature, beta, vocab_size)
        self.from_self = teacher == "self"
        self.cache = teacher if isinstance(teacher, CachedTeacher) else None
        if self.cache is not None:
            self.divergence.check_cache(self.cache)
            refuse_plans(on_policy, sequence_level)
        self.teacher = held(teacher) or Teacher(nn.Identity())
        self.alpha = alpha
        self.student = student
        self.outputs = outputs
        self.features = FeatureMatch(hidden, attention)
        self.ramp = ramp
        self.fused = fused
        self.watch: Callable[[Callable[[], Tensor]], None] | None = None
        """Called in every training step, with what tells where student and teacher name the same class."""
        self._calls: list[Call] = []
        self._batch: Any = None
        self.writers = Writers(on_policy, sequence_level)
        self._undo: list[Any] = []
        self._causal = False
        self._nan = NanWatch()
        self._fused: Fused | str | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        projections = self.features.projections
        return {} if projections is None else {"projections": projections.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.features.projections is not None and "projections" in state_dict:
            self.features.projections.load_state_dict(state_dict["projections"])

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
        if self.from_self:
            self.teacher = Teacher(frozen_copy(student, trainer))
        refuse_part(self.teacher.model, pl_module)
        self._causal = is_causal(student if self.cache is not None else self.teacher.model)
        self._nan = NanWatch()
        step = pl_module.training_step
        own = pl_module.__dict__.get("training_step")

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._calls.clear()
            try:
                args = self.writers.rewritten(args, trainer, _progress, student, self.teacher.model)
                self.features.take(1)  # what the teacher computed while it wrote
                self._batch = args[0] if args else kwargs.get("batch")
                return self._distilled(trainer, pl_module, step(*args, **kwargs))
            finally:
                self._calls.clear()
                self._batch = None
                if isinstance(self._fused, Fused):
                    self._fused.end()

        def restore() -> None:
            if own is None:
                del pl_module.training_step
            else:
                pl_module.training_step = own  # type: ignore[method-assign]  # on the instance, as it was

        # on the instance: the class, and other modules made from it, stay as the user wrote them
        pl_module.training_step = training_step  # type: ignore[method-assign]  # on the instance
        self._undo = [restore]
        self._undo += self.features.attach(student, self.teacher.model if self.cache is None else self.cache.layers)

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._record(trainer, args, kwargs, output)

        # after the hooks on its layers: when the student has been called, they have run
        self._undo.append(student.register_forward_hook(record, with_kwargs=True).remove)
        if self.fused:
            self._undo.append(student.register_forward_pre_hook(self._begin, with_kwargs=True).remove)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teacher.to(pl_module.device)
        if self.teacher.dtype is None:
            trainer.precision_plugin.convert_module(self.teacher.model)  # "bf16-true" hands both models bf16 inputs
        refuse_trained(self.teacher.model, trainer)
        self.features.train_projections(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.fused and self._fused is None:  # by now every callback has done what it does to layers
            teacher = self.cache or self.teacher
            self._fused = fused(self._student(pl_module), teacher, self.divergence, self.outputs)
            if isinstance(self._fused, str):
                logger.info("distillation over whole logits: %s", self._fused)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.features.average_gradients(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._nan.after_batch(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._nan.check()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning does not call teardown after an error

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for undo in self._undo:
            undo()
        self._undo = []
        self._fused = None
        self.features.take(0)
        self.features.take(1)

    def _student(self, pl_module: LightningModule) -> nn.Module:
        if self.student is None:
            return pl_module
        try:
            return pl_module.get_submodule(self.student)
        except AttributeError:
            raise QatkitError(f"student: '{self.student}' is no submodule; {_children(pl_module)}") from None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(self._fused, Fused) or not torch.is_grad_enabled():
            return None
        changed = self._fused.begin(args, kwargs, find("labels", args, kwargs, self._batch))
        return None if changed is None else (args, changed)

    def _record(self, trainer: Trainer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        states = self.features.take(0)
        labels, present = (find(name, args, kwargs, self._batch) for name in ("labels", "attention_mask"))
        lesson = None
        if isinstance(self._fused, Fused) and self._fused.labels is not None:
            lesson = self._fused.finish(output, args, kwargs, present, self._weight(trainer))
        self._calls.append(Call(args, kwargs, output, states, labels, present, lesson))
        return None if lesson is None else output

    def _weight(self, trainer: Trainer) -> float:
        """Of the distillation term now: all where the student wrote the texts, as nobody wants it to copy itself."""
        return 1.0 if self.writers.now == "student" else self.alpha * self._rise(trainer)

    def _rise(self, trainer: Trainer) -> float:
        return min(1.0, _progress(trainer) / self.ramp) if self.ramp else 1.0

    def _distilled(self, trainer: Trainer, pl_module: LightningModule, result: Any) -> Any:
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
        terms, extra = [], []
        for call in self._calls:
            lesson = call.lesson or self._lesson(call)
            for answer in lesson.answers:
                self._nan.note(trainer, answer)
            if self.watch is not None:
                for agreement in lesson.agreements:
                    self.watch(agreement)
            terms += lesson.divergences
            features = self.features.loss(call.states, self.features.take(1) | dict(lesson.states), call.present)
            if features is not None:
                extra.append(features)
        distillation, alpha = torch.stack(terms).mean(), self._weight(trainer)
        if isinstance(self._fused, Fused) and any(call.lesson for call in self._calls):
            trained = self._fused.total(self._calls, loss, alpha)
        else:
            trained = alpha * distillation + (1 - alpha) * loss
        pl_module.log("train/kd_loss", distillation.detach(), on_step=True)
        pl_module.log("train/label_loss", loss.detach(), on_step=True)
        if extra:
            feature_loss = torch.stack(extra).mean()
            trained = trained + self._rise(trainer) * feature_loss
            pl_module.log("train/feature_loss", feature_loss.detach(), on_step=True)
        return {**result, "loss": trained} if isinstance(result, Mapping) else trained

    def _lesson(self, call: Call) -> Lesson:
        if self.cache is not None:
            return cached_lesson(self.cache, call, self.divergence, self.outputs, self._causal)
        return live_lesson(self.teacher, call, self.divergence, self.outputs, self._causal)


def _progress(trainer: Trainer) -> float:
    """Of training, 0 to 1."""
    steps = trainer.estimated_stepping_batches
    return trainer.global_step / steps


def _children(pl_module: LightningModule) -> str:
    names = [name for name, _ in pl_module.named_children()]
    return f"write the name of the submodule that makes the logits, one of {names}"
