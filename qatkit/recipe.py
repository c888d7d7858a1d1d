"""A recipe: typed, frozen data that says what happens to a model, stage by stage.

These classes are the whole vocabulary of a recipe file. They import nothing heavy: reading a recipe takes a fraction of
a second, and a mistake in it is found before a model or a data set is touched. `qatkit.loading` makes them from YAML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from qatkit.schemes import Scheme, check_kv_cache, scheme
from qatkit.spec import Observer, QuantSpec

MISSING: Any = "???"  # OmegaConf's mark of a value that the file must give


@dataclass(frozen=True)
class FactoryConfig:
    """A function named as ``module:callable``, and the arguments it is called with."""

    factory: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerConfig:
    """What is handed to Lightning's Trainer, the same for every stage."""

    accelerator: str = "auto"
    devices: int | str = "auto"
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    """Where curves and tables go besides CSV files."""

    def __post_init__(self) -> None:
        if isinstance(self.devices, str) and self.devices != "auto":
            raise ValueError(f"devices: '{self.devices}' is no number of devices; write auto or a number such as 2")
        if isinstance(self.devices, int) and self.devices < 1:
            raise ValueError(f"devices: {self.devices} is out of range; write auto or a number of at least 1")


@dataclass(frozen=True)
class DistillConfig:
    """Learn from a teacher's outputs: ``alpha * T**2 * KL(teacher || student) + (1 - alpha) * loss``."""

    temperature: float = 1.0
    """Divides both sets of logits; above 0."""
    alpha: float = 0.5
    """Weight of the distillation term, 0 to 1; the labels' loss gets the rest."""
    loss: Literal["kl", "reverse_kl", "jsd", "mse"] = "kl"
    """KL(teacher || student), KL(student || teacher), Jensen-Shannon, or the squared error of the outputs."""
    beta: float = 0.5
    """With ``loss: jsd``, the teacher's share in the mixture, between 0 and 1."""
    ramp: float = 0.0
    """Share of the stage over which the distillation term rises to its weight, 0 to 1."""
    teacher: str | None = None
    """The stage whose result teaches; by default the input of the recipe's first compressing stage."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} is out of range; write a number above 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha} is out of range; write a number from 0 to 1")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta: {self.beta} is out of range; write a number between 0 and 1")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp: {self.ramp} is out of range; write a number from 0 to 1")


@dataclass(frozen=True)
class LayerConfig:
    """How the layers that a glob selects are quantized: by the name of a scheme, or by specs."""

    scheme: str | None = None
    """A name of compressed-tensors (W4A16, FP8_DYNAMIC, NVFP4, ...) or GGUF (Q4_0, Q8_0), instead of specs."""
    observer: Observer | None = None
    """With a scheme: where the weight's scale comes from, such as lsq; by default the range."""
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    """Quantization of each layer's input: ``strategy: tensor`` is calibrated and frozen, ``token`` and ``group`` are
    dynamic."""

    def __post_init__(self) -> None:
        _ = self.how

    @property
    def how(self) -> Scheme:
        """The specs, wherever they come from."""
        if self.scheme is None:
            if self.observer is not None:
                raise ValueError("observer: it goes with scheme; write it inside weight: {observer: ...}")
            return Scheme(self.weight, self.activation)
        if self.weight is not None or self.activation is not None:
            raise ValueError(
                f"scheme: '{self.scheme}' says what weight and activation are; write scheme, or these, not both"
            )
        return scheme(self.scheme, self.observer)


@dataclass(frozen=True)
class QuantizeConfig(LayerConfig):
    """Fake-quantize the layers that the patterns select."""

    layers: dict[str, LayerConfig] = field(default_factory=dict)
    """By glob over layer names, what is quantized otherwise; of several that match a layer the last decides."""
    kv_cache: QuantSpec | None = None
    """Quantization of the keys and values that attention caches: ``strategy: tensor`` or ``token``."""
    init: Literal["rtn", "mse", "gptq", "awq", "smoothquant"] | None = None
    """Where the weights and scales start from; by default scales that are kept start at the least squared error."""
    share_inputs: bool = False
    """Give layers that read the same input (q/k/v, gate/up) one static scale instead of one each."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over layer names; every one must match a layer."""
    exclude: list[str] = field(default_factory=list)
    calibration_batches: int = 16
    """Training batches whose activations set the static ranges, at least 1."""

    def __post_init__(self) -> None:
        how = self.how
        if how == Scheme() and not self.layers and self.kv_cache is None:
            raise ValueError("weight: neither weight nor activation is given; write weight: {num_bits: 8}")
        if self.kv_cache is not None:
            check_kv_cache(self.kv_cache)
        for where, found in {
            "weight": how,
            **{f"layers.{glob}": layer.how for glob, layer in self.layers.items()},
        }.items():
            observer = found.weight.observer if found.weight is not None else None
            if self.init in ("mse", "gptq", "awq") and observer in ("minmax", "absmean"):
                raise ValueError(
                    f"init: '{self.init}' sets scales, but those of {where} are computed from the weights on every "
                    "step; write observer: mse there (the scale stays) or observer: lsq (it is learned)"
                )
        if not self.include:
            raise ValueError("include: [] selects no layer; write ['*'] or leave the quantize block out")
        if self.calibration_batches < 1:
            raise ValueError(
                f"calibration_batches: {self.calibration_batches} is out of range; write a number of at least 1"
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """What `prepare_qat` is called with."""
        return {
            "weight": self.how.weight,
            "activation": self.how.activation,
            "include": self.include,
            "exclude": self.exclude,
            "layers": {glob: layer.how for glob, layer in self.layers.items()},
            "kv_cache": self.kv_cache,
            "share_inputs": self.share_inputs,
        }


@dataclass(frozen=True)
class RampConfig:
    """How sparsity grows with the progress of a stage (Zhu & Gupta, 2017); times are shares of the stage."""

    final: float = MISSING
    """Share of zeros at the end."""
    start: float = 0.0
    end: float = 0.5
    initial: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        if self.final != MISSING and not 0 < self.final < 1:
            raise ValueError(f"final: {self.final} is out of range; write a share of zeros between 0 and 1")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"end: {self.end} is not after start: {self.start}; write 0 <= start < end <= 1")


