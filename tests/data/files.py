"""Files of tables, images and recordings, small enough to generate in a test."""

from __future__ import annotations

import csv
import json
import random
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


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


def write_images(folder: Path, classes: Sequence[str], each: int = 30, size: int = 12) -> Path:
    """Noisy images in one folder per class; the class decides which channel is bright."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(each):
            pixels = np.random.default_rng([number, index]).integers(0, 90, (size, size + 4, 3), dtype=np.uint8)
            pixels[:, :, number] += 150
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def write_masks(folder: Path, count: int = 60, size: int = 12) -> Path:
    """Images, masks of their bright halves, and a table that names both."""
    folder.mkdir()
    lines = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 90, (size, size, 3), dtype=np.uint8)
        mask = np.zeros((size, size), np.uint8)
        half = np.index_exp[: size // 2] if index % 2 else np.index_exp[:, : size // 2]
        pixels[half] += 150
        mask[half] = 1
        mask[-1, -1] = 255
        Image.fromarray(pixels).save(folder / f"{index}.png")
        Image.fromarray(mask).save(folder / f"{index}_mask.png")
        row = {
            "image": f"{index}.png",
            "mask": f"{index}_mask.png",
            "labels": ["top"] if index % 2 else ["left", "red"],
        }
        lines.append(json.dumps(row))
    (folder / "images.jsonl").write_text("\n".join(lines))
    return folder / "images.jsonl"


def write_tones(folder: Path, pitches: Mapping[str, float], each: int = 24, rate: int = 8000) -> Path:
    """Recordings of tones in one folder per class."""
    for name, pitch in pitches.items():
        (folder / name).mkdir(parents=True)
        for index in range(each):
            time = np.arange(round(rate * (0.06 + 0.002 * index))) / rate
            samples = 0.5 * np.sin(2 * np.pi * pitch * time + index)
            with wave.open(str(folder / name / f"{index}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(rate)
                file.writeframes((samples * 32767).astype("<i2").tobytes())
    return folder


def write_boxes(folder: Path, count: int = 60, size: int = 16) -> Path:
    """Dark images with one bright rectangle each, red or blue, and a table with their boxes."""
    folder.mkdir()
    lines = []
    for index in range(count):
        draw = np.random.default_rng(index)
        x, y = (8 * int(number) for number in draw.integers(0, 2, 2))
        pixels = draw.integers(0, 60, (size, size, 3), dtype=np.uint8)
        pixels[y : y + 8, x : x + 8, 2 * (index % 2)] = 250
        Image.fromarray(pixels).save(folder / f"{index}.png")
        objects = {"bbox": [[x, y, 8, 8]], "category": [["red", "blue"][index % 2]]}
        lines.append(json.dumps({"image": f"{index}.png", "objects": objects}))
    (folder / "boxes.jsonl").write_text("\n".join(lines))
    return folder / "boxes.jsonl"
