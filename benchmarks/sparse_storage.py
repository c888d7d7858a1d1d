"""Measure the size of pruned weights on disk without their zeros, in the export format `sparse`.

Run: python benchmarks/sparse_storage.py
Takes seconds. A linear layer of 1024 x 4096 with random weights is pruned to each sparsity, written in each form, and
read back; the result must be equal. Sizes are those of the whole file, including its header, relative to the file of
the dense layer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import Claim, finish
from safetensors.torch import save_file
from torch import nn

from qatkit.export.sparse import export_sparse, read_weights
from qatkit.pruning.masks import apply_mask, magnitude_mask
from qatkit.pruning.storage import Format, save_sparse

FORMS: tuple[Format, ...] = ("bitmask", "csr")


def main() -> None:
    rows: list[dict[str, Any]] = []
    equal, files = 0, 0
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        for dtype in (torch.float32, torch.bfloat16):
            for sparsity in (0.5, 0.75, 0.9, 0.95, 0.99):
                torch.manual_seed(0)
                layer = nn.Linear(4096, 1024, bias=False, dtype=dtype)
                with torch.no_grad():
                    apply_mask(layer.weight, magnitude_mask(layer.weight, sparsity))
                state = {"weight": layer.weight.detach()}
                save_file(state, path)
                dense = path.stat().st_size
                row: dict[str, Any] = {"values": str(dtype).removeprefix("torch."), "sparsity": f"{sparsity:.0%}"}
                for form in FORMS:
                    save_sparse(state, path, form)
                    row[form] = f"{path.stat().st_size / dense:.1%}"
                    equal, files = equal + torch.equal(read_weights(path)["weight"], state["weight"]), files + 1
                export_sparse(layer, path)
                row["smallest (format sparse)"] = f"{path.stat().st_size / dense:.1%}"
                equal, files = equal + torch.equal(read_weights(path)["weight"], state["weight"]), files + 1
                rows.append(row)
    claim = Claim("sparse files that load without loss", "all", f"{equal} of {files} files", equal == files)
    finish("sparse_storage", rows, [claim])


if __name__ == "__main__":
    main()
