"""Files of tables, images and recordings, small enough to generate in a test."""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_csv(path: Path, columns: Mapping[str, Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def houses(rows: int = 240) -> dict[str, list[object]]:
    """Prices and rents that follow from size, age and town."""
    draw = random.Random(0)
    size = [draw.uniform(30, 200) for _ in range(rows)]
    age = [draw.uniform(0, 100) for _ in range(rows)]
    town = [draw.choice(["north", "south"]) for _ in range(rows)]
    price = [s / 40 + (t == "south") for s, t in zip(size, town, strict=True)]
    rent = [s / 50 - a / 50 for s, a in zip(size, age, strict=True)]
    return {
        "size": size, "age": age, "town": town, "price": price, "rent": rent,
        "label": ["dear" if p > 3.4 else "cheap" for p in price],
    }  # fmt: skip
