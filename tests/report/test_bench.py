"""Latencies are measured in the runtime, in turn."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qatkit.report.bench as module
from qatkit import QatkitError
from qatkit.export.dense import export_dense
from qatkit.export.onnx.format import export_onnx
from qatkit.report.bench import bench, compare


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model and one of thousands of times its work, which is slower on a busy machine too."""
    folder = tmp_path_factory.mktemp("files")
    paths = {"small": folder / "small.onnx", "large": folder / "large.onnx"}
    export_onnx(nn.Sequential(nn.Linear(64, 4)), torch.rand(2, 64), paths["small"])
    layers = [nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 4)]
    export_onnx(nn.Sequential(*layers), torch.rand(2, 64), paths["large"])
    return paths


def test_every_file_has_a_row_per_batch_size_and_the_larger_model_is_slower(files: dict[str, Path]) -> None:
    rows = compare(files, torch.rand(3, 64), batch_sizes=(1, 16), repeats=5)
    assert list(rows) == ["small", "large"]
    for latencies in rows.values():
        assert [row["batch_size"] for row in latencies] == [1, 16]
        for row in latencies:
            assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
            assert (row["repeats"], row["threads"]) == (5, 1)
    for small, large in zip(rows["small"], rows["large"], strict=True):
        assert large["median_ms"] > 2 * small["median_ms"]
    json.dumps(rows)


def test_one_file_gives_the_same_rows(files: dict[str, Path]) -> None:
    (row,) = bench(files["small"], torch.rand(3, 64), batch_sizes=(4,), repeats=2)
    assert (row["batch_size"], row["repeats"]) == (4, 2)


def test_files_take_turns_and_are_warm_before_the_first_measurement(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    timed: list[str] = []

    class Recorded:
        def __init__(self, path: Path) -> None:
            self.name = path.stem

        def __call__(self, x: Tensor) -> Tensor:
            assert x.shape == (7, 64)
            calls.append(self.name)
            return x

    def time_it(call: partial[Tensor], count: int) -> float:
        assert {"small", "large"} <= set(calls), "every file runs before any is measured"
        timed.append(call.func.name)  # type: ignore[attr-defined]  # a Recorded
        return 1e-3 * timed.count(timed[-1])

    monkeypatch.setattr(module, "_load", lambda file, threads: Recorded(file.path))
    monkeypatch.setattr(module, "_time", time_it)
    rows = compare(files, torch.rand(3, 64), batch_sizes=(7,), repeats=5)
    rounds = [timed[start : start + 2] for start in range(0, 10, 2)]
    assert all(sorted(each) == ["large", "small"] for each in rounds)
    assert len({each[0] for each in rounds}) == 2, "neither file is always behind the other"
    for name in ("small", "large"):
        row = rows[name][0]
        found = [row[key] for key in ("low_ms", "median_ms", "high_ms")]  # type: ignore[literal-required]
        assert found == pytest.approx([2.0, 3.0, 4.0]), "quartiles of 1 to 5 ms"


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"threads": 0}, "threads"), ({"repeats": 0}, "repeats"), ({"batch_sizes": (1, 0)}, "batch_sizes")],
)
def test_numbers_below_one_are_refused(changes: dict[str, int], key: str, files: dict[str, Path]) -> None:
    with pytest.raises(QatkitError, match=f"{key}: 0 "):
        compare(files, torch.rand(3, 64), **changes)


def test_a_file_that_no_runtime_takes_is_refused(tmp_path: Path) -> None:
    export_dense(nn.Linear(64, 4), tmp_path / "model.safetensors")
    with pytest.raises(QatkitError, match="the latency of 'dense' exports is not measured"):
        bench(tmp_path / "model.safetensors", torch.rand(3, 64))
