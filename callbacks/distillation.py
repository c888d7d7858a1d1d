"""Knowledge distillation in any LightningModule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from qatkit.callbacks.divergence import NanWatch, losses_of
from qatkit.callbacks.features import AttentionMatch, FeatureMatch, HiddenMatch
from qatkit.callbacks.fused import Fused, fused
from qatkit.callbacks.generation import Generation, Generators, check_no_generation
from qatkit.callbacks.outputs import ComparedOutputs
from qatkit.callbacks.positions import find_tensor, is_causal, is_encoder_decoder
from qatkit.callbacks.teacher_outputs import Call, TeacherOutputs, cached_teacher_outputs, live_teacher_outputs
from qatkit.callbacks.teachers import check_not_part, check_not_trained, frozen_copy, live_teacher
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.teacher import Teacher
from qatkit.errors import QatkitError

logger = logging.getLogger(__name__)


class KnowledgeDistillation(Callback):
    """Add a distillation term to the training loss: ``alpha * distillation + (1 - alpha) * loss``.

    The student's logits are recorded in the forward pass of `training_step`; the teacher receives the same inputs. The
    teacher belongs to the callback: it is not registered in the LightningModule, trained or saved.

    Positions where the label is -100 or the attention mask is 0 are ignored. They are looked up as "labels" and
    "attention_mask" in the student's call, then in the batch; if the batch is a tuple, the labels are its second
    element. For encoder-decoder models, the mask is "decoder_attention_mask". For a transformers causal language model,
    whose logits predict the next label, labels and mask are shifted. Outputs at ignored positions, even non-finite
    ones, affect neither the loss nor the gradients.

    Args:
        teacher: A module, a `Teacher` with its own device or dtype, or a `CachedTeacher`, which identifies samples by
            the student's inputs. It is called with the student's inputs. "self" copies the student before other
            callbacks quantize it.
        temperature: Positive number that divides both sets of logits. Not used by "mse".
        alpha: Weight of the distillation term, 0 to 1; the loss that `training_step` returns has weight ``1 - alpha``.
        student: Name of the submodule whose output is distilled, such as "model". The default is the LightningModule
            itself.
        loss: A name in `qatkit.distillation.divergences.DIVERGENCES`: "kl", "reverse_kl" or "jsd" for logits,
            "binary_kl" for logits of binary labels, "mse" for logits or values, "cosine" or "similarity" for
            embeddings. A mapping such as ``{"boxes": "mse", "scores": "kl"}`` sets one loss for each of `outputs`.
        beta: Weight of the teacher in the mixture of "jsd", between 0 and 1.
        outputs: Keys or indices of the outputs to compare, such as ``["start_logits", "end_logits"]``; their losses are
            averaged. A mapping such as ``{"boxes": 0.2, "scores": 1.0}`` weights and adds them. "heads.0" is the first
            element of "heads". The default is the output itself, or its "logits".
        class_dim: The class dimension of the logits: 1 for segmentation, ``[N, C, H, W]``. The default is the last
            dimension; labels whose shape contradicts it raise an error.
        pooling: Pool hidden states into embeddings before they are compared: "mean", "cls" or "last". The default is
            the ``pooling`` of the batch, if it has one.
        hidden: Add a loss between hidden states.
        attention: Add a loss between attention maps or relations.
        ramp: Fraction of training over which `alpha` and the weights of `hidden` and `attention` rise from 0.
        vocab_size: Number of tokens in the shared tokenizer. Required if student and teacher pad their logits
            differently.
        on_policy: Let the student generate continuations in some batches, which are trained with the distillation term
            only (Agarwal et al. 2024, https://arxiv.org/abs/2306.13649).
        sequence_level: Let the teacher generate continuations in some batches, and train on them as on ordinary data
            (Kim and Rush 2016, https://arxiv.org/abs/1606.07947); with ``alpha=0``, this is the only use of the
            teacher.
        fused: Compute the loss of a transformers causal language model together with the distillation term, a few rows
            of logits at a time. `training_step` must call the model with keyword arguments, including the labels, and
            use its ``loss``; its ``logits`` are None. Logits are materialized if the output layer is quantized or the
            loss is "mse".

    Raises:
        QatkitError: the teacher is the student or is trained with it; its outputs contain NaN or have a different
            shape; the classes are not in `class_dim`; `student` is not the name of a submodule or is not called in
            `training_step`; or `training_step` returns no loss.

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
        loss: str | Mapping[str | int, str] = "kl",
        beta: float = 0.5,
        outputs: Sequence[str | int] | Mapping[str | int, float] | None = None,
        hidden: HiddenMatch | None = None,
        attention: AttentionMatch | None = None,
        ramp: float = 0.0,
        vocab_size: int | None = None,
        on_policy: Generation | None = None,
        sequence_level: Generation | None = None,
        fused: bool = False,
        class_dim: int | None = None,
        pooling: str | None = None,
    ) -> None:
        for name, value in (("alpha", alpha), ("ramp", ramp)):
            if not 0 <= value <= 1:
                raise QatkitError(f"{value} is out of range", key=name, advice="use a number from 0 to 1")
        self.compared = ComparedOutputs.of(outputs, class_dim, pooling)
        self.losses = losses_of(loss, self.compared.keys, temperature, beta, vocab_size)
        self.from_self = teacher == "self"
        self.cache = teacher if isinstance(teacher, CachedTeacher) else None
        if self.cache is not None:
            self.losses[0].check_cache(self.cache)
            check_no_generation(on_policy, sequence_level)
        self.teacher = live_teacher(teacher) or Teacher(nn.Identity())
        self.alpha = alpha
        self.student = student
        self.features = FeatureMatch(hidden, attention)
        self.ramp = ramp
        self.fused = fused
        self.watch: Callable[[Callable[[], Tensor]], None] | None = None
        """Called in every training step; its argument returns whether student and teacher agree, per position."""
        self._calls: list[Call] = []
        self._batch: Any = None
        self.generators = Generators(on_policy, sequence_level)
        self._undo: list[Any] = []
        self._causal = self._decodes = False
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
        self.teardown(trainer, pl_module, stage)  # hooks that a failed fit left on another module
        if not pl_module.automatic_optimization:
            raise QatkitError(
                "training_step calls backward itself and returns no loss to which the distillation term could be added",
                key="manual optimization",
                advice="add qatkit.distillation.kd_loss(student_logits, teacher_logits) to your loss",
            )
        student = self._student(pl_module)
        if self.from_self:
            self.teacher = Teacher(frozen_copy(student, trainer))
        check_not_part(self.teacher.model, pl_module)
        self._causal = is_causal(student if self.cache is not None else self.teacher.model)
        self._decodes = is_encoder_decoder(student)
        self._nan = NanWatch()
        step = pl_module.training_step
        own = pl_module.__dict__.get("training_step")

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._calls.clear()
            try:
                args = self.generators.replace_batch(args, trainer, _progress, student, self.teacher.model)
                self.features.take(1)  # features recorded while the teacher generated
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

        # set on the instance, so the class and its other instances do not change
        pl_module.training_step = training_step  # type: ignore[method-assign]  # on the instance
        self._undo = [restore]
        self._undo += self.features.attach(student, self.teacher.model if self.cache is None else self.cache.layers)

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._record(trainer, args, kwargs, output)

        # registered after the hooks on its layers, so that it runs last
        self._undo.append(student.register_forward_hook(record, with_kwargs=True).remove)
        if self.fused:
            self._undo.append(student.register_forward_pre_hook(self._begin, with_kwargs=True).remove)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teacher.to(pl_module.device)
        if self.teacher.dtype is None:
            trainer.precision_plugin.convert_module(self.teacher.model)  # "bf16-true" hands both models bf16 inputs
        check_not_trained(self.teacher.model, trainer)
        self.features.train_projections(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.fused and self._fused is None:  # all callbacks have replaced their layers by now
            teacher = self.cache or self.teacher
            self._fused = fused(self._student(pl_module), teacher, self.losses[0], self.compared)
            if isinstance(self._fused, str):
                logger.info("distillation materializes full logits: %s", self._fused)

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
            raise QatkitError(
                f"'{self.student}' is not a submodule", key="student", advice=_children(pl_module)
            ) from None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(self._fused, Fused) or not torch.is_grad_enabled():
            return None
        changed = self._fused.begin(args, kwargs, find_tensor("labels", args, kwargs, self._batch))
        return None if changed is None else (args, changed)

    def _record(self, trainer: Trainer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        states = self.features.take(0)
        labels, read = (find_tensor(name, args, kwargs, self._batch) for name in ("labels", "attention_mask"))
        present = find_tensor("decoder_attention_mask", args, kwargs, self._batch) if self._decodes else read
        outputs = None
        if isinstance(self._fused, Fused) and self._fused.labels is not None:
            outputs = self._fused.finish(output, args, kwargs, present, self._weight(trainer))
        self._calls.append(Call(args, kwargs, output, states, labels, present, read, self._batch, outputs))
        return None if outputs is None else output

    def _weight(self, trainer: Trainer) -> float:
        """Current weight of the distillation term: 1 on texts that the student generated, whose labels are its own."""
        return 1.0 if self.generators.now == "student" else self.alpha * self._rise(trainer)

    def _rise(self, trainer: Trainer) -> float:
        return min(1.0, _progress(trainer) / self.ramp) if self.ramp else 1.0

    def _distilled(self, trainer: Trainer, pl_module: LightningModule, result: Any) -> Any:
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if loss is None:
            return result  # Lightning's way to skip a step
        if not isinstance(loss, Tensor):
            raise QatkitError(
                f"returned {type(loss).__name__}, not a loss tensor", key="training_step", advice="return the loss"
            )
        if not self._calls:
            raise QatkitError(
                f"training_step never called '{self.student or type(pl_module).__name__}', so there are no student "
                "outputs to distill",
                key="student",
                advice=_children(pl_module),
            )
        terms, extra = [], []
        for call in self._calls:
            outputs = call.teacher_outputs or self._teacher_outputs(call)
            for output, mask in outputs.outputs:
                self._nan.note(trainer, output, mask)
            if self.watch is not None:
                for agreement in outputs.agreements:
                    self.watch(agreement)
            terms.append(torch.stack(outputs.losses).sum())
            features = self.features.loss(call.states, self.features.take(1) | dict(outputs.states), call.present_in)
            if features is not None:
                extra.append(features)
        distillation, alpha = torch.stack(terms).mean(), self._weight(trainer)
        if isinstance(self._fused, Fused) and any(call.teacher_outputs for call in self._calls):
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

    def _teacher_outputs(self, call: Call) -> TeacherOutputs:
        if self.cache is not None:
            return cached_teacher_outputs(self.cache, call, self.losses[0], self.compared, self._causal)
        return live_teacher_outputs(self.teacher, call, self.losses, self.compared, self._causal)


def _progress(trainer: Trainer) -> float:
    """Progress of training, 0 to 1."""
    steps = trainer.estimated_stepping_batches
    return trainer.global_step / steps


def _children(pl_module: LightningModule) -> str:
    names = [name for name, _ in pl_module.named_children()]
    return f"pass the name of the submodule that returns the logits, one of {names}"
