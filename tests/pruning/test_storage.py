"""Sparse files load back equal, and have the predicted size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy.sparse import csr_matrix
from torch import Tensor

from qatkit import QatkitError
from qatkit.pruning import storage
from qatkit.pruning.masks import apply_mask, magnitude_mask, nm_mask
from qatkit.pruning.storage import load_sparse, save_sparse, stored_bytes


def pruned(sparsity: float, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (64, 512)) -> Tensor:
    weight = torch.randn(shape).to(dtype)
    apply_mask(weight, magnitude_mask(weight, sparsity))
    return weight


@pytest.mark.parametrize("form", [None, "dense", "bitmask", "csr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_dict_loads_back_equal(tmp_path: Path, form: Any, dtype: torch.dtype) -> None:
    state = {
        "linear.weight": pruned(0.9, dtype),
        "odd.weight": pruned(0.8, dtype, (7, 9)),
        "conv.weight": pruned(0.7, dtype, (6, 5, 3, 3)).to(memory_format=torch.channels_last),
        "dense.weight": torch.randn(4, 4).to(dtype),
        "empty.weight": torch.zeros(0, 4, dtype=dtype),
        "zeros.weight": torch.zeros(8, 8, dtype=dtype),
        "bias": torch.zeros(9, dtype=dtype),
        "steps": torch.zeros(3, 3, dtype=torch.int64),
    }
    state["tied.weight"] = state["linear.weight"]
    forms = save_sparse(state, tmp_path / "model.safetensors", form)
    loaded = load_sparse(tmp_path / "model.safetensors")
    assert loaded.keys() == state.keys() == forms.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype, name
    assert forms["bias"] == forms["steps"] == forms["dense.weight"] == "dense"
    assert forms["linear.weight"] == (form or "bitmask")


@pytest.mark.parametrize("form", ["dense", "bitmask", "csr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_has_the_predicted_size(tmp_path: Path, form: Any, dtype: torch.dtype) -> None:
    weight, path = pruned(0.9, dtype), tmp_path / "model.safetensors"
    save_sparse({"weight": weight}, path, form)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == stored_bytes(weight, form)


def test_the_documented_sizes_are_those_of_files() -> None:
    assert storage.__doc__ is not None
    columns = [0.5, 0.75, 0.9, 0.95, 0.99]
    for form, dtype in (("bitmask", "float32"), ("csr", "float32"), ("bitmask", "bfloat16"), ("csr", "bfloat16")):
        (line,) = re.findall(rf"\| {form}, {dtype} \| (.*) \|", storage.__doc__)
        for cell, sparsity in zip(line.split(" | "), columns, strict=True):
            weight = pruned(sparsity, getattr(torch, dtype), (1, 40_000))
            share = (stored_bytes(weight, form) - 8 * (form == "csr")) / stored_bytes(weight, "dense")
            assert float(cell.rstrip(" %")) == pytest.approx(100 * share, abs=0.06), (form, dtype, sparsity)


def test_csr_equals_that_of_scipy() -> None:
    weight = pruned(0.8)
    ours, theirs = storage._csr(weight), csr_matrix(weight.numpy())
    assert ours["columns"].tolist() == theirs.indices.tolist()
    assert ours["row_starts"].tolist() == theirs.indptr.tolist()
    assert ours["values"].tolist() == theirs.data.tolist()


def test_wide_rows_and_two_of_four_are_stored() -> None:
    wide = torch.zeros(2, 70_000)
    wide[1, 69_999] = 1.0
    assert torch.equal(storage._csr(wide)["columns"], torch.tensor([69_999], dtype=torch.int32))
    weight = torch.randn(64, 64)
    apply_mask(weight, nm_mask(weight, 2, 4))
    assert stored_bytes(weight, "bitmask") == stored_bytes(weight, "dense") // 2 + 64 * 64 // 8


def test_other_files_and_unknown_forms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=r"form: 'coo' is unknown; use one of dense, bitmask, csr"):
        save_sparse({}, tmp_path / "a.safetensors", "coo")  # type: ignore[arg-type]
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(QatkitError, match="the file was not written by save_sparse; use"):
        load_sparse(tmp_path / "plain.safetensors")


def test_8_bit_floats_stay_dense_and_a_clash_of_part_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    eight = pruned(0.9, torch.float32, (8, 8)).to(torch.float8_e4m3fn)
    assert save_sparse({"weight": eight}, path) == {"weight": "dense"}
    assert torch.equal(load_sparse(path)["weight"].float(), eight.float())
    with pytest.raises(QatkitError, match=r"tensor 'w\.values' has the same name as a stored part of 'w'"):
        save_sparse({"w": pruned(0.9, torch.float32, (8, 8)), "w.values": torch.ones(3)}, path)
