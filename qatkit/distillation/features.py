"""Feature losses between hidden states, attention maps and token relations of student and teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.distillation.losses import masked_mean, zero_uncounted
from qatkit.errors import QatkitError, did_you_mean


def layer_map(
    student_layers: int, teacher_layers: int, layers: Literal["uniform", "last"] | Sequence[int] = "uniform"
) -> list[int]:
    """Map each student layer to a teacher layer by index.

    "uniform" is PKD-Skip including the last layer, and "last" is PKD-Last (Sun et al. 2019,
    https://arxiv.org/abs/1908.09355, section 3.2).

    Args:
        student_layers: Number of student layers.
        teacher_layers: Number of teacher layers, at least `student_layers`.
        layers: "uniform" spaces the layers evenly up to the teacher's last layer, and "last" uses the teacher's last
            layers. A list contains one teacher layer index per student layer.

    Raises:
        QatkitError: the student has more layers than the teacher, or the indices do not match the two models.

    Example:
        >>> layer_map(3, 12)
        [3, 7, 11]
        >>> layer_map(3, 12, "last")
        [9, 10, 11]
    """
    if not 1 <= student_layers <= teacher_layers:
        raise QatkitError(
            f"{student_layers} student layers cannot be mapped to {teacher_layers} teacher layers",
            key="layers",
            advice=f"use an integer from 1 to {teacher_layers}",
        )
    if layers == "uniform":
        return [(layer + 1) * teacher_layers // student_layers - 1 for layer in range(student_layers)]
    if layers == "last":
        return list(range(teacher_layers - student_layers, teacher_layers))
    if isinstance(layers, str):  # type: ignore[unreachable]  # from a recipe or a notebook, which nobody type-checks
        raise QatkitError(
            f"unknown layer map '{layers}'", key="layers", advice="use 'uniform', 'last' or a list of layer indices"
        )
    numbers = list(layers)
    if len(numbers) != student_layers or not all(0 <= number < teacher_layers for number in numbers):
        raise QatkitError(
            f"{numbers} does not contain one teacher layer index for each of the {student_layers} student layers",
            key="layers",
            advice=f"use {student_layers} indices from 0 to {teacher_layers - 1}",
        )
    return numbers


def pair_layers(
    layers: Mapping[str, str],
    student: Sequence[str],
    teacher: Sequence[str],
    layers_by: Literal["uniform", "last"] = "uniform",
) -> dict[str, str]:
    """Map student layers to teacher layers by names or globs.

    Args:
        layers: Maps student names or globs to teacher names or globs; ``*`` matches one component between dots. The
            matched student layers are mapped to the matched teacher layers by `layer_map`.
        student: Names of all student layers, in the model's order.
        teacher: Names of all teacher layers.
        layers_by: The layer map; see `layer_map`.

    Raises:
        QatkitError: a name or glob matches no layer, or it matches more student layers than teacher layers.

    Example:
        >>> pair_layers({"layers.*": "layers.*"}, ["layers.0"], ["layers", "layers.0", "layers.1", "layers.1.mlp"])
        {'layers.0': 'layers.1'}
    """
    pairs: dict[str, str] = {}
    for ours, theirs in layers.items():
        matches = []
        for role, pattern, names in (("student", ours, student), ("teacher", theirs, teacher)):
            match = [name for name in names if name and _is_matched(name, pattern)]
            if not match:
                raise QatkitError(
                    f"'{pattern}' matches no submodule of the {role}",
                    key="layers",
                    advice=did_you_mean(pattern, filter(None, names)),
                )
            matches.append(match)
        if len(matches[0]) > len(matches[1]):
            raise QatkitError(
                f"'{ours}' matches more student layers ({len(matches[0])}) than '{theirs}' matches teacher layers "
                f"({len(matches[1])})",
                key="layers",
                advice=f"map each student layer to a teacher layer: {{{matches[0][0]}: {matches[1][0]}, ...}}",
            )
        numbers = layer_map(len(matches[0]), len(matches[1]), layers_by)
        pairs |= {name: matches[1][number] for name, number in zip(matches[0], numbers, strict=True)}
    return pairs


class Projections(nn.Module):
    """Learned linear projections from student width to teacher width, one per pair of layers.

    References: Romero et al. (2015, https://arxiv.org/abs/1412.6550), section 2.2; Jiao et al. (2020,
        https://arxiv.org/abs/1909.10351), equation 8.

    Args:
        pairs: Number of layer pairs.
        student_width: Width of the student's hidden states.
        teacher_width: Width of the teacher's hidden states.
    """

    def __init__(self, pairs: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs))

    def forward(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Project the student state of each pair from ``[..., student_width]`` to ``[..., teacher_width]``."""
        return [linear(state) for linear, state in zip(self.maps, hidden, strict=True)]


def hidden_mse_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of hidden states over the included positions.

    Reference: Jiao et al. (2020, https://arxiv.org/abs/1909.10351), equation 8.

    Args:
        student: Hidden states ``[..., width]``, any float dtype; computed in float32.
        teacher: Hidden states of the same shape; no gradient flows into them.
        mask: True at positions to include, ``[...]``.

    Raises:
        QatkitError: the shapes differ.
    """
    _check("hidden_mse_loss", student, teacher)
    student, teacher, mask = _counted_states(student, teacher, mask)
    return masked_mean((student.float() - teacher.float()).square().mean(dim=-1), mask)


def hidden_cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 - cos(student, teacher)`` of hidden states, averaged over the included positions.

    Reference: Sanh et al. (2019, https://arxiv.org/abs/1910.01108), section 2.

    Args:
        student: As in `hidden_mse_loss`.
        teacher: As in `hidden_mse_loss`.
        mask: As in `hidden_mse_loss`.

    Raises:
        QatkitError: the shapes differ.
    """
    _check("hidden_cosine_loss", student, teacher)
    student, teacher, mask = _counted_states(student, teacher, mask)
    return masked_mean(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)


def attention_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer: ``||Q_s / ||Q_s|| - Q_t / ||Q_t|| ||``, averaged over samples.

    Q is the sum of squares over channels at each location. This is equation 2 of Zagoruyko and Komodakis (2017,
    https://arxiv.org/abs/1612.03928) with p = 2; their factor beta / 2 is the weight of the loss.

    Args:
        student: Feature maps ``[batch, channels, ...]``; computed in float32.
        teacher: Feature maps of the same batch and spatial size; no gradient flows into them.

    Raises:
        QatkitError: batch or spatial sizes differ.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise QatkitError(
            f"the student's feature maps have shape {list(student.shape)}, the teacher's {list(teacher.shape)}",
            key="attention_transfer_loss",
            advice="pass maps of equal shape except for the channels (dimension 1)",
        )
    maps = [
        F.normalize(features.float().square().sum(dim=1).flatten(1), dim=-1) for features in (student, teacher.detach())
    ]
    distances: Tensor = (maps[0] - maps[1]).norm(dim=-1)
    return distances.mean()


def relation_loss(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """KL divergence of token relations ``softmax(A A^T / sqrt(d))``, where A is the queries, keys or values.

    The heads of each model are concatenated and split into relation heads, so the two models may have different numbers
    of heads (Wang et al. 2021, https://arxiv.org/abs/2012.15828, equations 5 to 7).

    Args:
        student: Queries, keys or values ``[batch, length, width]``, heads concatenated; computed in float32.
        teacher: The teacher's queries, keys or values ``[batch, length, teacher width]``; no gradient flows into them.
        heads: Number of relation heads; must divide both widths.
        mask: True at tokens to include, ``[batch, length]``; other tokens are neither queries nor keys.

    Raises:
        QatkitError: batch sizes or lengths differ, or `heads` does not divide a width.
    """
    if (
        student.dim() != 3
        or student.shape[:2] != teacher.shape[:2]
        or student.shape[2] % heads + teacher.shape[2] % heads
    ):
        raise QatkitError(
            f"the student's vectors have shape {list(student.shape)}, the teacher's {list(teacher.shape)}; both must "
            f"be [batch, length, width] with equal batch and length, and heads={heads} must divide both widths",
            key="relation_loss",
            advice="pass queries, keys or values, and a number of heads that divides their widths",
        )
    student, teacher, mask = _counted_states(student, teacher, mask)
    log_q, log_p = (_relations(vectors, heads, mask) for vectors in (student, teacher))
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
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min)
    return scores.log_softmax(dim=-1).clamp(min=torch.finfo(torch.float32).min)


def _counted_states(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both states (0 at ignored positions, the teacher's detached) and a boolean mask."""
    mask = None if mask is None else mask.bool()
    return zero_uncounted(student, mask), zero_uncounted(teacher.detach(), mask), mask


def _check(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise QatkitError(
            f"the student's hidden states have shape {list(student.shape)}, the teacher's {list(teacher.shape)}",
            key=name,
            advice="map states of different widths with Projections",
        )
