"""Write tests/distillation/references.json: losses of TRL and Liger Kernel for the tensors of the tests.

Run: python benchmarks/kd_references.py FOLDER
FOLDER holds the two packages; `pip install --no-deps --target FOLDER trl liger-kernel triton` does not change the
versions of torch and transformers. The tests read the numbers, so they need neither package.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
OUT = ROOT / "tests" / "distillation" / "references.json"


def main(folder: str) -> None:
    sys.path[:0] = [folder, str(ROOT)]
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.experimental.gkd import GKDTrainer

    from tests.distillation.tensors import LABELS, hidden, logits, weight

    student, teacher = logits(1), logits(2)
    values: dict[str, float] = {}
    for temperature in (1.0, 2.0):
        for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
            value = GKDTrainer.generalized_jsd_loss(student, teacher, LABELS, beta, temperature)
            values[f"trl beta={beta} T={temperature}"] = float(value)
            kernel = LigerFusedLinearJSDLoss(0.3, 0.7 * temperature**2, beta, temperature=temperature, compiled=False)
            parts: list[Tensor] = [hidden(1).requires_grad_(), weight(1).requires_grad_()]
            loss = kernel(*parts, hidden(2), weight(2), LABELS.flatten())
            loss.backward()
            key = f"liger beta={beta} T={temperature}"
            values[key] = loss.item()
            for name, part in zip(("hidden", "weight"), parts, strict=True):
                assert part.grad is not None
                values[f"{key} |{name}.grad|"] = float(part.grad.double().norm())
    versions = {part.name: part.version for part in distributions(path=[folder])} | {"torch": torch.__version__}
    OUT.write_text(json.dumps({"versions": versions, "values": values}, indent=1) + "\n")
    print(f"written: {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    main(parser.parse_args().folder)
