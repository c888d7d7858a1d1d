"""The table of distillation losses, shared by schema, callbacks, fused kernels, memory prediction and docs.

A new divergence requires one function of logits and one row here. Without a function of top-k targets, it does not
support cached teachers; without a row kernel, full logits are materialized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qatkit.common.tables import Table, implementation
from qatkit.errors import QatkitError


@dataclass(frozen=True)
class Divergence:
    """A divergence between student outputs and teacher outputs."""

    name: str
    """The value of ``distill.loss``."""
    description: str
    """One-line description for the docs."""
    on_logits: str
    """``module:function(student, teacher, mask=)`` for full outputs, with ``temperature=`` and ``beta=`` if used."""
    on_top_k: str = ""
    """The same for top-k classes, such as `sparse_kd_loss`; empty if the divergence needs full outputs."""
    rows: str = ""
    """Row kernel for logits, as in `qatkit.kernels.kd_rows_torch`; empty if logits must be materialized."""
    top_k_rows: str = ""
    """Row kernel for a teacher's top-k classes; empty if logits must be materialized with a cached teacher."""
    triton: bool = False
    """Whether `qatkit.kernels.kd_rows_triton` also implements it."""
    compares_classes: bool = True
    """Whether softmax turns the outputs into probabilities of at least two classes."""
    kinds: tuple[str, ...] = ("classes",)
    """The kinds of outputs that it compares: "classes", "labels" and "values", as in `qatkit.tasks.Task.kind`, or
    "embeddings".
    """
    uses_temperature: bool = True
    uses_beta: bool = False

    def loss(self, student: Any, teacher: Any, mask: Any = None, *, temperature: float = 1.0, beta: float = 0.5) -> Any:
        """Return the mean loss over the included positions, computed from full outputs.

        Args:
            student: Logits ``[..., classes]``.
            teacher: Logits of the same shape.
            mask: True at positions to include ``[...]``; None includes all.
            temperature: Divides both sets of logits, if the divergence uses it.
            beta: Mixture weight, if the divergence uses it.
        """
        return implementation(self.on_logits)(student, teacher, mask=mask, **self._options(temperature, beta))

    def top_k_loss(
        self, student: Any, top_k: Any, mask: Any = None, *, temperature: float = 1.0, beta: float = 0.5
    ) -> Any:
        """Return the mean loss over the included positions, computed from a teacher's top-k classes.

        Args:
            student: Logits ``[..., classes]``.
            top_k: Indices ``[..., k]``, log-probabilities ``[..., k]``, and the log-probability of all other classes
                ``[...]``.
            mask: As in `loss`.
            temperature: As in `loss`.
            beta: As in `loss`.
        """
        return implementation(self.on_top_k)(student, *top_k, mask=mask, **self._options(temperature, beta))

    def check_cached(self, key: str = "loss") -> None:
        """Raise an error if a cached teacher is used with a divergence that needs full outputs.

        Args:
            key: Recipe key or argument with the divergence, for the error.

        Raises:
            QatkitError: the divergence does not support top-k targets.
        """
        if not self.on_top_k:
            cacheable = ", ".join(name for name, row in DIVERGENCES.items() if row.on_top_k)
            raise QatkitError(
                f"'{self.name}' needs full teacher outputs, but a cache stores only the top-k classes",
                key=key,
                advice=f"use {cacheable}, or remove the cache",
            )

    def check_kind(self, kind: str, key: str = "loss") -> None:
        """Raise an error if the divergence does not compare outputs of this kind.

        Args:
            kind: The kind of outputs; see `kinds`.
            key: Recipe key or argument with the divergence, for the error.

        Raises:
            QatkitError: the divergence does not compare such outputs; the error lists the divergences that do.
        """
        if kind not in self.kinds:
            fitting = ", ".join(name for name, row in DIVERGENCES.items() if kind in row.kinds)
            raise QatkitError(
                f"'{self.name}' compares {' and '.join(self.kinds)}, but the outputs of this task are {kind}",
                key=key,
                advice=f"use {fitting}",
            )

    def _options(self, temperature: float, beta: float) -> dict[str, float]:
        return ({"temperature": temperature} if self.uses_temperature else {}) | (
            {"beta": beta} if self.uses_beta else {}
        )


@dataclass(frozen=True)
class HiddenLoss:
    """A loss between student and teacher hidden states."""

    name: str
    """The value of ``distill.hidden.loss``."""
    description: str
    function: str
    """``module:function(student, teacher, mask)``."""


DIVERGENCES = Table(
    "distillation loss",
    [
        Divergence(
            "kl", "KL(teacher || student), as in Hinton et al. (2015)",
            on_logits="qatkit.distillation.losses:kd_loss", on_top_k="qatkit.distillation.sparse:sparse_kd_loss",
            rows="qatkit.kernels.kd_rows_torch:kl_rows", top_k_rows="qatkit.kernels.kd_rows_torch:top_k_kl_rows",
            triton=True,
        ),
        Divergence(
            "reverse_kl", "KL(student || teacher): mode-seeking, as in MiniLLM (Gu et al. 2023)",
            on_logits="qatkit.distillation.losses:reverse_kl_loss",
            rows="qatkit.kernels.kd_rows_torch:reverse_kl_rows", triton=True,
        ),
        Divergence(
            "jsd", "generalized Jensen-Shannon divergence, with `beta` as in GKD (Agarwal et al. 2023)",
            on_logits="qatkit.distillation.losses:jsd_loss",
            rows="qatkit.kernels.kd_rows_torch:jsd_rows", triton=True, uses_beta=True,
        ),
        Divergence(
            "mse", "mean squared error of logits or of regression outputs (Ba and Caruana 2014)",
            on_logits="qatkit.distillation.losses:mse_loss", compares_classes=False, uses_temperature=False,
            kinds=("classes", "labels", "values", "embeddings"),
        ),
        Divergence(
            "binary_kl", "KL(teacher || student) for each binary label separately (multilabel)",
            on_logits="qatkit.distillation.losses:binary_kl_loss", compares_classes=False, kinds=("labels",),
        ),
        Divergence(
            "cosine", "one minus the cosine similarity of embeddings",
            on_logits="qatkit.distillation.losses:cosine_loss", compares_classes=False, uses_temperature=False,
            kinds=("embeddings",),
        ),
        Divergence(
            "similarity", "squared difference between the pairwise similarities within a batch (relational, Park et "
            "al. 2019)",
            on_logits="qatkit.distillation.losses:similarity_loss", compares_classes=False, uses_temperature=False,
            kinds=("embeddings",),
        ),
    ],
)  # fmt: skip
"""Losses between student and teacher outputs."""

HIDDEN_LOSSES = Table(
    "hidden-state loss",
    [
        HiddenLoss("mse", "mean squared error", "qatkit.distillation.features:hidden_mse_loss"),
        HiddenLoss("cosine", "one minus the cosine similarity", "qatkit.distillation.features:hidden_cosine_loss"),
    ],
)
"""Losses between student and teacher hidden states."""