@dataclass(frozen=True)
class PruneConfig:
    """Set the smallest weights to zero and keep them there: one of `sparsity`, `ramp` and `nm`."""

    sparsity: float | None = None
    """Share of zeros, made at once before training."""
    ramp: RampConfig | None = None
    """Share of zeros that grows while training."""
    nm: list[int] | None = None
    """``[N, M]`` keeps N of every M neighbouring inputs. YAML reads an unquoted 2:4 as a number, so it is a list."""
    block: list[int] | None = None
    """Rows and columns of the blocks that are pruned as a whole."""
    scope: Literal["layer", "model"] = "layer"
    """Every layer to this share, or the smallest weights of all layers together."""
    layers: dict[str, float] = field(default_factory=dict)
    """By glob over layer names, another share; of several that match a layer the last decides."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over layer names; every one must match a layer."""
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = [name for name in ("sparsity", "ramp", "nm") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"sparsity: {given or 'nothing'} is given; write one of sparsity: 0.5, ramp and nm: [2, 4]"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity: {self.sparsity} is out of range; write a share of zeros between 0 and 1")
        if self.nm is not None and not (len(self.nm) == 2 and 0 < self.nm[0] < self.nm[1]):
            raise ValueError(f"nm: {self.nm} is no pair N < M; write [2, 4]")
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise ValueError(f"block: {self.block} is no pair of sizes; write [4, 4]")


@dataclass(frozen=True)
class StageConfig:
    """One stretch of training. A block that is present is on; ``max_steps: 0`` only prepares and measures."""

    max_steps: int = MISSING
    batch_size: int = 64
    """Samples per device and step."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.0
    """Share of the stage over which the learning rate rises from zero, 0 to 1."""
    gradient_clip: float | None = None
    """Largest global norm of the gradient."""
    accumulate: int = 1
    """Batches per optimizer step."""
    distill: DistillConfig | None = None
    prune: PruneConfig | None = None
    hold_sparsity: bool = True
    """Keep the zeros that an earlier stage made."""
    quantize: QuantizeConfig | None = None

    def __post_init__(self) -> None:
        for name, low in (("max_steps", 0), ("batch_size", 1), ("accumulate", 1)):
            if (value := getattr(self, name)) != MISSING and value < low:
                raise ValueError(f"{name}: {value} is out of range; write a whole number of at least {low}")
        if not self.lr > 0:
            raise ValueError(f"lr: {self.lr} is out of range; write a number above 0, such as 1e-3")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: {self.weight_decay} is out of range; write 0 or more")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup: {self.warmup} is out of range; write a share from 0 to 1")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip: {self.gradient_clip} is out of range; write a number above 0")

    @property
    def compresses(self) -> bool:
        """Whether this stage changes what the model can represent."""
        return self.quantize is not None or self.prune is not None


@dataclass(frozen=True)
class ExportConfig:
    """The file format that the results are written in."""

    format: Literal["onnx", "dense"] = MISSING


@dataclass(frozen=True)
class Recipe:
    """A model, its data, and the ordered stages it goes through."""

    name: str = MISSING
    model: FactoryConfig = MISSING
    data: FactoryConfig = MISSING
    stages: dict[str, StageConfig] = MISSING
    seed: int = 0
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    export: ExportConfig | None = None

    def __post_init__(self) -> None:
        if self.stages == MISSING:
            return
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed} is out of range; write a whole number from 0 to 2**63 - 1")
        if not self.stages:
            raise ValueError("stages: {} has no stage; write at least one, such as dense: {max_steps: 600}")
        # names become folders, and those of stages are parts of dotted keys
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"name: '{self.name}' is no plain name; write letters, digits, _ and - only")
        for name in self.stages:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"stages.{name}: '{name}' is no plain name; write letters, digits and _ only")
        names = list(self.stages)
        for position, (name, stage) in enumerate(self.stages.items()):
            wanted = stage.distill.teacher if stage.distill else None
            if wanted is not None and wanted not in names[:position]:
                raise ValueError(
                    f"stages.{name}.distill.teacher: '{wanted}' is no earlier stage; write one of {names[:position]}"
                )

    def teacher_of(self, name: str) -> str | None:
        """The stage whose result teaches stage `name`: the named one, else the input of the first compressing stage.

        None stands for the recipe's model as its factory made it.
        """
        distill = self.stages[name].distill
        if distill is not None and distill.teacher is not None:
            return distill.teacher
        before: str | None = None
        for stage_name, stage in self.stages.items():
            if stage.compresses or stage_name == name:
                return before
            before = stage_name
        raise KeyError(name)
