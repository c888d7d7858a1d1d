"""Losses between what student and teacher compute inside: hidden states, attention maps, relations of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.distillation.losses import masked_mean
from qatkit.errors import QatkitError


def layer_map(
    student_layers: int, teacher_layers: int, layers: Literal["uniform", "last"] | Sequence[int] = "uniform"
) -> list[int]:
    """The teacher's layer for every layer of the student, numbered from 0.

    Sun et al. (2019, https://arxiv.org/abs/1908.09355), section 3.2: "uniform" is PKD-Skip with the last layer in it,
    "last" is PKD-Last.

    Args:
        student_layers: How many layers the student has.
        teacher_layers: How many the teacher has, at least as many.
        layers: "uniform" spreads over the teacher and ends with its last layer, "last" takes its last layers; or a
            layer number for every layer of the student.

    Raises:
        QatkitError: the student has more layers, or the numbers are not as many as it has, or not in the teacher.

    Example:
        >>> layer_map(3, 12)
        [3, 7, 11]
        >>> layer_map(3, 12, "last")
        [9, 10, 11]
    """
    if not 1 <= student_layers <= teacher_layers:
        raise QatkitError(
            f"layers: a student of {student_layers} layers cannot be mapped to a teacher of {teacher_layers}; write a "
            f"number from 1 to {teacher_layers}"
        )
    if layers == "uniform":
        return [(layer + 1) * teacher_layers // student_layers - 1 for layer in range(student_layers)]
    if layers == "last":
        return list(range(teacher_layers - student_layers, teacher_layers))
    if isinstance(layers, str):  # type: ignore[unreachable]  # from a recipe or a notebook, which nobody type-checks
        raise QatkitError(f"layers: '{layers}' is unknown; write 'uniform', 'last' or a list of layer numbers")
    numbers = list(layers)
    if len(numbers) != student_layers or not all(0 <= number < teacher_layers for number in numbers):
        raise QatkitError(
            f"layers: {numbers} does not name a layer of the teacher for each of the student's {student_layers}; write "
            f"{student_layers} numbers from 0 to {teacher_layers - 1}"
        )
    return numbers


def pair_layers(
    layers: Mapping[str, str],
    student: Sequence[str],
    teacher: Sequence[str],
    layers_by: Literal["uniform", "last"] = "uniform",
) -> dict[str, str]:
    """The teacher's layer for every layer of the student that a map of names or globs selects.

    Args:
        layers: Names or globs of the teacher's layers for those of the student; a ``*`` stands for what is between two
            dots. The layers that a glob of the student matches are spread over those that its teacher's glob matches.
        student: Names of all layers, in the model's order.
        teacher: The same of the teacher.
        layers_by: How they are spread, see `layer_map`.

    Raises:
        QatkitError: a name or glob matches nothing, or more layers of the student than of the teacher.

    Example:
        >>> pair_layers({"layers.*": "layers.*"}, ["layers.0"], ["layers", "layers.0", "layers.1", "layers.1.mlp"])
        {'layers.0': 'layers.1'}
    """
    pairs: dict[str, str] = {}
    for ours, theirs in layers.items():
        matched = []
        for role, pattern, names in (("student", ours, student), ("teacher", theirs, teacher)):
            found = [name for name in names if name and _is_matched(name, pattern)]
            if not found:
                known = [name for name in names if name][:20]
                raise QatkitError(f"layers: '{pattern}' is no submodule of the {role}; it has {known}")
            matched.append(found)
        if len(matched[0]) > len(matched[1]):
            raise QatkitError(
                f"layers: '{ours}' matches {len(matched[0])} layers of the student and '{theirs}' only "
                f"{len(matched[1])} of the teacher; write a name for each, {{{matched[0][0]}: {matched[1][0]}, ...}}"
            )
        numbers = layer_map(len(matched[0]), len(matched[1]), layers_by)
        pairs |= {name: matched[1][number] for name, number in zip(matched[0], numbers, strict=True)}
    return pairs


class Projections(nn.Module):
    """A learned linear map from the student's width to the teacher's for every pair of layers.

    Romero et al. (2015, https://arxiv.org/abs/1412.6550), section 2.2; Jiao et al. (2020,
    https://arxiv.org/abs/1909.10351), equation 8.

    Args:
        pairs: How many pairs of layers.
        student_width: Size of the student's hidden states.
        teacher_width: Size of the teacher's.
    """

    def __init__(self, pairs: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs))

    def forward(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Map a hidden state ``[..., student_width]`` of every pair to ``[..., teacher_width]``."""
        return [linear(state) for linear, state in zip(self.maps, hidden, strict=True)]


def hidden_mse_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of hidden states, over the positions that count.

    Jiao et al. (2020, https://arxiv.org/abs/1909.10351), equation 8.

    Args:
        student: Hidden states ``[..., width]``, any float dtype; computed in float32.
        teacher: Hidden states of the same shape; no gradient flows into them.
        mask: True where a position counts, ``[...]``.

    Raises:
        QatkitError: the shapes differ.
    """
    _check("hidden_mse_loss", student, teacher)
    return masked_mean((student.float() - teacher.detach().float()).square().mean(dim=-1), mask)


def hidden_cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 - cos(student, teacher)`` of hidden states, the mean over the positions that count.

    Sanh et al. (2019, https://arxiv.org/abs/1910.01108), section 2.

    Args:
        student: As in `hidden_mse_loss`.
        teacher: As in `hidden_mse_loss`.
        mask: As in `hidden_mse_loss`.

    Raises:
        QatkitError: the shapes differ.
    """
    _check("hidden_cosine_loss", student, teacher)
    return masked_mean(1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1), mask)


def attention_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of the places that student and teacher attend to: ``||Q_s / ||Q_s|| - Q_t / ||Q_t|| ||``.

    Q is the sum of squares over channels at every place. Zagoruyko and Komodakis (2017,
    https://arxiv.org/abs/1612.03928), equation 2 with p = 2, the mean over samples; the factor beta / 2 is the weight
    of the loss.

    Args:
        student: Feature maps ``[batch, channels, ...]``; computed in float32.
        teacher: Feature maps of the same size but for the channels; no gradient flows into them.

    Raises:
        QatkitError: the places differ.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise QatkitError(
            f"attention_transfer_loss: the student's feature maps have shape {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; all but the channels, the second size, must be equal"
        )
    maps = [
        F.normalize(features.float().square().sum(dim=1).flatten(1), dim=-1) for features in (student, teacher.detach())
    ]
    distances: Tensor = (maps[0] - maps[1]).norm(dim=-1)
    return distances.mean()


def relation_loss(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """KL divergence of how tokens relate: of ``softmax(A A^T / sqrt(d))`` with A the queries, the keys or the values.

    Wang et al. (2021, https://arxiv.org/abs/2012.15828), equations 5 to 7: the heads of each model are joined and split
    again into relation heads, so their number may differ between the two.

    Args:
        student: Queries, keys or values ``[batch, length, width]``, heads joined; computed in float32.
        teacher: The same of the teacher ``[batch, length, teacher width]``; no gradient flows into them.
        heads: Relation heads; both widths are a multiple.
        mask: True where a token counts, ``[batch, length]``; others neither relate nor are related to.

    Raises:
        QatkitError: batch or length differ, or a width is no multiple of `heads`.
    """
    if (
        student.dim() != 3
        or student.shape[:2] != teacher.shape[:2]
        or student.shape[2] % heads + teacher.shape[2] % heads
    ):
        raise QatkitError(
            f"relation_loss: the student's vectors have shape {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; both must be [batch, length, width] with equal batch and length, and widths that "
            f"are multiples of heads, here {heads}"
        )
    log_q, log_p = (_relations(vectors, heads, mask) for vectors in (student, teacher.detach()))
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)  # [batch, heads, length]
    return masked_mean(divergence.mean(dim=1), mask)


def _is_matched(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _relations(vectors: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    split = (
        vectors.float().reshape(*vectors.shape[:2], heads, -1).transpose(1, 2)
    )  # [batch, heads, length, width / heads]
    scores = split @ split.mT / math.sqrt(split.shape[-1])
    if mask is not None:
        # finite: a sequence of padding alone would be all -inf, and its softmax NaN
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(torch.float32).min)
    return scores.log_softmax(dim=-1).clamp(min=torch.finfo(torch.float32).min)


def _check(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise QatkitError(
            f"{name}: the student's hidden states have shape {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; where only the widths differ, map them with Projections"
        )
