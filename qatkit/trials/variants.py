"""Alternatives of the whole model in a search: pruned weights, fewer layers, narrower layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from qatkit.errors import QatkitError


@dataclass(frozen=True)
class Variant:
    """One alternative; None leaves the model as it is."""

    sparsity: float | None = None
    """Fraction of pruned weights of every layer."""
    nm: tuple[int, int] | None = None
    """N of every M consecutive inputs are kept."""
    depth: float | None = None
    """Fraction of the layers of a transformer that are kept."""
    width: float | None = None
    """Fraction of the channels of a convolutional network, or of the MLP neurons of a transformer, that are kept."""

    @property
    def name(self) -> str:
        """A description.

        Example:
            >>> Variant().name, Variant(nm=(2, 4), depth=0.5).name
            ('whole model', '2:4 sparsity, 50% of the layers')
        """
        parts = [
            f"{self.sparsity:.0%} sparsity" if self.sparsity is not None else "",
            f"{self.nm[0]}:{self.nm[1]} sparsity" if self.nm is not None else "",
            f"{self.depth:.0%} of the layers" if self.depth is not None else "",
            f"{self.width:.0%} of the width" if self.width is not None else "",
        ]
        return ", ".join(filter(None, parts)) or "whole model"


def parse_variants(sparsity: str, depth: str, width: str) -> list[Variant]:
    """Return all combinations of comma-separated values; the model as it is comes first.

    Args:
        sparsity: Fractions or patterns.
        depth: Fractions.
        width: Fractions.

    Raises:
        QatkitError: a value is no fraction between 0 and 1, or no pattern such as 2:4.

    Example:
        >>> [variant.name for variant in parse_variants("2:4", "0.5", "")]
        ['whole model', '50% of the layers', '2:4 sparsity', '2:4 sparsity, 50% of the layers']
    """
    sparse: list[dict[str, float | tuple[int, int]]] = [{}, *(_sparsity(text) for text in _parts(sparsity))]
    depths = [None, *(_fraction(text, "--depth") for text in _parts(depth))]
    widths = [None, *(_fraction(text, "--width") for text in _parts(width))]
    return [
        Variant(**how, depth=layers, width=wide)  # type: ignore[arg-type]  # each key has its own type
        for how, layers, wide in itertools.product(sparse, depths, widths)
    ]


def _parts(text: str) -> Sequence[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _sparsity(text: str) -> dict[str, float | tuple[int, int]]:
    kept, colon, of = text.partition(":")
    if colon and kept.isdecimal() and of.isdecimal():
        return {"nm": (int(kept), int(of))}
    return {"sparsity": _fraction(text, "--sparsity")}


def _fraction(text: str, key: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        pattern = ", or a pattern such as 2:4" if key == "--sparsity" else ""
        raise QatkitError(f"'{text}' is out of range", key=key, advice=f"use a fraction between 0 and 1{pattern}")
    return value
