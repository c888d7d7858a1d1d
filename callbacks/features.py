"""Feature distillation: hooks record student and teacher features, and losses compare them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from qatkit.common.tables import implementation
from qatkit.distillation.divergences import HIDDEN_LOSSES
from qatkit.distillation.features import Projections, attention_transfer_loss, pair_layers, relation_loss
from qatkit.distillation.losses import zero_uncounted
from qatkit.errors import QatkitError, under

Masks = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class HiddenMatch:
    """Match the student's hidden states to the teacher's."""

    layers: Mapping[str, str]
    """Maps student submodules to teacher submodules, by names or globs such as ``{"layers.*": "layers.*"}``. Their
    outputs ``[..., width]`` are compared.
    """
    weight: float = 1.0
    """Weight of the mean over the layers, added to the loss."""
    loss: str = "mse"
    """Either "mse" or "cosine"."""
    widths: tuple[int, int] | None = None
    """Student and teacher width, if they differ. Each pair of layers then learns a linear projection."""
    layers_by: Literal["uniform", "last"] = "uniform"
    """How to pair layers if a glob matches more teacher layers than student layers: "uniform" spaces them evenly up to
    the teacher's last layer, and "last" uses the teacher's last layers.
    """

    def __post_init__(self) -> None:
        _check("hidden", self.layers, self.weight)
        HIDDEN_LOSSES.row(self.loss, key="hidden.loss")


@dataclass(frozen=True)
class AttentionMatch:
    """Match the student's attention to the teacher's."""

    layers: Mapping[str, str]
    """Maps student submodules to teacher submodules: convolutions, or the projections that compute queries, keys or
    values.
    """
    weight: float = 1.0
    """Weight of the mean over the layers, added to the loss."""
    heads: int | None = None
    """Number of MiniLMv2 relation heads over queries, keys or values ``[batch, length, width]``; None transfers the
    attention of feature maps ``[batch, channels, height, width]``."""
    layers_by: Literal["uniform", "last"] = "uniform"
    """As in `HiddenMatch`."""

    def __post_init__(self) -> None:
        _check("attention", self.layers, self.weight)
        if self.heads is not None and self.heads < 1:
            raise QatkitError(f"{self.heads} is out of range", key="attention.heads", advice="use a positive integer")


class FeatureMatch:
    """Record layer outputs while student and teacher run, and compare them.

    Args:
        hidden: Hidden states to compare.
        attention: Attention to compare.
    """

    def __init__(self, hidden: HiddenMatch | None, attention: AttentionMatch | None) -> None:
        self.hidden = hidden
        self.attention = attention
        self.projections: Projections | None = None
        """Learned maps for layers of different width; created by `attach`."""
        self._pairs: tuple[dict[str, str], dict[str, str]] = ({}, {})
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def attach(self, student: nn.Module, teacher: nn.Module | Sequence[str]) -> list[Callable[[], None]]:
        """Register hooks on the layers, and return the functions that remove them.

        Args:
            student: The student.
            teacher: The teacher, or the names of its layers if their hidden states come from a cache.

        Raises:
            QatkitError: a name or glob matches no submodule.
        """
        names = [name for name, _ in student.named_modules()]
        theirs = [name for name, _ in teacher.named_modules()] if isinstance(teacher, nn.Module) else teacher
        hidden, attention = (
            _paired(key, match, names, theirs)
            for key, match in (("hidden", self.hidden), ("attention", self.attention))
        )
        self._pairs = (hidden, attention)
        widths = None if self.hidden is None else self.hidden.widths
        if widths is not None and (self.projections is None or len(self.projections.maps) != len(hidden)):
            with isolate_rng():  # seeded to be equal on every process, without consuming the user's random numbers
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
        """Add the learned projections to the module's optimizer.

        Raises:
            QatkitError: the module's weights are sharded.
        """
        if self.projections is None:
            return
        if any(hasattr(weight, "full_tensor") for weight in module.parameters()):
            raise QatkitError(
                "learned maps and sharded weights cannot be trained by one optimizer",
                key="hidden.widths",
                advice="compare layers of equal width, or use attention=AttentionMatch(..., heads=...), which needs no "
                "maps",
            )
        self.projections.to(module.device)
        # in an existing group: schedulers count the optimizer's groups. Before the optimizer's state is restored, so
        # that the state of a checkpoint fits
        trainer.optimizers[0].param_groups[0]["params"] += list(self.projections.parameters())

    def average_gradients(self, trainer: Trainer) -> None:
        """Average the gradients of the learned projections over processes, because the strategy does not wrap them."""
        if self.projections is None or trainer.world_size == 1:
            return
        for weight in self.projections.parameters():
            if weight.grad is not None:
                reduced = trainer.strategy.reduce(weight.grad, reduce_op="mean")
                assert isinstance(reduced, Tensor)
                weight.grad = reduced

    def take(self, side: Literal[0, 1]) -> dict[str, Tensor]:
        """Return the features of the student (0) or the teacher (1) recorded since the last call."""
        seen = dict(self._seen[side])
        self._seen[side].clear()
        return seen

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], mask_of: Masks) -> Tensor | None:
        """Return the weighted sum of the hidden and attention losses, or None if there are none.

        Args:
            student: Features of the student from `take`.
            teacher: Features of the teacher from `take`.
            mask_of: Returns the mask of a student layer, ``[batch, length]``: true at tokens to include.
        """
        terms = []
        if self.hidden is not None:
            pairs = [_pair(student, teacher, *names) for names in self._pairs[0].items()]
            for names, pair in zip(self._pairs[0].items(), pairs, strict=True):
                _check_widths(names, pair, self.hidden.widths)
            ours = [pair[0] for pair in pairs]
            masks = [_mask_for(mask_of(name), pair[0]) for name, pair in zip(self._pairs[0], pairs, strict=True)]
            if self.projections is not None:
                dtype = next(self.projections.parameters()).dtype
                # otherwise non-finite states of padding would reach the gradient of the maps
                counted = [zero_uncounted(state, mask) for state, mask in zip(ours, masks, strict=True)]
                ours = self.projections([state.to(dtype) for state in counted])
            compare: Callable[..., Tensor] = implementation(HIDDEN_LOSSES[self.hidden.loss].function)
            losses = [compare(state, theirs, mask) for state, (_, theirs), mask in zip(ours, pairs, masks, strict=True)]
            terms.append(self.hidden.weight * torch.stack(losses).mean())
        if self.attention is not None:
            pairs = [_pair(student, teacher, *names) for names in self._pairs[1].items()]
            heads = self.attention.heads
            if heads is None:
                _check_maps({name: student[name] for name in self._pairs[1]})
            losses = [
                attention_transfer_loss(*pair)
                if heads is None
                else relation_loss(*pair, heads, _mask_for(mask_of(name), pair[0]))
                for name, pair in zip(self._pairs[1], pairs, strict=True)
            ]
            terms.append(self.attention.weight * torch.stack(losses).mean())
        return torch.stack(terms).sum() if terms else None


def _paired(
    key: str, match: HiddenMatch | AttentionMatch | None, student: Sequence[str], teacher: Sequence[str]
) -> dict[str, str]:
    if match is None:
        return {}
    with under(key):
        return pair_layers(match.layers, student, teacher, match.layers_by)


def _keep(seen: dict[str, Tensor], name: str, trains: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if trains and not torch.is_grad_enabled():
            return
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(tensor, Tensor):
            raise QatkitError(
                f"'{name}' returns {type(tensor).__name__}, not a tensor",
                key="layers",
                advice="pass the name of one of the model's submodules",
            )
        seen[name] = tensor

    return hook


def _pair(student: dict[str, Tensor], teacher: dict[str, Tensor], ours: str, theirs: str) -> tuple[Tensor, Tensor]:
    for role, seen, name in (("student", student, ours), ("teacher", teacher, theirs)):
        if name not in seen:
            raise QatkitError(
                f"the hook on '{name}' of the {role} recorded no output",
                key="layers",
                advice="use a layer that the model's forward calls; if you compile the model, compile it after the "
                "Trainer has started",
            )
    return student[ours], teacher[theirs]


def _check_widths(names: tuple[str, str], pair: tuple[Tensor, Tensor], widths: tuple[int, int] | None) -> None:
    seen = pair[0].shape[-1], pair[1].shape[-1]
    if seen != tuple(widths or (seen[0], seen[0])):
        raise QatkitError(
            f"{widths} does not fit layer '{names[0]}' of the student, which returns {list(pair[0].shape)}, and "
            f"'{names[1]}' of the teacher, which returns {list(pair[1].shape)}",
            key="hidden.widths",
            advice=f"use widths={seen}, or compare other layers",
        )


def _check_maps(states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        if state.dim() != 4:
            raise QatkitError(
                f"None requires feature maps [batch, channels, height, width], but layer '{name}' returns "
                f"{list(state.shape)}",
                key="attention.heads",
                advice="use heads=4 for queries, keys or values, or compare convolutional layers",
            )


def _mask_for(mask: Tensor | None, states: Tensor) -> Tensor | None:
    """The mask as booleans, if it fits states ``[batch, length, width]``."""
    return mask.bool() if mask is not None and mask.shape == states.shape[:2] and states.dim() == 3 else None


def _check(key: str, layers: Mapping[str, str], weight: float) -> None:
    if not isinstance(layers, Mapping) or not layers:
        raise QatkitError(
            f"{layers!r} maps no layers",
            key=f"{key}.layers",
            advice="use {'student layer': 'teacher layer'}",
        )
    if not (weight > 0 and math.isfinite(weight)):
        raise QatkitError(f"{weight} is out of range", key=f"{key}.weight", advice="use a positive number")
