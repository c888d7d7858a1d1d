"""Train Llamas in GGUF's K-quants, and compare them with llama.cpp's own quantization with an importance matrix.

Run: python benchmarks/kquants.py --llama-cpp FOLDER [--quick] [--only TYPE]
FOLDER is one in which ``npm install -E node-llama-cpp@3.21.1`` was run. Every measured pair of a type and a seed is
stored in ``results/kquants_jobs.json``, and a stopped benchmark resumes there; delete the file to start again.

A Llama is trained on the source code of Python's standard library. Then the linear layers of its blocks are quantized
to the same bytes: by llama.cpp, with the mean squares of the inputs as importance (which its TQ2_0 ignores); by
llama.cpp, with the norms trained after it; and by qatkit, which trains weights and norms with the scales of
``init: importance`` frozen. All training minimizes the KL divergence from the dense model. The KL divergence is
measured on held-out files, in PyTorch. The file of the trained model is also run in llama.cpp, which quantizes
activations to 8 bits.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from harness import RESULTS, Claim, finish, machine
from journal import Journal, digest
from kquants_rival import Rival
from torch import Tensor, nn
from torch.nn import functional as F

import qatkit
from qatkit import prepare_qat, scheme
from qatkit.data import stdlib_text
from qatkit.export.gguf.format import export_gguf
from qatkit.models import llama
from qatkit.quantization.ptq.runner import apply_ptq

JOURNAL = RESULTS / "kquants_jobs.json"
RIVAL = "node-llama-cpp 3.21.1"
TYPES = {"Q4_K": 1e-4, "Q3_K": 1e-4, "Q2_K": 3e-4, "TQ2_0": 3e-4}
"""Learning rates of the weights by type."""
LIMITS = {"Q4_K": 0.35, "Q3_K": 0.35, "Q2_K": 0.35, "TQ2_0": 0.1}
"""The largest KL divergence relative to llama.cpp's."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    layers: int
    vocabulary: int
    dense_steps: int
    steps: int
    calibration: int
    test_rows: int


FULL = Size(layers=4, vocabulary=2048, dense_steps=1500, steps=300, calibration=16, test_rows=128)
QUICK = Size(layers=1, vocabulary=512, dense_steps=20, steps=4, calibration=1, test_rows=4)
CONTEXT, BATCH = 128, 4


def data_of(size: Size, seed: int) -> Any:
    """The text; in the quick mode, of one package."""
    text: dict[str, Any] = {"include": ["email/*"], "val_fraction": 0.2, "test_fraction": 0.2} if size is QUICK else {}
    batches = size.dense_steps + size.steps
    data = stdlib_text(CONTEXT, size.vocabulary, batch_size=BATCH, seed=seed, epoch_batches=batches, **text)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


