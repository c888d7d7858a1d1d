"""Knowledge distillation in anybody's LightningModule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from qatkit.callbacks.features import AttentionMatch, FeatureMatch, HiddenMatch
from qatkit.callbacks.generation import Generation, Writers
from qatkit.callbacks.outputs import logits_of
from qatkit.callbacks.positions import counted, find, is_causal
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from qatkit.distillation.losses import check_beta, jsd_loss, kd_loss, mse_loss, reverse_kl_loss
from qatkit.distillation.teacher import Teacher
from qatkit.distillation.vocabulary import trim_to_vocabulary
from qatkit.errors import QatkitError
from qatkit.quantization.prepare import fake_quantizers

LOSSES = ("kl", "reverse_kl", "jsd", "mse")
EVERY = 50
"""Optimizer steps between two looks for NaN on a device that would have to be waited for."""


class KnowledgeDistillation(Callback):
    """Adds a teacher to the training loss: ``alpha * distillation + (1 - alpha) * loss``.

    The student's logits are taken from the forward pass that `training_step` makes anyway; the teacher gets the same
    inputs. The teacher belongs to the callback: it is never registered in the LightningModule, trained or saved.

    Positions do not count where the labels are -100 or the attention mask is 0, if the call of the student or the batch
    has "labels" and "attention_mask" (or the batch is a tuple whose second element is the labels). For a causal
    language model of transformers, whose logits answer to the next label, both are shifted.

    Args:
        teacher: The model that teaches, called as the student is; "self" for a copy of the student as it is before
            other callbacks quantize it.
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
        teacher: nn.Module | Literal["self"],
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
    ) -> None:
        if not temperature > 0:
            raise QatkitError(f"temperature: {temperature} is out of range; write a number above 0")
        for name, value in (("alpha", alpha), ("ramp", ramp)):
            if not 0 <= value <= 1:
                raise QatkitError(f"{name}: {value} is out of range; write a number from 0 to 1")
        if loss not in LOSSES:
            raise QatkitError(f"loss: '{loss}' is unknown; write one of {list(LOSSES)}")
        if isinstance(outputs, str):
            raise QatkitError(f"outputs: '{outputs}' is no list; write ['{outputs}']")
        if isinstance(teacher, str) and teacher != "self":
            raise QatkitError(f"teacher: '{teacher}' is no model; pass a torch.nn.Module or write 'self'")
        check_beta(beta)
        self.from_self = isinstance(teacher, str)
        self.teacher = Teacher(nn.Identity() if isinstance(teacher, str) else teacher)
        self.temperature = temperature
        self.alpha = alpha
        self.student = student
        self.loss = loss
        self.beta = beta
        self.outputs = outputs
        self.features = FeatureMatch(hidden, attention)
        self.ramp = ramp
        self.vocab_size = vocab_size
        self.writers = Writers(on_policy, sequence_level)
        self.watch: Callable[[Tensor, Tensor], None] | None = None
        """Called with the logits of student and teacher, without gradients, in every training step."""
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Any, dict[str, Tensor]]] = []
        self._undo: list[Any] = []
        self._causal = False
        self._nan: Tensor | None = None

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
            self.teacher = Teacher(_frozen_copy(student, trainer))
        if any(module is self.teacher.model for module in pl_module.modules()):
            raise QatkitError(
                "teacher: it is part of the module that trains, and would teach itself; pass copy.deepcopy(...) of it"
            )
        self._causal = is_causal(self.teacher.model)
        self._nan = None
        step = pl_module.training_step
        own = pl_module.__dict__.get("training_step")

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._calls.clear()
            try:
                writer, args = self.writers.rewritten(args, trainer, _progress, student, self.teacher.model)
                self.features.take(1)  # what the teacher computed while it wrote
                result = step(*args, **kwargs)
                batch = args[0] if args else kwargs.get("batch")
                return self._distilled(trainer, pl_module, result, batch, only=writer == "student")
            finally:
                self._calls.clear()

        def restore() -> None:
            if own is None:
                del pl_module.training_step
            else:
                pl_module.training_step = own  # type: ignore[method-assign]  # on the instance, as it was

        # on the instance: the class, and other modules made from it, stay as the user wrote them
        pl_module.training_step = training_step  # type: ignore[method-assign]  # on the instance
        self._undo = [restore]
        self._undo += self.features.attach(student, self.teacher.model)
        # after the hooks on its layers: when the student has been called, they have run
        self._undo.append(student.register_forward_hook(self._record, with_kwargs=True).remove)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teacher.to(pl_module.device)
        trainer.precision_plugin.convert_module(self.teacher.model)  # "bf16-true" hands both models bf16 inputs
        trained = {id(weight) for optimizer in trainer.optimizers for weight in _weights(optimizer)}
        for name, weight in self.teacher.model.named_parameters():
            if id(weight) in trained:
                raise QatkitError(
                    f"teacher: its parameter '{name}' is one that the optimizer trains, so it would follow the "
                    "student; pass copy.deepcopy(...) of it, or keep it out of configure_optimizers"
                )
        if self.features.projections is not None:
            self._train_projections(trainer, pl_module, self.features.projections)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.features.projections is not None and trainer.world_size > 1:
            for weight in self.features.projections.parameters():
                if weight.grad is not None:  # not in the module that the strategy wraps, so it averages nothing
                    reduced = trainer.strategy.reduce(weight.grad, reduce_op="mean")
                    assert isinstance(reduced, Tensor)
                    weight.grad = reduced

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # elsewhere than on the CPU, reading the number waits for the device
        if self._nan is not None and (self._nan.device.type == "cpu" or trainer.global_step % EVERY == 0):
            self._check_nan()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_nan()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning does not call teardown after an error

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for undo in self._undo:
            undo()
        self._undo = []
        self.features.take(0)
        self.features.take(1)

    def _student(self, pl_module: LightningModule) -> nn.Module:
        if self.student is None:
            return pl_module
        try:
            return pl_module.get_submodule(self.student)
        except AttributeError:
            raise QatkitError(f"student: '{self.student}' is no submodule; {_children(pl_module)}") from None

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self._calls.append((args, kwargs, output, self.features.take(0)))

    def _train_projections(self, trainer: Trainer, pl_module: LightningModule, projections: nn.Module) -> None:
        if any(hasattr(weight, "full_tensor") for weight in pl_module.parameters()):
            raise QatkitError(
                "hidden.widths: learned maps cannot be trained beside sharded weights in one optimizer; compare layers "
                "of equal width, or use attention=AttentionMatch(..., heads=...), which needs none"
            )
        projections.to(pl_module.device)
        # in a group that exists: a scheduler made for the optimizer counts its groups. Before the optimizer's state is
        # restored, so that a checkpoint's fits
        trainer.optimizers[0].param_groups[0]["params"] += list(projections.parameters())

    def _distilled(self, trainer: Trainer, pl_module: LightningModule, result: Any, batch: Any, only: bool) -> Any:
        """The loss of a step with the distillation in it, or that `only`: nobody wants a student to copy itself."""
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
        for args, kwargs, output, ours in self._calls:
            answer = self.teacher(*args, **kwargs)
            labels, present = (find(name, args, kwargs, batch) for name in ("labels", "attention_mask"))
            pairs = zip(logits_of(output, self.outputs), logits_of(answer, self.outputs), strict=True)
            for student, teacher in pairs:
                self._note_nan(trainer, teacher)
                terms.append(self._divergence(student, teacher, labels, present))
                if self.watch is not None:
                    self.watch(student.detach(), teacher.detach())
            features = self.features.loss(ours, self.features.take(1), present)
            if features is not None:
                extra.append(features)
        distillation = torch.stack(terms).mean()
        rise = min(1.0, _progress(trainer) / self.ramp) if self.ramp else 1.0
        alpha = 1.0 if only else self.alpha * rise
        total = alpha * distillation + (1 - alpha) * loss
        pl_module.log("train/kd_loss", distillation.detach(), on_step=True)
        pl_module.log("train/label_loss", loss.detach(), on_step=True)
        if extra:
            feature_loss = torch.stack(extra).mean()
            total = total + rise * feature_loss
            pl_module.log("train/feature_loss", feature_loss.detach(), on_step=True)
        return {**result, "loss": total} if isinstance(result, Mapping) else total

    def _divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None, present: Tensor | None) -> Tensor:
        if student.shape[:-1] == teacher.shape[:-1] and self.vocab_size is not None:
            student, teacher = trim_to_vocabulary(student, teacher, self.vocab_size)
        if student.shape != teacher.shape:
            raise QatkitError(
                f"teacher: its outputs have shape {list(teacher.shape)}, the student's {list(student.shape)}; they "
                "must be equal. Where both use one tokenizer and only pad their logits differently, write "
                "vocab_size=len(tokenizer)"
            )
        mask = counted(student, labels, present, self._causal)
        if self.loss == "mse":
            return mse_loss(student, teacher, mask)
        if student.dim() < 2 or student.shape[-1] == 1:
            raise QatkitError(
                f"loss: '{self.loss}' compares probabilities of classes, and outputs of shape {list(student.shape)} "
                "have no two; write loss='mse'"
            )
        if self.loss == "jsd":
            return jsd_loss(student, teacher, self.temperature, mask, beta=self.beta)
        return (kd_loss if self.loss == "kl" else reverse_kl_loss)(student, teacher, self.temperature, mask)

    def _note_nan(self, trainer: Trainer, teacher: Tensor) -> None:
        """Remember the first batch with a NaN, on the device: to ask it would make every step wait."""
        if self._nan is None:
            self._nan = torch.full((), -1, dtype=torch.int64, device=teacher.device)
        batch = trainer.fit_loop.total_batch_idx
        self._nan = torch.where((self._nan < 0) & teacher.isnan().any(), batch, self._nan)
        if self._nan.device.type == "cpu":
            self._check_nan()

    def _check_nan(self) -> None:
        if self._nan is not None and self._nan >= 0:
            batch, self._nan = int(self._nan), None
            raise QatkitError(
                f"teacher: its outputs for training batch {batch}, counted from 0, hold NaN; check that batch for "
                "empty or overlong inputs, and the precision: a teacher trained in bf16 overflows in fp16"
            )


def _frozen_copy(student: nn.Module, trainer: Trainer) -> nn.Module:
    if fake_quantizers(student):
        raise QatkitError(
            "teacher: 'self' is quantized already and would teach its own errors; put KnowledgeDistillation before "
            "QuantizationAwareTraining in the list of callbacks, or pass the model itself"
        )
    # a LightningModule holds its Trainer, and that the data: they are no part of a teacher
    return copy.deepcopy(student, {id(trainer): None}).requires_grad_(False)


def _progress(trainer: Trainer) -> float:
    """Of training, 0 to 1."""
    steps = trainer.estimated_stepping_batches
    return trainer.global_step / steps


def _weights(optimizer: Any) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _children(pl_module: LightningModule) -> str:
    names = [name for name, _ in pl_module.named_children()]
    return f"write the name of the submodule that makes the logits, one of {names}"
