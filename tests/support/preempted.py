"""Factories of a recipe whose run receives SIGTERM at a chosen place, and helpers to start such runs.

``STOP_AT=train:13`` sends it in the 13th training forward of the process, ``validation:2`` in a forward of a
validation, ``data:1`` where data are built, ``test:1`` where the test split is read. ``STOP_RANK`` chooses the process.
``hold`` sends it to the second process from the first one, which then never joins it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support import warm

RECIPE = """
name: preempted
model: {factory: "tests.support.preempted:model"}
data: {factory: "tests.support.preempted:data"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 25, batch_size: 8, lr: 1.0e-2}
export: {format: dense}
"""
_reached: Counter[str] = Counter()


def reached(place: str) -> None:
    """Send SIGTERM to this process if this is the place."""
    _reached[place] += 1
    if os.environ.get("STOP_AT") == f"{place}:{_reached[place]}" and os.environ.get("STOP_RANK", "0") == rank():
        os.kill(os.getpid(), signal.SIGTERM)


def rank() -> str:
    return os.environ.get("LOCAL_RANK", "0")


class Model(nn.Module):
    """Random numbers of dropout decide the result."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        reached("train" if self.training else "validation")
        hidden = self.dropout(self.hidden(images.flatten(1)).relu())
        return self.classifier(hidden)  # type: ignore[no-any-return]


def model() -> Model:
    return Model()


class Noisy(torch.utils.data.Dataset[Any]):
    """Samples with noise from torch's generator of the process, as random transforms of images use it."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> Any:
        image, label = self.samples[index]
        return image + 0.1 * torch.randn(image.shape), label


def data(batch_size: int = 8, seed: int = 0, resumable: bool = True) -> Any:
    """Ten batches of eight per epoch; with a torch DataLoader that cannot continue within an epoch if not resumable."""
    from qatkit.data import digits
    from qatkit.data.datamodule import SplitDataModule

    class Data(SplitDataModule):
        def test_dataloader(self) -> Any:
            reached("test")
            if os.environ.get("STOP_AT") == "hold" and rank() == "0":
                os.kill(int(Path("pid1").read_text()), signal.SIGTERM)  # which waits for this one in a barrier
                while True:
                    time.sleep(0.01)
            return super().test_dataloader()

        def train_dataloader(self) -> Any:
            if resumable:
                return super().train_dataloader()
            return torch.utils.data.DataLoader(self.train, self.batch_size)

    reached("data")
    Path(f"pid{rank()}").write_text(str(os.getpid()))
    plain = digits(batch_size=batch_size, seed=seed)
    return Data(Noisy(plain.train), torch.utils.data.Subset(plain.val, range(40)), plain.test, batch_size, seed)


def run(folder: Path, *overrides: str, out: str = "run", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the recipe in a process of its own."""
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [warm.qatkit(), "run", "recipe.yaml", "--out", out, "--allow", "tests", "--quiet", *overrides]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root} | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def weights(folder: Path, out: str = "run") -> dict[str, Tensor]:
    """The tensors of all stages by file and name."""
    paths = sorted((folder / out / "stages").rglob("*.safetensors"))
    return {
        f"{path.relative_to(folder / out)} {key}": value for path in paths for key, value in load_file(path).items()
    }


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
