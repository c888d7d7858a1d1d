"""CompressionMonitor in somebody else's LightningModule: its numbers against numbers computed by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from qatkit.callbacks import CompressionMonitor, KnowledgeDistillation, QuantizationAwareTraining
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.quantization.measure import layer_table
from qatkit.quantization.monitoring import NUMBERS, SAMPLE, LayerWatch
from tests.callbacks.modules import Classifier, batches, network, trainer

W3 = QuantSpec(num_bits=3, observer="lsq")
A8 = QuantSpec(symmetric=False, strategy="tensor")


def curves(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logged(folder: Path, name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in curves(folder) if row.get(name)}


def test_the_summaries_are_those_of_the_formulas_written_by_hand(tmp_path: Path) -> None:
    module, monitor = Classifier(), CompressionMonitor(every=100)
    starts: list[Tensor] = []

    class Start(QuantizationAwareTraining):
        def on_train_start(self, *args: Any) -> None:
            starts.extend(module.net[i].weight_fake_quant.scale.detach().clone() for i in (0, 2))

    trainer(Start(W3, A8), monitor, logger=CSVLogger(tmp_path)).fit(module, batches())
    errors, clipped, zeros, drifts, count = 0.0, 0.0, 0.0, [], 0
    for index, start in zip((0, 2), starts, strict=True):
        weight = module.net[index].weight.detach().double()
        scale = module.net[index].weight_fake_quant.scale.detach().double()
        codes = (weight / scale).clamp(-4, 3).round()
        errors += weight.numel() * ((codes * scale - weight).norm() / weight.norm()).item()
        clipped += ((weight / scale < -4.5) | (weight / scale > 3.5)).sum().item()
        zeros += (codes == 0).sum().item()
        drifts.append(abs(scale.mean().item() / start.double().mean().item() - 1))
        count += weight.numel()
    expected = {
        "weight_error": errors / count,
        "clip_rate": clipped / count,
        "sparsity": zeros / count,
        "scale_drift": sum(drifts) / 2,
    }
    assert min(expected.values()) > 0  # all-zero numbers would agree with anything
    for name, value in expected.items():
        assert logged(tmp_path, f"quant/{name}") == {7: pytest.approx(value, rel=1e-4)}, name


def set_codes(layer: Any, codes: list[list[float]]) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(codes) * layer.weight_fake_quant.scale)


def test_a_code_oscillates_when_it_changes_against_its_last_direction() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    prepare_qat(model, weight=QuantSpec(num_bits=4, observer="lsq"))
    watch, seen = LayerWatch(), []
    for codes in (
        [0.0, 0, 0, 0],
        [1.0, 1, 0, 0],
        [0.0, 2, 0, 1],  # the first came back; the second went on; the last moved for the first time
        [0.0, 1, 0, 1],  # the second turned
        [1.0, 1, 0, 0],  # the first turned, though it rested in between; so did the last
    ):
        set_codes(model[0], [codes])
        seen.append(watch.observe(model[0])[NUMBERS.index("oscillation")].item())
    assert [round(value, 4) for value in seen[2:]] == [0.25, 0.25, 0.5]
    assert all(value != value for value in seen[:2])  # NaN: nobody can know yet


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(num_bits=4),
        QuantSpec(num_bits=4, strategy="tensor"),
        QuantSpec(num_bits=4, symmetric=False, observer="mse"),
        QuantSpec(num_bits=4, strategy="group", group_size=32, observer="lsq"),
        QuantSpec(num_bits=8, strategy="tensor", observer="lsq"),
    ],
    ids=str,
)
def test_a_large_layer_is_sampled_in_whole_rows_with_their_own_scales(spec: QuantSpec) -> None:
    model = nn.Sequential(nn.Linear(256, 4 * SAMPLE // 256), nn.Conv2d(3, 5, 3))
    with torch.no_grad():  # rows of different widths: another row's scale would show
        model[0].weight *= torch.tensor([0.1, 1.0, 10.0]).repeat(len(model[0].weight))[: len(model[0].weight), None]
    prepare_qat(model, weight=spec, include=["*"] if spec.strategy != "group" else ["0"])
    for layer, row in zip(model, layer_table(model), strict=False):
        watch = LayerWatch()
        numbers = dict(zip(NUMBERS, watch.observe(layer).tolist(), strict=True))
        for key in ("weight_error", "clip_rate", "sparsity"):
            exact = layer.weight.numel() <= SAMPLE
            assert numbers[key] == pytest.approx(
                getattr(row, key), rel=1e-6 if exact else 0.02, abs=1e-6 if exact else 2e-3
            ), key
        assert watch.histogram().sum() == min(layer.weight.numel(), SAMPLE)


def test_the_agreement_is_counted_from_the_logits_that_distillation_made_anyway(tmp_path: Path) -> None:
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    module = Classifier()
    module.net.register_forward_hook(lambda *_: calls.append("student"))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    monitor, distillation = CompressionMonitor(every=4), KnowledgeDistillation(teacher, student="net")
    trainer(monitor, distillation, logger=CSVLogger(tmp_path)).fit(module, batches())
    assert calls == ["student", "teacher"] * 8
    assert distillation.watch is None
    x = batches().dataset.tensors[0]
    same = (network()(x).argmax(dim=1) == teacher(x).argmax(dim=1)).float()
    expected = {3: same[:64].mean().item(), 7: same[64:].mean().item()}
    assert logged(tmp_path, "distill/teacher_agreement") == pytest.approx(expected)
    assert 0 < expected[3] != expected[7]


def test_it_observes_by_optimizer_steps_whatever_the_trainer_logs(tmp_path: Path) -> None:
    fit = trainer(
        QuantizationAwareTraining(W3), CompressionMonitor(every=3), logger=CSVLogger(tmp_path), log_every_n_steps=50,
        accumulate_grad_batches=2, max_steps=8,
    )  # fmt: skip
    fit.fit(Classifier(), batches())
    assert list(logged(tmp_path, "quant/clip_rate")) == [2, 5, 7]
    assert list(logged(tmp_path, "quant/oscillation")) == [5, 7]
    assert fit.callback_metrics["quant/clip_rate"].item() == pytest.approx(logged(tmp_path, "quant/clip_rate")[7])


def test_training_computes_the_same_bits_with_it_and_without() -> None:
    states = []
    for monitors in ([], [CompressionMonitor(every=2)]):
        module = Classifier()
        trainer(QuantizationAwareTraining(W3, A8), *monitors).fit(module, batches())
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_resumed_run_measures_drift_from_the_start_of_the_stage(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> CompressionMonitor:
        monitor = CompressionMonitor(every=2)
        save = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        options = {"max_epochs": epochs, "max_steps": -1, "enable_checkpointing": True}
        fit = trainer(QuantizationAwareTraining(W3), monitor, save, **options)
        fit.fit(Classifier(), batches(4), ckpt_path=checkpoint and str(checkpoint))
        return monitor

    whole, resumed = fit(3), fit(3, tmp_path / "epoch=0.ckpt")
    assert [row.weight_scale_drift for row in resumed.table] == [row.weight_scale_drift for row in whole.table]
    assert all(row.weight_scale_drift for row in whole.table)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["CompressionMonitor"]
    assert json.loads(json.dumps(saved)) == saved  # plain numbers: FSDP2 saves callbacks from one process


def test_a_module_without_quantized_layers_gets_a_table_and_no_curves(tmp_path: Path) -> None:
    module, monitor = Classifier(), CompressionMonitor(every=2)
    with torch.no_grad():
        module.net[0].weight[:4] = 0
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    fit = trainer(monitor, logger=CSVLogger(tmp_path))
    fit.fit(module, batches())
    assert [(row.name, row.weight_bits, row.sparsity) for row in monitor.table] == [
        ("net.0", 32, 0.25),
        ("net.2", 32, 0.0),
    ]
    assert not [name for name in fit.callback_metrics if name.startswith("quant/")]
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize("steps", [0, 8])
def test_the_table_is_written_beside_the_metrics_even_where_nothing_is_trained(tmp_path: Path, steps: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = CompressionMonitor(every=2)
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    trainer(QuantizationAwareTraining(W3), monitor, logger=loggers, max_steps=steps).fit(Classifier(), batches())
    (path,) = (tmp_path / "csv").rglob("layers.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["net.0", "net.2"]
    assert [float(row["weight_error"]) for row in rows] == [row.weight_error for row in monitor.table]
    assert all(bool(row["oscillation"]) == (steps > 0) for row in rows)
    assert sum(monitor.codes) == 8 * 16 + 16 * 3
    board = EventAccumulator(str(next((tmp_path / "board").rglob("version_0"))))
    board.Reload()
    (text,) = board.Tensors("layers/text_summary")
    assert b"| net.2 | 48 | 3 | 32 |" in text.tensor_proto.string_val[0]


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(QatkitError, match="every: 0 is out of range; use a positive integer"):
        CompressionMonitor(every=0)
