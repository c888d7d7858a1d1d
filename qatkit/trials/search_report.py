"""The result of a search: a few lines, ``search.json`` and the page ``search.html``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qatkit.advise.price import per_thousand
from qatkit.common.files import write_atomically
from qatkit.quantization.mixed.overrides import plain_layers
from qatkit.report.page import missing_packages, template
from qatkit.trials.bounded import Found, shown


def summary(found: Found, price: float | None = None, batch: int = 1) -> list[str]:
    """Return the result in a few lines.

    Args:
        found: The result.
        price: The price of the device per hour, if it is minimized.
        batch: Samples per call.
    """
    promise = found.promise
    lines = [
        verdict(found),
        f"{found.bytes:,} bytes instead of {found.dense_bytes:,}: {found.dense_bytes / found.bytes:.2f} times smaller",
    ]
    if found.latency is not None:
        dense, own = (found.latency[key]["median_ms"] for key in ("dense", "found"))
        faster = f"{dense / own:.2f} times faster" if own < dense else f"{own / dense:.2f} times SLOWER"
        lines.append(f"{own:.4f} ms per call instead of {dense:.4f}: {faster}")
        if price is not None:
            prices = [per_thousand(price, ms / 1e3, batch) for ms in (own, dense)]
            lines.append(f"{prices[0]:.6f} per thousand requests instead of {prices[1]:.6f}")
    lines.append(f"{promise.flipped:.2%} of the predictions differ from those of the dense model")
    if promise.worst is not None:
        lines.append(f"the class that lost most is {promise.worst[0]}, by {promise.worst[1]:.2%}")
    steps = f"{found.step.share:.0%} of the steps" if found.step.share else "no training"
    lines += [f"{found.variant}, {steps}; all trainings: {found.spent}"]
    lines += [f"  {each.group}: {each.format} ({each.why})" for each in found.decisions]
    return [*lines, found.file]


def verdict(found: Found) -> str:
    """Return whether the promise is kept, in one sentence."""
    promise, part = found.promise, f"{found.limit:.2%}"
    interval = ""
    if promise.interval is not None:
        interval = f" (95% interval: {promise.interval[0]:.2%} to {promise.interval[1]:.2%})"
    text = f"KEPT: at most {part}" if found.kept else f"NOT KEPT: more than {part}"
    if found.failures:
        text = f"NOT KEPT: the file failed verification ({found.failures[0]})"
    elif not found.confirmed:
        text += ", but no training was within it on the validation split, so this is the one that lost least there"
    return (
        f"{text}; {promise.metric} {promise.found:.4g} instead of {promise.dense:.4g} on {promise.samples:,} test "
        f"samples, in the runtime, a loss of {promise.lost:.2%}{interval}"
    )


def plain(found: Found) -> dict[str, Any]:
    """Return the result as plain data for JSON."""
    content = asdict(found) | {"trained": None}
    del content["trained"]
    content["ladders"] = {
        variant: [
            {"cost": rung.cost, "increase": rung.increase, "formats": rung.formats, "layers": plain_layers(rung.layers)}
            for rung in rungs
        ]
        for variant, rungs in found.ladders.items()
    }
    return content


def write_report(folder: Path, name: str, found: Found) -> list[Path]:
    """Write ``search.json`` and, if the packages for it are installed, ``search.html``.

    Returns:
        The files.
    """
    files = [folder / "search.json"]
    write_atomically(files[0], json.dumps(plain(found), indent=1))
    if missing_packages() is None:
        files.append(folder / "search.html")
        write_atomically(files[1], render(name, found))
    return files


def render(name: str, found: Found) -> str:
    """Render the page."""
    show = shown(found.minimize)
    costs = {each.group: {key: show(option.bytes) for key, option in each.options.items()} for each in found.decisions}
    text: str = template("search.html.j2").render(
        title=name, found=found, verdict=verdict(found), lines=summary(found)[1:], show=show,
        costs=costs,
        names=list(dict.fromkeys(key for each in found.decisions for key in each.options)),
    )  # fmt: skip
    return text
