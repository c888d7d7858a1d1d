"""Helpers for tests of tracking: a user without a W&B account, and the records of a W&B run."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from qatkit.recipe.loading import load_recipe


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without an account, and without files that W&B keeps between runs."""
    for name, value in stranger(tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("WANDB_") and name not in stranger(tmp_path)]:
        monkeypatch.delenv(name)
    if wandb.setup().settings.mode != "online":  # read once per process, from the environment of an earlier test
        wandb.teardown()


def stranger(folder: Path) -> dict[str, str]:
    places = {f"WANDB_{kind}_DIR": str(folder / "home" / kind.lower()) for kind in ("DATA", "CACHE", "CONFIG")}
    return {"WANDB_SILENT": "true", "NETRC": str(folder / "home" / "netrc"), **places}


def read_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, records in pieces) after 7 bytes."""
    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + 7 : position + 7 + length]
        if not kind or len(piece) < length:
            return  # a killed process may leave the last piece half written
        parts, position = (piece if kind in (1, 2) else parts + piece), position + 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


class Records:
    """The records that one process sent to W&B."""

    def __init__(self, path: Path) -> None:
        self.records = list(read_records(path))
        (self.run,) = [record.run for record in self.records if record.WhichOneof("record_type") == "run"][:1]

    def history(self) -> list[dict[str, Any]]:
        rows = []
        for record in self.records:
            if record.WhichOneof("record_type") == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    *outer, last = item.nested_key or [item.key]
                    place = row
                    for key in outer:
                        place = place.setdefault(key, {})
                    place[last] = json.loads(item.value_json)
                rows.append(row)
        return rows

    def config(self) -> dict[str, Any]:
        updates = list(self.run.config.update)
        for record in self.records:
            if record.WhichOneof("record_type") == "config":
                updates.extend(record.config.update)
        return {item.key: json.loads(item.value_json) for item in updates if item.key}

    def summary(self) -> dict[str, Any]:
        return {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for record in self.records
            if record.WhichOneof("record_type") == "summary"
            for item in record.summary.update
        }

    def artifacts(self) -> dict[str, Any]:
        found = [record.artifact for record in self.records if record.WhichOneof("record_type") == "artifact"]
        return {artifact.name: artifact for artifact in found if artifact.type in ("report", "model")}

    def typed(self, kind: str) -> Counter[str]:
        """The number of times each name was logged with a value of a W&B type."""
        return Counter(
            name
            for row in self.history()
            for name, value in row.items()
            if isinstance(value, dict) and value.get("_type") == kind
        )


def run_files(out: Path) -> list[Path]:
    return sorted(out.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


def recipe(logger: str) -> Any:
    steps = ["stages.dense.max_steps=10", "stages.qat.max_steps=10", "model.args.channels=[8,8]"]
    return load_recipe("vision/digits_int4", [*steps, f"trainer.logger={logger}"])


def trained(out: Path, stage: str = "dense") -> bool:
    return (out / "stages" / stage / "stage.json").exists() and bool(list(out.glob(f"stages/{stage}/logs/*/*.csv")))
