"""Parts of `qat_recovery.py`: a small Llama on the text of the standard library, and every compression method."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import QuantSpec, Scheme, calibrate, prepare_qat, scheme
from qatkit.data import text_windows
from qatkit.distillation.losses import kd_loss
from qatkit.models import llama
from qatkit.pipeline.learning_rate import lr_factor, parameter_groups
from qatkit.quantization.mixed.allocation import allocate, totals
from qatkit.quantization.mixed.overrides import allocated_layers
from qatkit.quantization.mixed.sensitivity import measure_sensitivity
from qatkit.quantization.ptq.runner import apply_ptq

CONTEXT, VOCABULARY = 128, 2048
BASE = RESULTS / "qat_recovery_base.safetensors"
"""The dense model of the full benchmarks on this text, which took minutes to train."""
TOKEN8 = QuantSpec(8, symmetric=False, strategy="token")
TOKEN4 = QuantSpec(4, symmetric=False, strategy="token")
FP8_TOKEN = QuantSpec(8, type="float", strategy="token")


@dataclass(frozen=True)
class Size:
    """Sizes of the full benchmark and of the quick mode."""

    base_steps: int = 1200
    steps: int = 100
    batch: int = 16
    held_out: int = 600
    """Windows of the held-out loss."""
    model: tuple[tuple[str, int], ...] = ()
    """Changes to the model's size."""


FULL = Size()
QUICK = Size(20, 2, 4, 8, (("hidden", 64), ("layers", 2), ("heads", 4), ("kv_heads", 2), ("intermediate", 128)))


@dataclass(frozen=True)
class Format:
    """A format of the decoder's linear layers; the embedding, tied to the output layer, stays float32."""

    scheme: Scheme
    layers: dict[str, Scheme] = field(default_factory=dict)
    """Other schemes, by glob."""
    kv_cache: QuantSpec | None = None
    torchao: tuple[str, Any] | None = None
    """What torchao calls the weight: its dtype and granularity."""


def _int(bits: int, group: int | None = 32, activation: QuantSpec | None = None) -> Scheme:
    return Scheme(QuantSpec(bits, strategy="group" if group else "channel", group_size=group), activation)


FORMATS: dict[str, Format] = {
    "W4 channel": Format(_int(4, None), torchao=("int4", "per_channel")),
    "W3 g32": Format(_int(3), torchao=("int3", 32)),
    "W2 g32": Format(_int(2), torchao=("int2", 32)),
    "ternary": Format(Scheme(QuantSpec(2, type="ternary", observer="absmean", strategy="group", group_size=32))),
    "W4A8": Format(_int(4, None, TOKEN8), torchao=("int4", "per_channel")),
    "W4A4": Format(_int(4, None, TOKEN4), torchao=("int4", "per_channel")),
    "W4A4 g32": Format(_int(4, activation=QuantSpec(4, symmetric=False, strategy="group", group_size=32))),
    # the product of gate and up has the largest outliers of all inputs
    "W4A4, down_proj A8": Format(_int(4, None, TOKEN4), {"*.down_proj": _int(4, None, TOKEN8)}),
    "FP8 dynamic": Format(Scheme(QuantSpec(8, type="float"), FP8_TOKEN)),
    "NVFP4": Format(scheme("NVFP4")),
    "MXFP4": Format(scheme("MXFP4")),
    "Q4_0": Format(scheme("Q4_0")),
    "KV cache int8": Format(Scheme(), kv_cache=QuantSpec(8, strategy="token")),
}


@dataclass(frozen=True)
class Job:
    """One result: format, method, and for trained methods the learning rate and seed (of the data order)."""

    format: str
    method: str
    """dense, dense trained further, RTN, GPTQ, AWQ, SmoothQuant, torchao QAT, QAT; with "+ KD" from the dense model."""
    lr: float = 0.0
    seed: int = 0
    init: str | None = None
    """Where QAT starts; None is the least squared error."""

    @property
    def trains(self) -> bool:
        """Whether the method trains."""
        return self.lr > 0


def base_model(size: Size, path: Path) -> nn.Module:
    """The dense model, trained and written to `path` if it does not exist.

    It is stored in float16, which changes the loss by less than 1e-4, so that every machine starts from the same
    small file.
    """
    torch.manual_seed(0)
    model = llama(vocab_size=VOCABULARY, context=CONTEXT, **dict(size.model))
    if not path.exists():
        train(model, size.base_steps, size.batch, lr=3e-3, seed=1000)
        save_model(model.half(), str(path))
        model.float()
    load_model(model, path)
    return model.eval()