def trained(model: Any, loss: Callable[[Tensor], Tensor], batches: list[Tensor], rates: dict[str, float]) -> None:
    """Train the parameters of two dimensions and the norms with cosine schedules of the given rates."""
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and (p.dim() > 1) is wide], "lr": rate}
        for wide, rate in ((True, rates["weights"]), (False, rates["norms"]))
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / len(batches))),
    )
    for tokens in batches:
        loss(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def batches_of(data: Any, size: Size) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of training tokens ``[BATCH, CONTEXT]`` for the dense model, and others for what follows."""
    found = [batch["input_ids"] for batch in data.train_dataloader()]
    return found[: size.dense_steps], found[size.dense_steps :]


def divergence(teacher: Any, model: Any) -> Callable[[Tensor], Tensor]:
    """The KL divergence of a model from the dense one, by token."""

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(tokens).logits.log_softmax(-1).flatten(0, 1)
        return F.kl_div(
            model(tokens).logits.log_softmax(-1).flatten(0, 1), target, log_target=True, reduction="batchmean"
        )

    return loss


@torch.no_grad()
def tested(teacher: Any, model: Any, rows: Tensor) -> tuple[float, float]:
    """The KL divergence from the dense model and the loss on held-out rows."""
    loss = divergence(teacher, model)
    pairs = [(float(loss(part)), float(model(input_ids=part, labels=part).loss)) for part in rows.split(8)]
    return mean(kl for kl, _ in pairs), mean(own for _, own in pairs)


def block_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks."""
    return {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and name != "lm_head"}


@torch.no_grad()
def mean_squares(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The mean square of every input of the linear layers, which is llama.cpp's importance matrix."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0].flatten(0, -2).square().mean(0)

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in block_layers(model).items()]
    for tokens in batches:
        model(tokens)
    for handle in handles:
        handle.remove()
    return {name: total / len(batches) for name, total in sums.items()}


def dense_model(size: Size, seed: int, data: Any) -> nn.Module:
    """A Llama that was trained on the text."""
    torch.manual_seed(seed)
    model = llama(size.vocabulary, 256, size.layers, 4, 2, 768, CONTEXT, tie_embeddings=False)
    rates = {"weights": 1e-3, "norms": 1e-3}
    trained(model, lambda x: model(input_ids=x, labels=x).loss, batches_of(data, size)[0], rates)
    return model.eval()


def trained_on(dense: Any, data: Any, size: Size, rate: float) -> float:
    """The held-out loss of the dense model after as many further steps."""
    further = copy.deepcopy(dense)
    rates = {"weights": rate, "norms": 3e-4}
    trained(further, lambda x: further(input_ids=x, labels=x).loss, batches_of(data, size)[1], rates)
    return tested(dense, further, held_out(data, size))[1]


def held_out(data: Any, size: Size) -> Tensor:
    """Held-out tokens ``[test_rows, CONTEXT]``."""
    return torch.cat([batch["input_ids"] for batch in data.test_dataloader()])[: size.test_rows]


def measured(kind: str, seed: int, size: Size, rival: Rival, data: Any, dense: Any, further: float) -> dict[str, Any]:
    """The figures of one type and seed."""
    rows = held_out(data, size)
    before, batches = batches_of(data, size)
    calibration = before[: size.calibration]
    importance = mean_squares(dense, calibration)
    theirs = copy.deepcopy(dense)
    for name, layer in block_layers(theirs).items():
        layer.weight.data = rival.quantized(layer.weight, kind, importance[name])
    norms = copy.deepcopy(theirs)
    for parameter in norms.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    trained(norms, divergence(dense, norms), batches, {"weights": 0.0, "norms": 3e-4})
    ours = copy.deepcopy(dense)
    prepare_qat(ours, scheme(kind, "mse").weight, exclude=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_ptq(ours, "importance", calibration)
    start = tested(dense, ours, rows)
    for name in ("model.embed_tokens", "lm_head"):
        ours.get_submodule(name).requires_grad_(False)
    trained(ours, divergence(dense, ours), batches, {"weights": TYPES[kind], "norms": 3e-4})
    ours.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export_gguf(ours, path, data.tokenizer)
        (in_runtime,) = rival.losses([path], rows)
    kl, loss = tested(dense, ours, rows)
    return {
        "type": kind,
        "seed": seed,
        "dense loss": tested(dense, dense, rows)[1],
        "dense trained on, loss": further,
        "llama.cpp KL": tested(dense, theirs, rows)[0],
        "norms trained, KL": tested(dense, norms, rows)[0],
        "search KL": start[0],
        "trained KL": kl,
        "trained loss": loss,
        "loss in llama.cpp": in_runtime,
    }


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """The targets of the project, by type."""
    claims = []
    for kind in dict.fromkeys(row["type"] for row in rows):
        own = [row for row in rows if row["type"] == kind]
        ratio = max(row["trained KL"] / row["llama.cpp KL"] for row in own)
        text = f"{kind}: KL divergence relative to llama.cpp's quantization, worst seed"
        claims.append(Claim(text, f"<= {LIMITS[kind]}", f"{ratio:.3f}", ratio <= LIMITS[kind]))
        gap = max(abs(row["loss in llama.cpp"] / row["trained loss"] - 1) for row in own)
        text = f"{kind}: loss in llama.cpp relative to training's, worst seed"
        claims.append(Claim(text, "within 0.5%", f"{gap:.2%}", gap <= 0.005))
    return claims


def run(journal: Journal, seeds: Sequence[int], size: Size, rival: Rival, only: str | None) -> None:
    """Measure the types without a stored result, seed by seed."""
    for seed in seeds:
        missing = [kind for kind in TYPES if only in (None, kind) and f"{kind} {seed}" not in journal.results]
        if not missing:
            continue
        data = data_of(size, seed)
        dense = dense_model(size, seed, data)
        further: dict[float, float] = {}
        for kind in missing:
            rate = TYPES[kind]
            if rate not in further:
                further[rate] = trained_on(dense, data, size, rate)
            journal.store(f"{kind} {seed}", measured(kind, seed, size, rival, data, dense, further[rate]))


def main(folder: Path, only: str | None, quick: bool) -> None:
    torch.set_num_threads(1)
    size, rival = QUICK if quick else FULL, Rival(folder)
    scripts = [Path(__file__), Path(__file__).with_name("kquants_rival.py"), Path(__file__).with_name("kquants.mjs")]
    package = Path(qatkit.__file__).parent
    code = sorted([*package.glob("quantization/**/*.py"), *package.glob("export/gguf/*.py"), package / "schemes.py"])
    source = {
        "machine": machine(),
        "rival": RIVAL,
        "torch": torch.__version__,
        "scripts": digest(*scripts),
        "qatkit": digest(*code),
    }
    with tempfile.TemporaryDirectory() as temporary:
        journal = Journal(Path(temporary) / JOURNAL.name if quick else JOURNAL, source)
        run(journal, SEEDS[:1] if quick else SEEDS, size, rival, only)
    rows = list(journal.results.values())
    claims = claims_of(rows)
    if quick or len(rows) < len(TYPES) * len(SEEDS):
        for row in rows:
            print(" | ".join(f"{value:.5g}" if isinstance(value, float) else str(value) for value in row.values()))
        for claim in claims:
            print(f"{'holds ' if claim.holds else 'FAILS '} {claim.text}: {claim.measured} (target {claim.target})")
        return
    finish("kquants", rows, claims, SEEDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of node-llama-cpp")
    parser.add_argument("--only", choices=TYPES, help="measure one type")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps, nothing written")
    arguments = parser.parse_args()
    main(arguments.llama_cpp.resolve(), arguments.only, arguments.quick)
