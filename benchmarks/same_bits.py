"""Check that the code still produces the same bits: six small runs of recipes against recorded digests.

Run: python benchmarks/same_bits.py [--record]
--record writes benchmarks/results/same_bits.json; without it, the digests must equal the recorded ones.

Each run has fixed seeds and one thread. The digests are the SHA-256 of every tensor (weights, scales, zero points,
codes) of every stage and every export, and of every ONNX file. Bits depend on torch's kernels and the processor:
compare on the machine and with the versions that the file names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open

RECORDED = Path(__file__).parent / "results" / "same_bits.json"
TEXT = [
    "model.args.vocab_size=300", "model.args.hidden=32", "model.args.layers=2", "model.args.heads=2",
    "model.args.kv_heads=1", "model.args.intermediate=64", "model.args.context=32", "data.args.vocab_size=300",
    "data.args.context=32", "data.args.include=[email/*]", "data.args.val_fraction=0.2", "data.args.test_fraction=0.1",
]  # fmt: skip
GROUPS = "quantize.weight.group_size=16"
RUNS = {
    "vision/digits_int4": ["stages.dense.max_steps=60", "stages.qat.max_steps=40"],
    "vision/digits_magnitude90": ["stages.dense.max_steps=60", "stages.ramp.max_steps=60"],
    "vision/digits_lottery": [
        "stages.ticket.max_steps=40", "stages.ticket.lottery.rounds=2", "stages.ticket.lottery.rewind=5",
    ],
    "llm/int4_qat": [
        *TEXT, "stages.dense.max_steps=30", "stages.qat.max_steps=20", f"stages.ptq.{GROUPS}", f"stages.qat.{GROUPS}",
        "evaluate=null",
    ],
    "llm/sparse24_kd_int4": [
        *TEXT, "stages.dense.max_steps=30", "stages.sparse24.max_steps=20", "stages.int4.max_steps=20",
        f"stages.one_shot.{GROUPS}", f"stages.int4.{GROUPS}", "evaluate=null",
    ],
    "llm/qlora_merge_int4": [
        *TEXT, "stages.dense.max_steps=30", "stages.qlora.max_steps=20", "stages.int4.max_steps=20",
        f"stages.ptq.{GROUPS}", f"stages.int4.{GROUPS}",
    ],
}  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every tensor and the metadata of every safetensors file, and of every ONNX file, in a run folder."""
    found: dict[str, str] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                # by content: safetensors writes metadata in an order that differs from process to process
                found[name] = hashlib.sha256(json.dumps(file.metadata(), sort_keys=True).encode()).hexdigest()
                for key in sorted(file.keys()):
                    tensor = file.get_tensor(key).contiguous()
                    content = tensor.flatten().view(torch.uint8) if tensor.numel() else tensor
                    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
                    found[f"{name}:{key}"] = hashlib.sha256(head + content.numpy().tobytes()).hexdigest()
        elif path.suffix == ".onnx":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(recipe: str, overrides: list[str]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qatkit.cli", "run", recipe, *overrides, "trainer.accelerator=cpu"]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = os.environ | threads | {"PYTHONHASHSEED": "0", "XDG_CACHE_HOME": folder}
        done = subprocess.run(
            [*command, "--out", f"{folder}/run", "--quiet"], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{recipe}: exit {done.returncode}\n{done.stderr[-2000:]}")
        return digests(Path(folder) / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    record = parser.parse_args().record
    machine = {
        "processor": platform.machine(),
        **{name: version(name) for name in ("torch", "lightning", "transformers", "bitsandbytes", "onnx")},
    }
    before = {} if record else json.loads(RECORDED.read_text())
    if not record and before["machine"] != machine:
        print(f"recorded on {before['machine']}, running on {machine}: bits may differ for that alone")
    found = {recipe: run(recipe, overrides) for recipe, overrides in RUNS.items()}
    if record:
        RECORDED.write_text(json.dumps({"machine": machine, "runs": found}, indent=1) + "\n")
    wrong = 0
    for recipe, now in found.items():
        then = now if record else before["runs"][recipe]
        differ = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        wrong += bool(differ)
        print(f"{recipe}: {len(now)} digests, {len(differ)} differ{': ' + ', '.join(differ[:4]) if differ else ''}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
