"""Measure causal language models as they write text: prefill, decode, time to first token, load time and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from qatkit.export.decoding import Decoder
from qatkit.report.bench import in_random_order
from qatkit.report.serving import Ratio, speedup

SECONDS = 5.0
"""Time per file, about."""


@dataclass(frozen=True)
class Decoded:
    """The speed of one exported language model in its runtime, for one text at a time."""

    runtime: str
    versions: Mapping[str, str]
    """Versions of the runtime's packages, by name."""
    bytes: int
    load_seconds: float
    """Time to open the file in a new process."""
    peak_bytes: int | None
    """Largest growth of that process's resident memory; None if the system has no ``/proc``."""
    prompt_tokens: int
    new_tokens: int
    first: np.ndarray[Any, Any]
    """Seconds until the first new token, by round; values with the same index were measured in the same round."""
    rest: np.ndarray[Any, Any]
    """Seconds for all other new tokens, by round."""

    def prefill(self) -> list[float]:
        """Quartiles of the prompt's tokens per second."""
        return _quartiles(self.prompt_tokens / self.first)

    def decode(self) -> list[float]:
        """Quartiles of the new tokens per second, without the first."""
        return _quartiles((self.new_tokens - 1) / self.rest)

    def first_token(self) -> list[float]:
        """Quartiles of the seconds until the first new token."""
        return _quartiles(self.first)

    def content(self) -> dict[str, Any]:
        """Plain data, with quartiles as lists."""
        return {
            "runtime": self.runtime,
            "versions": dict(self.versions),
            "bytes": self.bytes,
            "load_s": self.load_seconds,
            "peak_bytes": self.peak_bytes,
            "first_token_s": self.first_token(),
            "prefill_tokens_per_s": self.prefill(),
            "decode_tokens_per_s": self.decode(),
            "rounds": len(self.first),
        }


def time_decoders(
    decoders: Mapping[str, Decoder],
    sizes: Mapping[str, int],
    prompt: Sequence[int],
    new_tokens: int,
    seconds: float = SECONDS,
) -> dict[str, Decoded]:
    """Let opened models continue a prompt, alternately, so that machine load affects all of them equally.

    Args:
        decoders: Opened models by name.
        sizes: Bytes of their files.
        prompt: Token IDs.
        new_tokens: The number of new tokens, at least 2.
        seconds: Time per file, about; every file has at least 5 rounds.

    Raises:
        SeparateError: a runtime fails.
    """
    calls: dict[str, Callable[[], tuple[float, float]]] = {
        name: partial(decoder.time, prompt, new_tokens) for name, decoder in decoders.items()
    }
    warm = [sum(call()) for call in calls.values()]
    rounds = int(np.clip(seconds / np.mean(warm), 5, 50))
    timed = {name: np.array(times).T for name, times in in_random_order(calls, rounds).items()}
    return {
        name: Decoded(
            decoder.runtime, decoder.versions, sizes[name], decoder.load_seconds, decoder.peak_bytes(), len(prompt),
            new_tokens, *timed[name],
        )
        for name, decoder in decoders.items()
    }  # fmt: skip


def ratios(file: Decoded, dense: Decoded) -> dict[str, Ratio]:
    """Return the speeds of a file relative to the dense one, from paired rounds."""
    return {"prefill": speedup(dense.first, file.first), "decode": speedup(dense.rest, file.rest)}


def comparison(files: Mapping[str, Decoded], dense: Mapping[str, str]) -> list[str]:
    """Sentences that compare files with the dense file in the same runtime; slower ones are first.

    Args:
        files: The measurements by name.
        dense: The name of the dense file, for each file that has one.
    """
    lines = []
    for name, other in dense.items():
        file, plain = files[name], files[other]
        found = ratios(file, plain)
        slow = any(ratio.high < 1 for ratio in found.values())
        words = ", ".join(
            f"{what} {each.median:.2f}x ({each.low:.2f} to {each.high:.2f})" for what, each in found.items()
        )
        memory = ""
        if file.peak_bytes and plain.peak_bytes:
            memory = f"; peak memory: {file.peak_bytes / plain.peak_bytes:.2f}x"
        lines.append(
            f"{'SLOWER: ' if slow else ''}speed of {name} relative to {other} in {file.runtime}: {words}; "
            f"size: {file.bytes / plain.bytes:.2f}x{memory}"
        )
    return sorted(lines, key=lambda line: not line.startswith("SLOWER"))


HEADERS = ("file", "runtime", "size", "load", "peak memory", "first token", "prefill, tokens/s", "decode, tokens/s")


def cells(name: str, file: Mapping[str, Any]) -> list[str]:
    """One row of the table with `HEADERS`, from `Decoded.content`: medians, with quartiles in parentheses."""
    peak = "unknown" if file["peak_bytes"] is None else f"{file['peak_bytes'] / 1e6:.1f} MB"
    low, median, high = (seconds * 1e3 for seconds in file["first_token_s"])
    return [
        name,
        ", ".join(f"{package} {number}" for package, number in file["versions"].items()),
        f"{file['bytes'] / 1e3:.1f} kB",
        f"{file['load_s'] * 1e3:.0f} ms",
        peak,
        f"{median:.3g} ms ({low:.3g} to {high:.3g})",
        _with_quartiles(file["prefill_tokens_per_s"]),
        _with_quartiles(file["decode_tokens_per_s"]),
    ]


def content(files: Mapping[str, Decoded], dense: Mapping[str, str]) -> dict[str, Any]:
    """Plain data of all files, with the speeds relative to the dense file in the same runtime."""
    return {
        name: file.content()
        | (
            {"relative_to": dense[name], "speedup": {key: asdict(each) for key, each in
                                                     ratios(file, files[dense[name]]).items()}}
            if name in dense
            else {}
        )
        for name, file in files.items()
    }  # fmt: skip


def _with_quartiles(values: Sequence[float]) -> str:
    low, median, high = values
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


def _quartiles(values: np.ndarray[Any, Any]) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]
