"""The picture of a roofline: every layer with products is a point on the roof."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qatkit.advise.devices import DEVICES
from qatkit.advise.roofline import LayerCost
from qatkit.report.roofline import picture
from tests.cli.in_process import qatkit

SVG = "{http://www.w3.org/2000/svg}"


def test_points_are_on_the_roof_and_have_the_area_of_their_time() -> None:
    device = DEVICES["a100"]
    below = LayerCost("a", "Linear", 10**6, 10**6, 2 * 10**6, 2000)  # about 1 FLOP/byte
    above = LayerCost("b", "Linear", 10**6, 10**6, 2 * 10**9, 2000)  # about 1000 FLOP/byte
    nothing = LayerCost("c", "LayerNorm", 100, 100, 0, 2000)
    text = picture({"prefill": [below, above, nothing], "training": [below]}, device, "bf16")
    tree = ElementTree.fromstring(text)
    (points,) = (group for group in tree.iter(f"{SVG}g") if group.get("id", "").startswith("PathCollection"))
    places = [(float(use.get("x", 0)), float(use.get("y", 0))) for use in points.iter(f"{SVG}use")]
    assert len(places) == 2, "layers without products, and training, are left out"
    assert places[0][0] < places[1][0]
    assert places[0][1] > places[1][1], "y grows downwards"
    ridge = device.rates["bf16"] * 1e3 / device.bandwidth
    assert f"left of {ridge:.3g}, layers are memory-bound" in text
    widths = [box_width(path.get("d", "")) for path in tree.iter(f"{SVG}path") if path.get("id", "").startswith("C0_")]
    times = [2 * (10**6 + 2000) / (device.bandwidth * 1e9), 2e9 / (device.rates["bf16"] * 1e12)]
    areas = [20 + 400 * time / sum(times) for time in times]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(areas[0] / areas[1]), rel=1e-3)


def box_width(path: str) -> float:
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]
    return max(numbers[::2]) - min(numbers[::2])


def test_the_command_writes_the_picture(tmp_path: Path) -> None:
    done = qatkit("profile", "vision/digits_int4", "--device", "a100", "--picture", "roofline.svg", cwd=tmp_path)
    assert done.code == 0, done.err
    text = (tmp_path / "roofline.svg").read_text()
    assert "TFLOP/s in" in text
    assert ">forward<" in text
