"""Parts of `faults.py`: tiny recipes, their runs in processes of their own, and what a run folder holds.

Processes are forks of a server that has imported everything (`tests/support/warm.py`), which spares seconds each.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from same_bits import digests

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # a process with threads cannot be forked
from tests.support import warm  # noqa: E402  (found from the root only)

PROCESS = Path(__file__).with_name("fault_process.py")
HANGS = 60.0
"""Seconds after which a process counts as one that hangs, on a machine that is busy with other things."""

_DIGITS = """
seed: 7
model: {factory: "qatkit.models:cnn", args: {channels: [4, 8], num_classes: 10}}
data: {factory: "qatkit.data:digits", args: {val_fraction: 0.1, test_fraction: 0.2}}
trainer: {accelerator: cpu}
"""
RECIPES = {
    "int4": f"""
name: int4{_DIGITS}
stages:
  dense: {{max_steps: 30, batch_size: 64, lr: 3e-3}}
  qat:
    max_steps: 30
    batch_size: 64
    lr: 1e-3
    distill: {{temperature: 4.0, alpha: 0.7}}
    quantize:
      weight: {{num_bits: 4, strategy: channel, observer: lsq}}
      activation: {{num_bits: 8, symmetric: false, strategy: tensor}}
export: {{format: dense}}
""",
    "magnitude": f"""
name: magnitude{_DIGITS}
stages:
  dense: {{max_steps: 30, batch_size: 64, lr: 3e-3}}
  ramp: {{max_steps: 50, batch_size: 64, lr: 3e-3, prune: {{ramp: {{final: 0.9, end: 0.5}}, scope: model}}}}
export: {{format: sparse}}
""",
    "early_stopping": f"""
name: early_stopping{_DIGITS}
stages:
  dense:
    max_steps: 100
    batch_size: 64
    lr: 3e-2
    schedule: constant
    early_stopping: {{patience: 1, min_delta: 0.2}}
  adapted: {{max_steps: 30, batch_size: 64, lr: 1e-3, lora: {{rank: 2}}}}
export: {{format: onnx}}
""",
    "text": """
name: text
seed: 7
model:
  factory: "qatkit.models:llama"
  args: {vocab_size: 300, hidden: 32, layers: 1, heads: 2, kv_heads: 1, intermediate: 64, context: 16}
data:
  factory: "qatkit.data:stdlib_text"
  args: {vocab_size: 300, context: 16, include: ["email/*"], val_fraction: 0.2, test_fraction: 0.1, epoch_batches: 10}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 20, batch_size: 32, lr: 2e-3}
  sparse24:
    max_steps: 20
    batch_size: 32
    lr: 1e-3
    prune: {method: magnitude, nm: [2, 4], exclude: [lm_head]}
    distill: {temperature: 1.0, alpha: 0.5, teacher: dense, cache: {}}
  int4:
    max_steps: 20
    batch_size: 32
    lr: 5e-4
    distill: {temperature: 1.0, alpha: 0.5, teacher: dense}
    quantize:
      weight: {num_bits: 4, strategy: group, group_size: 16, observer: lsq}
      exclude: [lm_head]
export: {format: compressed_tensors}
""",
}
"""Every way in which a stage writes files: checkpoints, best weights, adapters, quantizers, teacher caches, and all
export formats."""
STRATEGIES = {
    "single": [],
    "ddp": ["trainer.devices=2", "trainer.strategy=ddp"],
    "fsdp2": ["trainer.devices=2", "trainer.strategy=fsdp2"],
}
_IGNORED = ("seconds", "written", "latency", "machine", "versions", "digest", "digests", "resumed_at")
"""Times, what depends on the machine, digests of whole files, and the step of a resume.

The same holds for the logs of the attempts, and for what `CompressionMonitor` observed in the last of them."""


@dataclass(frozen=True)
class Ended:
    """The end of a command."""

    code: int
    """The exit code, or minus the number of the signal that ended it."""
    said: str
    """Standard output and standard error."""
    seconds: float
    hung: bool = False
    """Whether one of its processes had to be killed."""


class Command:
    """A command of qatkit in a process of its own.

    Args:
        folder: A folder of the command's own, its working folder.
        arguments: The command line.
        fault: What `fault_process.py` does.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], fault: dict[str, Any] | None = None) -> None:
        self._alive = folder / "alive"
        self._alive.mkdir(parents=True, exist_ok=True)
        for left in self._alive.iterdir():
            left.unlink()
        self._said = folder / "said"
        what = json.dumps({"alive": str(self._alive)} | (fault or {}))
        environment = os.environ | {"FAULT": what, "XDG_CACHE_HOME": str(folder / "cache")}
        self._began = time.monotonic()
        with self._said.open("wb") as said:
            command = [warm.python(), str(PROCESS), *arguments]
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)

    @property
    def ids(self) -> list[int]:
        """The ids of its processes that have not ended, the first process first."""
        started = sorted(self._alive.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return [int(path.name) for path in started if _runs(int(path.name))]

    def end(self, within: float = HANGS) -> Ended:
        """Wait for the end of all processes; those that take longer are killed."""
        until, hung = time.monotonic() + within, False
        while self.process.poll() is None or self.ids:
            if time.monotonic() > until:
                hung = True
                for one in self.ids:
                    os.kill(one, signal.SIGKILL)
            time.sleep(0.01)
        seconds = time.monotonic() - self._began
        return Ended(self.process.returncode, self._said.read_text(errors="replace"), seconds, hung)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def do(folder: Path, *arguments: str, fault: dict[str, Any] | None = None, within: float = 600.0) -> Ended:
    """Run a command of qatkit to its end, however it ends."""
    return Command(folder, arguments, fault).end(within)


def run_arguments(folder: Path, recipe: str, strategy: str = "single", *overrides: str) -> list[str]:
    """Write a recipe, and return the command that runs it into ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{recipe}.yaml").write_text(RECIPES[recipe])
    return ["run", f"{recipe}.yaml", *STRATEGIES[strategy], *overrides, "--quiet", "--out", "run"]


def contents(run: Path) -> dict[str, str]:
    """What a run folder holds, by name: digests of tensors and files, and every number that is not a time."""
    found = digests(run)
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if not path.is_file() or path.suffix in (".safetensors", ".onnx"):
            continue
        if "logs" in path.parts or name in ("report.md", "report.html"):  # of one attempt; pages of report.json
            continue
        if path.suffix == ".json" and (plain := _plain(path)) is not None:
            found |= {f"{name}:{key}": value for key, value in plain.items()}
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _plain(path: Path) -> dict[str, str] | None:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return None
    return dict(_values(content, "")) if isinstance(content, dict) else {"": json.dumps(content)}


def _values(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        # digests of whole files: safetensors writes metadata in an order that differs from process to process
        parts = {name: "a digest" if key == ".files" else part for name, part in value.items()}
        return [pair for name, part in parts.items() if not _ignored(name) for pair in _values(part, f"{key}.{name}")]
    if isinstance(value, list):
        return [pair for index, part in enumerate(value) for pair in _values(part, f"{key}[{index}]")]
    return [(key, json.dumps(value))]


def _ignored(name: str) -> bool:
    return name in _IGNORED or name.endswith("_ms") or name.startswith(("logs/", "quant/", "distill/"))


def excerpt(ended: Ended) -> str:
    """How a command ended, in one line."""
    return f"exit {ended.code}: {' '.join(ended.said.split())[-400:]}"


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names whose values differ, or that only one of two folders has."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