def train(
    model: nn.Module, steps: int, batch: int, lr: float, seed: int, kd: float = 0.0, taught: Tensor | None = None
) -> None:
    """Train with AdamW, a short warmup and a cosine schedule, on windows in the order of the seed.

    Args:
        model: The model.
        steps: Optimizer steps.
        batch: Windows per step.
        lr: The maximum learning rate.
        seed: Sets the order of the windows.
        kd: Weight of the teacher's term at temperature 1; the labels get the rest.
        taught: Teacher logits in this order, ``[steps, batch * positions, vocabulary]``.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, 0.01))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step / steps, "cosine", 0.05))
    model.train()
    for step, tokens in enumerate(batches_of(seed, steps, batch)):
        # the last token of a window has no next one: it is not worth a forward, nor a copy of all logits but its own
        logits = model(tokens[:, :-1]).logits.flatten(0, 1)
        loss = (1 - kd) * F.cross_entropy(logits, tokens[:, 1:].flatten())
        if kd:
            assert taught is not None
            loss = loss + kd * kd_loss(logits, taught[step].float(), 1.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def batches_of(seed: int, steps: int, batch: int) -> Iterator[Tensor]:
    """The training windows of every step, ``[batch, context]``."""
    windows = _windows()[0]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        yield windows[order[torch.arange(step * batch, (step + 1) * batch) % len(windows)]]


def teach(dense: nn.Module, size: Size, seed: int, folder: Path) -> Tensor:
    """Logits of the dense model for every step of a seed, read from disk after the first time.

    Stored in float16: the error of 5e-4 per logit is far below the uncertainty of the model.
    """
    path = folder / f"taught_{seed}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}")
        shape = (size.steps, size.batch * (CONTEXT - 1), VOCABULARY)
        file = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        with torch.no_grad():
            for step, tokens in enumerate(batches_of(seed, size.steps, size.batch)):
                file[step] = dense(tokens[:, :-1]).logits.flatten(0, 1).half().numpy()
        file.flush()
        temporary.rename(path)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


@torch.no_grad()
def evaluate(model: nn.Module, size: Size) -> float:
    """Mean next-token loss on the held-out files."""
    windows = _windows()[1][: size.held_out]
    losses = []
    for tokens in windows.split(16):
        logits = model(tokens[:, :-1]).logits.flatten(0, 1)
        losses.append(F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"))
    return float(torch.stack(losses).sum()) / (windows.shape[0] * (CONTEXT - 1))


def calibration_batches(size: Size, count: int = 8) -> Iterator[Tensor]:
    """Training windows for ranges and Hessians, the same for every method."""
    return iter(_windows()[0][: count * size.batch].split(size.batch))


@cache
def _windows() -> tuple[Tensor, Tensor]:
    train_windows, held_out, _ = text_windows(CONTEXT, VOCABULARY)
    return train_windows, held_out


def do(job: Job, size: Size, path: Path, layers: dict[str, Scheme] | None = None) -> float:
    """Run a job and return the mean loss per token on held-out files.

    Args:
        job: The job.
        size: Full or quick.
        path: Path of the dense model.
        layers: For the format "mixed", the scheme of each glob.
    """
    torch.set_num_threads(1)  # one job per core
    dense = base_model(size, path)
    model = copy.deepcopy(dense)
    kd = 0.9 if job.method.endswith("+ KD") else 0.0
    method = job.method.removesuffix(" + KD")
    if method == "torchao QAT":
        _prepare_torchao(model, FORMATS[job.format])
    elif not method.startswith("dense"):
        prepare(model, job, method, size, layers)
    if job.trains:
        # gigabytes, which are made again in minutes: not beside the results
        folder = Path("build/qat_recovery") if path == BASE else path.parent
        taught = teach(dense, size, job.seed, folder) if kd else None
        train(model, size.steps, size.batch, job.lr, job.seed, kd, taught)
    return evaluate(model, size)


def trained(spec: QuantSpec | None) -> QuantSpec | None:
    """The spec for QAT: with learned scales if the format stores a scale that can be learned."""
    return spec if spec is None or spec.strategy == "token" or spec.is_float else replace(spec, observer="lsq")


def prepare(model: nn.Module, job: Job, method: str, size: Size, layers: dict[str, Scheme] | None) -> None:
    """Replace the layers and set the scales according to the method."""
    form = FORMATS.get(job.format, Format(Scheme()))

    def weight_of(scheme: Scheme) -> QuantSpec | None:
        if method in ("GPTQ", "AWQ") and scheme.weight is not None:
            return replace(scheme.weight, observer="mse")
        return trained(scheme.weight) if method == "QAT" else scheme.weight

    overrides = {glob: Scheme(weight_of(scheme), scheme.activation) for glob, scheme in (layers or form.layers).items()}
    prepare_qat(
        model, weight_of(form.scheme), form.scheme.activation, exclude=["lm_head"] if form.scheme.weight else [],
        layers=overrides, kv_cache=form.kv_cache,
    )  # fmt: skip
    named: dict[str, str] = {"GPTQ": "gptq", "AWQ": "awq", "SmoothQuant": "smoothquant"}
    start = job.init if method == "QAT" else named.get(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if start is not None:
            apply_ptq(model, start, list(calibration_batches(size)))
    calibrate(model, calibration_batches(size))


def _prepare_torchao(model: nn.Module, form: Format) -> None:
    """torchao's fake quantization of the same layers: symmetric weights, asymmetric per-token activations."""
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    assert form.torchao is not None
    kind, slices = form.torchao
    granularity = PerGroup(slices) if isinstance(slices, int) else PerAxis(0)
    weight = IntxFakeQuantizeConfig(getattr(torch, kind), granularity=granularity, is_symmetric=True)
    activation = None
    if form.scheme.activation is not None:
        dtype = {8: torch.int8, 4: torch.int4}[form.scheme.activation.num_bits]
        activation = IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=False)
    config = QATConfig(activation_config=activation, weight_config=weight, step="prepare")
    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)


def mixed_layers(size: Size, path: Path) -> tuple[dict[str, Scheme], str]:
    """The best mix of 2, 3, 4 and 8 bits within the bytes of uniform 3 bits, and its size in words."""
    torch.set_num_threads(1)
    windows = _windows()[0][: 4 * size.batch]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        logits = model(windows).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, windows[:, 1:].flatten()).item()

    candidates = {f"W{bits} g32": _int(bits) for bits in (2, 3, 4, 8)}
    found = measure_sensitivity(base_model(size, path), candidates, loss, exclude=["lm_head"])
    uniform = sum(group.options["W3 g32"].bytes for group in found.groups)
    allocation = allocate(found, budget_bytes=uniform)
    bits = ", ".join(f"{list(allocation.values()).count(name)} groups at {name}" for name in candidates)
    return allocated_layers(found, allocation), f"{totals(found, allocation)[0]} of {uniform} bytes: {bits}"
