"""Sentences about speed: slowdowns, and the layers that run in floating point with the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 5
"""Layers named for each reason."""


def slowdowns(report: dict[str, Any]) -> list[str]:
    """Return a sentence for each file that is faster than the last quantized stage in the same format.

    In every format, the last quantized stage is compared to the first stage, and in the main format to the baselines
    as well. A file is slower if the fastest quarter of its calls took longer than the slowest quarter of the other
    file's.
    """
    formats: dict[str, list[dict[str, Any]]] = {}
    for row in [*report["rows"], *report["others"]]:
        formats.setdefault(row["format"], []).append(row)
    baselines = [(row["name"], row) for row in report["baselines"] if not row["failure"]]
    return [
        sentence
        for name, rows in formats.items()
        for sentence in _slower(rows, baselines if name == report["format"] else [])
    ]


def _slower(rows: Sequence[dict[str, Any]], baselines: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Sentences about the files of one format."""
    quantized = [row for row in rows if row["layers"]]
    if not quantized:
        return []
    last = quantized[-1]
    others = [(rows[0]["file"], rows[0])] if last is not rows[0] else []
    sentences = []
    for name, other in [*others, *baselines]:
        slower = [
            f"{then['median_ms'] / now['median_ms']:.2f}x at a batch of {now['batch_size']}"
            for now, then in zip(last["latency"], other["latency"], strict=True)
            if now["low_ms"] > then["high_ms"]
        ]
        if slower:
            sentences.append(f"{last['file']} is slower than {name}: {', '.join(slower)}")
    return sentences


def kernel_notes(report: dict[str, Any]) -> list[str]:
    """Return a sentence for every quantized stage with products that the runtime computes in floating point."""
    return [
        f"{row['file']}: {sum(row['kernels']['floating'].values())} of {_products(row['kernels'])} matrix products "
        f"run in floating point ({float_words(row['kernels'])}); see docs/runtimes.md"
        for row in [*report["rows"], *report["others"]]
        if row["layers"] and row["kernels"] and row["kernels"]["floating"]
    ]


def float_words(kernels: Mapping[str, Any]) -> str:
    """Return the kernels that run in floating point, and the layers with the reasons.

    Example:
        >>> float_words({"floating": {"Conv": 2}, "reasons": {"the input is not quantized": ["stem", "head"]}})
        '2 Conv; the input is not quantized: stem, head'
    """
    kinds = ", ".join(f"{count} {kind}" for kind, count in kernels["floating"].items())
    reasons = [
        f"{reason}: {', '.join(layers[:SHOWN])}" + (f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else "")
        for reason, layers in kernels["reasons"].items()
    ]
    return "; ".join([kinds, *reasons])


def missing_baselines(report: dict[str, Any]) -> list[str]:
    """Return why the runtime's own quantization is not in the table, if it failed."""
    return [
        f"no comparison with {row['name']}'s own quantization: {row['failure']}"
        for row in report["baselines"]
        if row["failure"]
    ]


def _products(kernels: Mapping[str, Any]) -> int:
    return sum(sum(kernels[kind].values()) for kind in ("integer", "floating", "weight_only"))
