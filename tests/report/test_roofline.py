"""The picture of a roofline: every layer with products is a point on the roof."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatkit.advise.devices import DEVICES
from qatkit.advise.roofline import LayerCost
from qatkit.report.roofline import picture, points
from tests.cli.in_process import qatkit

BELOW = LayerCost("a", "Linear", 10**6, 10**6, 2 * 10**6, 2000)
ABOVE = LayerCost("b", "Linear", 10**6, 10**6, 2 * 10**9, 2000)
NOTHING = LayerCost("c", "LayerNorm", 100, 100, 0, 2000)


def test_points_are_on_the_roof_and_their_parts_are_those_of_the_times() -> None:
    device = DEVICES["a100"]
    peak, bandwidth = device.rates["bf16"], device.bandwidth / 1e3
    bytes_moved = 2 * (10**6 + 2000)
    (x, y, part), (right, top, rest) = points([BELOW, ABOVE, NOTHING], device, "bf16")
    assert (x, y) == pytest.approx((2e6 / bytes_moved, 2e6 / bytes_moved * bandwidth))
    assert (right, top) == pytest.approx((2e9 / bytes_moved, peak))
    times = bytes_moved / (bandwidth * 1e12), 2e9 / (peak * 1e12)
    assert (part, rest) == pytest.approx((times[0] / sum(times), times[1] / sum(times)))


def test_the_picture_names_the_ridge_and_leaves_out_training() -> None:
    device = DEVICES["a100"]
    text = picture({"prefill": [BELOW, ABOVE], "training": [BELOW]}, device, "bf16")
    assert f"left of {device.rates['bf16'] * 1e3 / device.bandwidth:.3g}, layers are memory-bound" in text
    assert ">prefill<" in text
    assert "training" not in text


def test_the_command_writes_the_picture(tmp_path: Path) -> None:
    done = qatkit("profile", "vision/digits_int4", "--device", "a100", "--picture", "roofline.svg", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "TFLOP/s in" in (tmp_path / "roofline.svg").read_text()
