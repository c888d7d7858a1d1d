"""The table and the figure of a sensitivity measurement show its numbers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from qatkit import QuantSpec, Scheme
from qatkit.quantization.mixed.records import Group, Option, Sensitivity
from qatkit.report.sensitivity import markdown, picture

MEASURED = Sensitivity(
    loss=2.5,
    candidates={f"int{bits}": Scheme(QuantSpec(num_bits=bits)) for bits in (8, 4)},
    groups=(
        Group(("stem",), 1000, {"int8": Option(1016, -1e-5), "int4": Option(516, 0.25)}),
        Group(("a_b.q$x$", "a_b.k$x$"), 200, {"int8": Option(216, 0.001)}),
    ),
    left_out=("int4 is omitted: it does not fit",),
)


def test_the_table_has_a_row_per_group_and_says_what_was_left_out() -> None:
    lines = markdown(MEASURED).splitlines()
    assert "| layers | weights | int8 | int4 |" in lines
    assert "| `stem` | 1,000 | -1e-05 (8.13 bits) | +0.25 (4.13 bits) |" in lines
    assert "| `a_b.q$x$ + a_b.k$x$` | 200 | +0.001 (8.64 bits) | - |" in lines
    assert lines[-1] == "- int4 is omitted: it does not fit"


def test_the_picture_stands_alone_with_a_mark_for_each_option_in_the_order_of_its_increase() -> None:
    text = picture(MEASURED)
    root = ET.fromstring(text)
    drawn = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"stem", "a_b.q$x$ +1", "int8", "int4"} <= drawn
    marks = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: (#\w+)', text)
    places = {(float(x), float(y)) for x, y, colour in marks if colour in ("#0b5fc2", "#b45911")}
    top = min(y for _, y in places)
    below = sorted({y for _, y in places} - {top})
    assert len(below) == 2  # the legend's marks, then a line for each group
    (edge, _), (right, _) = sorted(place for place in places if place[1] == below[0])
    (between,) = [x for x, y in places if y == below[1]]
    assert edge < between < right


@pytest.mark.parametrize("increase", [0.0, -1.0, 1e-300])
def test_a_picture_without_any_growth_can_be_drawn(increase: float) -> None:
    flat = Sensitivity(1.0, MEASURED.candidates, (Group(("a",), 8, {"int8": Option(8, increase)}),))
    assert "<svg" in picture(flat)
    assert picture(flat) == picture(flat)
