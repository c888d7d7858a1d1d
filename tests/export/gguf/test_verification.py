"""Verification of GGUF files: every change of a file is found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from qatkit.export.gguf.format import export_gguf
from qatkit.export.gguf.read_back import _tensor_differences
from qatkit.export.gguf.super_blocks import LAYOUTS
from qatkit.export.gguf.tensors import stored_tensors
from qatkit.export.verification import Verification, verify
from tests.export.gguf.test_format import BATCH, spec, trained

Q_PROJ = "'model.layers.1.self_attn.q_proj.weight'"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A Llama with Q4_0 weights."""
    return trained(spec("Q4_0"))


def checked(model: nn.Module, path: Path, change: Callable[[Any], None]) -> Verification:
    """Export the model, change the file in place through the gguf package, and verify it."""
    export_gguf(model, path)
    assert verify(model, path, [BATCH]).passed
    reader = gguf.GGUFReader(path, "r+")
    change(reader)
    reader.data.flush()
    return verify(model, path, [BATCH])


def data(reader: Any, name: str) -> Any:
    return next(tensor.data for tensor in reader.tensors if tensor.name == name)


def one_ulp(reader: Any) -> None:
    data(reader, "blk.1.attn_q.weight")[3, 18] ^= 1  # the lowest bit of the second block's float16 scale


def one_code(reader: Any) -> None:
    data(reader, "blk.1.attn_q.weight")[3, 2] ^= 1


def swapped_rows(reader: Any) -> None:
    rows = data(reader, "blk.1.attn_q.weight")
    rows[[0, 1]] = rows[[1, 0]]


def heads_in_the_order_of_transformers(reader: Any) -> None:
    rows = data(reader, "blk.1.attn_q.weight")
    rows[:] = rows.reshape(4, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            one_ulp,
            [
                f"{Q_PROJ}: 1 of 128 scales differ, the first at [3, 1]",
                f"{Q_PROJ}: 28 of 4096 values differ, the first at [3, 32]",
            ],
        ),
        (one_code, [f"{Q_PROJ}: 1 of 4096 values differ, the first at [3, 0]"]),
        (swapped_rows, [f"{Q_PROJ}: 4 of 128 scales differ, the first at [0, 0]"]),
        (heads_in_the_order_of_transformers, [f"{Q_PROJ}: "]),
    ],
)
def test_a_changed_weight_is_named(
    change: Callable[[Any], None], messages: list[str], model: nn.Module, tmp_path: Path
) -> None:
    check = checked(model, tmp_path / "model.gguf", change)
    assert not check.passed
    for message, failure in zip(messages, check.failures, strict=False):
        assert failure.startswith(message), check.failures
    assert any("values that transformers loads differ" in failure for failure in check.failures)
    assert any(failure.startswith("outputs: ") for failure in check.failures)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_a_changed_step_scale_minimum_or_code_of_a_super_block_is_named(name: str, tmp_path: Path) -> None:
    model = trained(spec(name), steps=0, layers=1, hidden=256, intermediate=256)
    path, layout = tmp_path / "model.gguf", LAYOUTS[name]
    weight = "'model.layers.0.self_attn.v_proj.weight'"
    code = next(at for at in range(210) if at not in {*range(256)[layout.steps], *range(256)[layout.scales]})
    for at in (*range(256)[layout.steps], layout.scales.start, layout.scales.start + 4, layout.scales.stop - 1):
        check = changed_byte(model, path, at)
        assert any(failure.startswith(f"{weight}: ") and "scales differ" in failure for failure in check), (at, check)
    assert any(
        failure.startswith(f"{weight}: ") and "values differ" in failure for failure in changed_byte(model, path, code)
    )


def changed_byte(model: nn.Module, path: Path, at: int) -> list[str]:
    """Verify a file with one changed bit in the first super-block of a value projection."""
    export_gguf(model, path)
    reader = gguf.GGUFReader(path, "r+")
    data(reader, "blk.0.attn_v.weight")[0, at] ^= 16
    reader.data.flush()
    tensor = next(tensor for tensor in stored_tensors(model) if tensor.name == "blk.0.attn_v.weight")
    return _tensor_differences(tensor, next(found for found in reader.tensors if found.name == tensor.name))


def test_a_changed_norm_and_a_changed_setting_are_named(model: nn.Module, tmp_path: Path) -> None:
    def norm(reader: Any) -> None:
        values = data(reader, "output_norm.weight")
        values[5] = np.nextafter(values[5], np.float32(9))

    check = checked(model, tmp_path / "model.gguf", norm)
    assert check.failures[0] == "'model.norm.weight': 1 of 64 values differ, the first at [5]"

    def base(reader: Any) -> None:
        reader.fields["llama.rope.freq_base"].parts[-1][0] = 500000.0

    check = checked(model, tmp_path / "model.gguf", base)
    assert check.failures == ["metadata 'llama.rope.freq_base' is 500000.0, but 10000.0 in the trained model"]


def test_missing_additional_and_other_tensors_are_named(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(trained(spec("Q4_0"), layers=1), path)
    check = verify(model, path, [BATCH])
    assert "metadata 'llama.block_count' is 1, but 2 in the trained model" in check.failures
    assert "'model.layers.1.mlp.up_proj.weight': the file has no tensor 'blk.1.ffn_up.weight'" in check.failures
    export_gguf(trained(spec("Q4_0"), layers=3), path)
    assert "'blk.2.ffn_up.weight': the trained model has no such tensor" in verify(model, path, [BATCH]).failures
    export_gguf(trained(spec("Q8_0")), path)
    failures = verify(model, path, [BATCH]).failures
    assert f"{Q_PROJ}: of type Q8_0 instead of Q4_0" in failures
    assert "metadata 'general.file_type' is 7, but 2 in the trained model" in failures
    export_gguf(trained(spec("Q4_0"), intermediate=128), path)
    failures = verify(model, path, [BATCH]).failures
    assert "'model.layers.1.mlp.up_proj.weight': of shape [128, 64] instead of [96, 64]" in failures


def test_a_file_that_is_cut_off_or_not_gguf_is_a_failure(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(model, path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], content[:100], b"GGUF", b"not a model" * 10, b""):
        path.write_bytes(broken)
        check = verify(model, path, [BATCH])
        assert check.failures[0].startswith("model.gguf cannot be read: "), (broken[:20], check.failures)
        assert check.runtime_metric is None


def test_a_bfloat16_model_is_loaded_in_its_own_dtype(tmp_path: Path) -> None:
    model, path = trained(None, steps=0), tmp_path / "model.gguf"
    from qatkit import prepare_qat

    half = type(model)._from_config(model.config, dtype=torch.bfloat16).eval()
    prepare_qat(half, spec("Q4_0"), exclude=["lm_head"])
    export_gguf(half, path)
    check = verify(half, path, [BATCH])
    assert check.passed, check.failures
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} == {"Q4_0", "BF16", "F32"}
