"""What student and teacher compute inside, recorded by hooks and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from qatkit.distillation.features import (
    Projections,
    attention_transfer_loss,
    hidden_cosine_loss,
    hidden_mse_loss,
    pair_layers,
    relation_loss,
)
from qatkit.errors import QatkitError

HIDDEN_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": hidden_mse_loss, "cosine": hidden_cosine_loss}


@dataclass(frozen=True)
class HiddenMatch:
    """Hidden states of the student that are to be those of the teacher."""

    layers: Mapping[str, str]
    """The teacher's submodule for each submodule of the student, or globs such as ``{"layers.*": "layers.*"}``; their
    outputs ``[..., width]`` are compared."""
    weight: float = 1.0
    """Weight of the mean over the layers, added to the loss."""
    loss: Literal["mse", "cosine"] = "mse"
    widths: tuple[int, int] | None = None
    """Widths of student and teacher where they differ: a linear map for each pair is then learned."""
    layers_by: Literal["uniform", "last"] = "uniform"
    """Where a glob matches more layers of the teacher: spread over them with the last one, or the last ones."""

    def __post_init__(self) -> None:
        _check("hidden", self.layers, self.weight)
        if self.loss not in HIDDEN_LOSSES:
            raise QatkitError(f"hidden.loss: '{self.loss}' is unknown; write one of {list(HIDDEN_LOSSES)}")


@dataclass(frozen=True)
class AttentionMatch:
    """What the student attends to, which is to be what the teacher attends to."""

    layers: Mapping[str, str]
    """The teacher's submodule for each submodule of the student, or globs: convolutions, or the layers that make
    queries, keys or values."""
    weight: float = 1.0
    """Weight of the mean over the layers, added to the loss."""
    heads: int | None = None
    """Relation heads of MiniLMv2 over queries, keys or values ``[batch, length, width]``; None transfers the attention
    of feature maps ``[batch, channels, height, width]``."""
    layers_by: Literal["uniform", "last"] = "uniform"
    """As in `HiddenMatch`."""

    def __post_init__(self) -> None:
        _check("attention", self.layers, self.weight)
        if self.heads is not None and self.heads < 1:
            raise QatkitError(f"attention.heads: {self.heads} is out of range; write a number of at least 1")


class FeatureMatch:
    """Records the outputs of layers while student and teacher run, and compares them.

    Args:
        hidden: Hidden states to compare.
        attention: Attention to compare.
    """

    def __init__(self, hidden: HiddenMatch | None, attention: AttentionMatch | None) -> None:
        self.hidden = hidden
        self.attention = attention
        self.projections: Projections | None = None
        """Where widths differ, from `attach` on."""
        self._pairs: tuple[dict[str, str], dict[str, str]] = ({}, {})
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def attach(self, student: nn.Module, teacher: nn.Module | Sequence[str]) -> list[Callable[[], None]]:
        """Put hooks on the layers; returns what removes them.

        Args:
            student: Trains.
            teacher: Answers; or the names of its layers whose states come from elsewhere.

        Raises:
            QatkitError: a name or glob matches no submodule.
        """
        names = [name for name, _ in student.named_modules()]
        theirs = [name for name, _ in teacher.named_modules()] if isinstance(teacher, nn.Module) else teacher
        hidden, attention = (
            {} if match is None else pair_layers(match.layers, names, theirs, match.layers_by)
            for match in (self.hidden, self.attention)
        )
        self._pairs = (hidden, attention)
        widths = None if self.hidden is None else self.hidden.widths
        if widths is not None and (self.projections is None or len(self.projections.maps) != len(hidden)):
            with isolate_rng():  # the same on every process, and nothing taken from the user's generator
                torch.manual_seed(0)
                self.projections = Projections(len(hidden), *widths)
        undo: list[Callable[[], None]] = []
        for side, model in enumerate((student, teacher)):
            if not isinstance(model, nn.Module):
                continue
            for name in dict.fromkeys(pair[side] for pair in (*hidden.items(), *attention.items())):
                layer = model.get_submodule(name)
                undo.append(layer.register_forward_hook(_keep(self._seen[side], name, side == 0)).remove)
        return undo

    def train_projections(self, trainer: Trainer, module: LightningModule) -> None:
        """Give the learned maps, where there are some, to the module's optimizer.

        Raises:
            QatkitError: the module's weights are sharded.
        """
        if self.projections is None:
            return
        if any(hasattr(weight, "full_tensor") for weight in module.parameters()):
            raise QatkitError(
                "hidden.widths: learned maps cannot be trained beside sharded weights in one optimizer; compare layers "
                "of equal width, or use attention=AttentionMatch(..., heads=...), which needs none"
            )
        self.projections.to(module.device)
        # in a group that exists: a scheduler made for the optimizer counts its groups. Before the optimizer's state is
        # restored, so that a checkpoint's fits
        trainer.optimizers[0].param_groups[0]["params"] += list(self.projections.parameters())

    def average_gradients(self, trainer: Trainer) -> None:
        """Of the learned maps over all processes: the module that the strategy wraps does not have them."""
        if self.projections is None or trainer.world_size == 1:
            return
        for weight in self.projections.parameters():
            if weight.grad is not None:
                reduced = trainer.strategy.reduce(weight.grad, reduce_op="mean")
                assert isinstance(reduced, Tensor)
                weight.grad = reduced

    def take(self, side: Literal[0, 1]) -> dict[str, Tensor]:
        """What the student (0) or the teacher (1) computed since the last call of this method."""
        seen = dict(self._seen[side])
        self._seen[side].clear()
        return seen

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], mask: Tensor | None) -> Tensor | None:
        """The weighted sum of both comparisons; None where there are none.

        Args:
            student: What `take` gave for the student.
            teacher: What `take` gave for the teacher.
            mask: True where a token counts, ``[batch, length]``.
        """
        terms = []
        if self.hidden is not None:
            pairs = [_pair(student, teacher, *names) for names in self._pairs[0].items()]
            for names, pair in zip(self._pairs[0].items(), pairs, strict=True):
                _check_widths(names, pair, self.hidden.widths)
            ours = [pair[0] for pair in pairs]
            if self.projections is not None:
                ours = self.projections([state.to(next(self.projections.parameters()).dtype) for state in ours])
            compare = HIDDEN_LOSSES[self.hidden.loss]
            losses = [
                compare(state, theirs, _fitting(mask, state)) for state, (_, theirs) in zip(ours, pairs, strict=True)
            ]
            terms.append(self.hidden.weight * torch.stack(losses).mean())
        if self.attention is not None:
            pairs = [_pair(student, teacher, *names) for names in self._pairs[1].items()]
            heads = self.attention.heads
            if heads is None:
                _check_maps({name: student[name] for name in self._pairs[1]})
            losses = [
                attention_transfer_loss(*pair)
                if heads is None
                else relation_loss(*pair, heads, _fitting(mask, pair[0]))
                for pair in pairs
            ]
            terms.append(self.attention.weight * torch.stack(losses).mean())
        return torch.stack(terms).sum() if terms else None


def _keep(seen: dict[str, Tensor], name: str, trains: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if trains and not torch.is_grad_enabled():
            return
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(tensor, Tensor):
            raise QatkitError(f"layers: '{name}' returns {type(tensor).__name__}, not a tensor; name a layer inside it")
        seen[name] = tensor

    return hook


def _pair(student: dict[str, Tensor], teacher: dict[str, Tensor], ours: str, theirs: str) -> tuple[Tensor, Tensor]:
    for role, seen, name in (("student", student, ours), ("teacher", teacher, theirs)):
        if name not in seen:
            raise QatkitError(
                f"layers: '{name}' of the {role} never ran where its hook could see it; name a layer that its forward "
                "calls, and compile the model after the Trainer has begun, or not at all"
            )
    return student[ours], teacher[theirs]


def _check_widths(names: tuple[str, str], pair: tuple[Tensor, Tensor], widths: tuple[int, int] | None) -> None:
    found = pair[0].shape[-1], pair[1].shape[-1]
    if found != tuple(widths or (found[0], found[0])):
        raise QatkitError(
            f"hidden.widths: {widths}, and layer '{names[0]}' of the student returns {list(pair[0].shape)}, "
            f"'{names[1]}' of the teacher {list(pair[1].shape)}; write widths={found}, or compare other layers"
        )


def _check_maps(states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        if state.dim() != 4:
            raise QatkitError(
                f"attention.heads: None is for feature maps [batch, channels, height, width], and layer '{name}' "
                f"returns {list(state.shape)}; write heads=4 for queries, keys or values, or name convolutions"
            )


def _fitting(mask: Tensor | None, states: Tensor) -> Tensor | None:
    return mask if mask is not None and mask.shape == states.shape[:2] and states.dim() == 3 else None


def _check(key: str, layers: Mapping[str, str], weight: float) -> None:
    if not isinstance(layers, Mapping) or not layers:
        raise QatkitError(
            f"{key}.layers: {layers!r} names no layers; write {{'layer of the student': 'of the teacher'}}"
        )
    if not (weight > 0 and math.isfinite(weight)):
        raise QatkitError(f"{key}.weight: {weight} is out of range; write a number above 0")
