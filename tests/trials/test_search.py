"""`qatkit search`: the smallest formats within a loss, decided without the test split, and measured on it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch.utils.data import TensorDataset

from qatkit.data import SplitDataModule
from qatkit.errors import QatkitError
from qatkit.quantization.mixed.records import Group, Option, Sensitivity
from qatkit.schemes import scheme
from qatkit.trials.budget import Budget
from qatkit.trials.decisions import decisions
from qatkit.trials.halving import Ladder, halve, with_increases
from qatkit.trials.ladder import Rung, Step, chosen, climb, ladder, screen
from qatkit.trials.latency import priced
from qatkit.trials.promise import _bound, _difference, _interval, _worst, split_batches
from qatkit.trials.sizes import sized
from qatkit.trials.variants import Variant
from tests.cli.in_process import qatkit

RECIPE = """\
name: searched
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [32, 32], num_classes: 10}}
data: {factory: "qatkit.data:digits", args: {val_fraction: 0.2, test_fraction: 0.2}}
trainer: {accelerator: cpu, devices: 1}
stages:
  dense: {max_steps: 150, batch_size: 32, lr: 3.0e-3}
  qat: {max_steps: 40, batch_size: 32, lr: 1.0e-3, distill: {}, quantize: {weight: {num_bits: 8}}}
export: {format: onnx}
"""


def measured() -> Sensitivity:
    def options(scale: float) -> dict[str, Option]:
        return {"W8A16": Option(80, 0.01 * scale), "W4A16": Option(40, 0.1 * scale), "W2A16": Option(20, scale)}

    groups = (Group(("a",), 80, options(1.0)), Group(("b",), 80, options(10.0)))
    return Sensitivity(1.0, {name: scheme(name) for name in ("W8A16", "W4A16", "W2A16")}, groups)


def test_a_ladder_has_the_least_predicted_increase_of_every_size() -> None:
    rungs = ladder(measured(), 8)
    assert (rungs[0].cost, rungs[-1].cost) == (40, 160)
    assert [rung.cost for rung in rungs] == sorted({rung.cost for rung in rungs})
    assert [rung.increase for rung in rungs] == sorted((rung.increase for rung in rungs), reverse=True)
    mixed = next(rung for rung in rungs if rung.cost == 60)
    assert mixed.formats == {"a": "W2A16", "b": "W4A16"}, "the layer that loses less has fewer bits"
    assert mixed.layers == {"a": scheme("W2A16"), "b": scheme("W4A16")}
    assert [rung.cost for rung in ladder(measured(), 8, fixed=1000)][:2] == [1040, 1060], "evenly spaced in all bytes"


def trains(needed_short: int, needed_full: int, calls: list[tuple[int, float]] | None = None) -> Any:
    """A training that is within the limit from a rung on."""

    def train(rung: int, share: float) -> Step:
        if calls is not None:
            calls.append((rung, share))
        lost = 0.0 if rung >= (needed_full if share == 1.0 else needed_short) else 0.1 - 0.01 * rung
        return Step(rung, share, lost, lost, lost <= 0.01)

    return train


@pytest.mark.parametrize(("needed", "trained"), [(5, [3, 5, 4, 5]), (0, [3, 1, 0, 0]), (7, [3, 5, 6, 7])])
def test_a_search_trains_the_cheapest_rung_within_the_limit(needed: int, trained: list[int]) -> None:
    steps = climb(8, trains(needed, needed), Budget(2.0))
    assert [step.rung for step in steps] == trained
    assert [step.share for step in steps] == [0.25] * 3 + [1.0]
    assert chosen(steps) == steps[-1]


def test_screening_bounds_what_is_trained() -> None:
    def untrained(rung: int, share: float) -> Step:
        assert not share
        return Step(rung, share, 0.0, 0.0, rung >= 5)

    assert [step.rung for step in screen(8, untrained)] == [4, 6, 5]
    assert len(screen(1, untrained)) == 1
    sizes = [rung.cost for rung in ladder(measured(), 8, most=80)]
    assert (sizes[0], sizes[-1]) == (40, 80)
    known = [Step(7, 0.0, 0.0, 0.0, True)]
    steps = climb(8, trains(9, 9), Budget(2.0), known)
    assert steps[0] == chosen(steps) == known[0], "no training helped, but none is needed"
    assert len(steps) == 5


def test_a_full_training_that_fails_is_followed_by_a_dearer_rung_within_the_budget() -> None:
    steps = climb(4, trains(2, 3), Budget(4.0))
    assert [(step.rung, step.share, step.within) for step in steps[-2:]] == [(2, 1.0, False), (3, 1.0, True)]
    steps = climb(4, trains(2, 4), Budget(1.75))
    assert (steps[-1].rung, steps[-1].share) == (3, 0.25), "what is left pays for a short training of the dearest"
    assert chosen(steps) == steps[-1]
    (only,) = climb(4, trains(2, 4), Budget(1.0))
    assert (only.rung, only.share) == (3, 1.0), "without a budget for short trainings, the dearest is trained"


def test_a_short_training_does_not_count_if_its_rung_failed_with_all_steps() -> None:
    steps = [Step(2, 0.25, 0.0, 0.0, True), Step(2, 1.0, 0.1, 0.1, False)]
    assert chosen(steps) == steps[0], "nothing is within the limit, and it lost least"
    assert chosen([*steps, Step(3, 0.25, 0.0, 0.0, True)]).rung == 3


def test_budgets_in_minutes_and_trainings_end_a_search() -> None:
    calls: list[tuple[int, float]] = []
    climb(8, trains(5, 5, calls), Budget(2, "trials"))
    assert calls == [(3, 0.25), (7, 1.0)]
    minutes = Budget(1.0, "minutes")
    minutes.shares, minutes.seconds = [0.25], 10.0
    assert minutes.allows(1.0)
    assert not minutes.allows(0.5, 1.0), "a full training takes 40 s"


def test_the_interval_is_that_of_the_paired_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (500,), generator=generator)
    correct = (torch.rand(2, 500, generator=generator) < torch.tensor([[0.9], [0.8]])).double()
    losses = torch.rand(2, 500, generator=generator, dtype=torch.float64)
    pairs = [(labels[part], correct[:, part], losses[:, part]) for part in (slice(0, 200), slice(200, 500))]
    for metric, values in (("accuracy", correct[0] - correct[1]), ("perplexity", losses[1] - losses[0])):
        array = values.numpy()
        expected = norm.interval(0.95, array.mean(), array.std(ddof=1) / 500**0.5)
        difference = _difference(metric, pairs)
        assert difference is not None
        mean, error = array.mean(), array.std(ddof=1) / 500**0.5
        assert difference == pytest.approx((mean, error))
        another = norm.ppf(0.95, max(mean, 0), error * 2**0.5)
        assert _bound("accuracy", difference) == pytest.approx(another)
        assert _bound("perplexity", difference) == pytest.approx(math.expm1(another))
        unchanged = norm.ppf(0.95, 0, error * 2**0.5)
        assert _bound("accuracy", (-abs(mean), error)) == pytest.approx(unchanged), "an improvement is no change"
        found = _interval(metric, difference)
        assert found is not None
        if metric == "perplexity":
            found = tuple(float(torch.tensor(value, dtype=torch.float64).log1p()) for value in found)  # type: ignore[assignment]
        assert found == pytest.approx(expected, rel=1e-6)
    assert _difference("f1", pairs) is None
    worst = _worst(pairs)
    by_class = [float((correct[0] - correct[1])[labels == index].mean()) for index in range(3)]
    assert worst == (by_class.index(max(by_class)), pytest.approx(max(by_class)))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_missing_split_is_named(split: Any) -> None:
    full, empty = TensorDataset(torch.rand(8, 4), torch.zeros(8).long()), TensorDataset(torch.rand(0, 4))
    data = SplitDataModule(full, *((empty, full) if split == "validation" else (full, empty)), batch_size=4)
    name = {"validation": "val", "test": "test"}[split]
    with pytest.raises(QatkitError, match=f"data: a search .* {split} split, but the data has none.*{name}_fraction"):
        split_batches(data, split)
    assert len(split_batches(data, "test" if split == "validation" else "validation")) == 2


def test_the_reason_for_every_format_is_the_cost_and_the_loss_of_the_next_ones() -> None:
    sensitivity = measured()
    rung = next(rung for rung in ladder(sensitivity, 8) if rung.cost == 60)
    first, second = decisions(sensitivity, rung, "{:,} bytes".format)
    assert (first.group, first.format, second.group, second.format) == ("a", "W2A16", "b", "W4A16")
    assert first.why == "W4A16 adds 20 bytes and lowers the loss by 0.9"
    assert second.why == "W2A16 saves 20 bytes and raises the loss by 9; W8A16 adds 40 bytes and lowers the loss by 0.9"


def test_smaller_models_are_halved_by_what_they_can_cost() -> None:
    sensitivity = measured()
    parts = (0.5, 0.6, 0.7, 0.8)
    ladders = [
        Ladder(Variant(sparsity=part), sensitivity, ladder(sensitivity, 8, 200 - round(100 * part))) for part in parts
    ]
    calls: list[tuple[str, int]] = []

    def judge(each: Ladder, index: int, share: float) -> Step:
        calls.append((each.variant.name, each.rungs[index].cost))
        lost = {0.5: 0.001, 0.6: 0.015, 0.7: 0.018 if share < 0.5 else 0.1, 0.8: 0.3}[each.variant.sparsity or 0]
        return Step(index, share, lost, lost, lost <= 0.01, each.variant.name)

    winner, steps, dropped = halve(ladders, judge, Budget(4.0), 0.01, most=230)
    assert winner == ladders[1], "the cheapest of those that lose at most twice the limit"
    assert [step.share for step in steps] == [0.25] * 4 + [0.5] * 2
    assert all(cost < 230 for _, cost in calls)
    assert dropped[0] == "50% sparsity: it loses 0.10% with 25.0% of the steps, and 70% sparsity is cheaper"
    assert dropped[1:] == [
        "80% sparsity: it loses 30.00% with 25.0% of the steps, more than twice the limit",
        "70% sparsity: it loses 10.00% with 50.0% of the steps, more than twice the limit",
    ]
    winner, steps, dropped = halve(ladders[3:], judge, Budget(4.0), 0.01, most=230)
    assert (winner, len(steps)) == (None, 1), "it is not promising"
    winner, steps, dropped = halve(ladders, judge, Budget(1.5), 0.01, most=230)
    assert (winner, len(steps)) == (ladders[1], 2), "only two were affordable"
    assert [sentence.rpartition(", because ")[2] for sentence in dropped[:2]] == ["the budget is spent"] * 2
    assert halve([], judge, Budget(2.0), 0.01, most=1) == (None, [], [])


def test_a_smaller_model_has_the_sensitivity_of_the_whole_one() -> None:
    group = Group(("b",), 8, {"W8A16": Option(8, -3.0), "W4A16": Option(4, -5.0)})
    other = replace(group, layers=("new",))
    made = with_increases(Sensitivity(9.0, {}, (group, other)), measured())
    assert made.groups[0].options == {"W8A16": Option(8, 0.1), "W4A16": Option(4, 1.0)}
    assert made.groups[1] == other


def test_sizes_are_those_of_the_file() -> None:
    sensitivity = measured()

    def size(layers: Any) -> int:  # 2-bit codes take 4 bits each
        return 1000 + sum(10 * max(each.weight.num_bits, 4) for each in layers.values())

    found = sized(sensitivity, lambda name: "Linear", size)
    assert found.fixed == 1000
    costs = [{name: option.bytes for name, option in group.options.items()} for group in found.sensitivity.groups]
    assert costs == [{"W8A16": 80, "W4A16": 40, "W2A16": 40}] * 2
    (note,) = found.notes
    assert note == ("W2A16 in Linear layers saves 80 bytes of the file, although its packed codes take 120 bytes less")
    assert "W2A16" not in ladder(found.sensitivity, 8, found.fixed)[0].formats.values()


def test_the_latency_of_a_kind_of_layers_is_divided_and_noise_is_zero() -> None:
    def options() -> dict[str, Option]:
        return {"W8A16": Option(80, 0.01), "W4A16": Option(40, 0.1)}

    groups = [Group((name,), weights, options()) for name, weights in (("0.up", 80), ("1.up", 80), ("head", 8))]
    sensitivity = Sensitivity(1.0, {name: scheme(name) for name in options()}, tuple(groups))
    times = {"": 2.0, "0.up/W4A16": 1.0, "head/W4A16": 2.05}
    exported: list[dict[str, str]] = []

    def export(rung: Rung) -> Path:
        exported.append(rung.formats)
        return Path()

    def timer(files: Any) -> Any:
        return {
            name: {"median_ms": times[name], "low_ms": times[name] - 0.1, "high_ms": times[name] + 0.1}
            for name in files
        }

    found = priced(sensitivity, export, timer)
    assert exported[1] == {"0.up": "W4A16", "1.up": "W4A16", "head": "W8A16"}, "both layers of a kind at once"
    costs = [{name: option.bytes for name, option in group.options.items()} for group in found.sensitivity.groups]
    assert costs == [{"W8A16": 500_000, "W4A16": 0}] * 2 + [{"W8A16": 0, "W4A16": 0}]
    assert found.fixed == 1_000_000
    assert found.notes[1] == "head in W4A16 instead of W8A16: no measurable difference"
    rungs = ladder(found.sensitivity, 8, found.fixed)
    assert [rung.cost for rung in rungs] == [1_000_000, 1_500_000, 2_000_000]
    assert rungs[0].formats["head"] == "W8A16", "of equal latency, the one that loses least"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    (folder / "searched.yaml").write_text(RECIPE)
    (folder / "formats.yaml").write_text(CANDIDATES)
    (folder / "smallest.yaml").write_text(CANDIDATES.splitlines()[-1])
    return folder


CANDIDATES = """\
int8: {weight: {num_bits: 8}}
int4: {weight: {num_bits: 4}}
int2: {weight: {num_bits: 2}}
"""
ARGUMENTS = ("search", "searched.yaml", "--max-loss", "3%", "--candidates", "formats.yaml", "--out", "out")


@pytest.fixture(scope="module")
def ended(folder: Path) -> tuple[int, str, str]:
    return qatkit(*ARGUMENTS, cwd=folder)


def test_the_result_is_smaller_and_keeps_its_promise(folder: Path, ended: tuple[int, str, str]) -> None:
    code, output, err = ended
    assert code == 0, output + err
    found: dict[str, Any] = json.loads((folder / "out" / "search.json").read_text())
    assert found["kept"]
    assert found["promise"]["lost"] <= 0.03
    assert found["promise"]["samples"] == 360
    assert found["bytes"] < found["dense_bytes"] / 3
    assert "KEPT: at most 3.00%; accuracy" in output
    assert [each["group"] for each in found["decisions"]] == ["1", "3", "5"]
    page = (folder / "out" / "search.html").read_text()
    assert all(each["why"] in page for each in found["decisions"])
    chosen = found["ladders"]["whole model"][found["step"]["rung"]]
    assert {each["group"]: each["format"] for each in found["decisions"]} == chosen["formats"]
    file = Path(found["file"])
    verification = json.loads(((folder / file).parent / "verification.json").read_text())
    assert verification["runtime_metric"] == pytest.approx(found["promise"]["found"])
    trained = [each for each in (folder / "out" / "stages").iterdir() if each.name.startswith("dense-")]
    assert len(trained) == 1, "the dense stage is trained once"


def test_a_search_that_runs_again_trains_nothing_and_finds_the_same(folder: Path, ended: tuple[int, str, str]) -> None:
    stages = {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("stage.json")}
    assert qatkit(*ARGUMENTS, cwd=folder)[0] == ended[0]
    assert {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("stage.json")} == stages


def test_a_promise_that_is_broken_is_said(folder: Path, ended: tuple[int, str, str]) -> None:
    code, output, _ = qatkit(
        *ARGUMENTS[:3], "0%", "--candidates", "smallest.yaml", "--budget", "1", "--out", "bad", cwd=folder
    )
    assert code == 1, output
    assert "NOT KEPT: more than 0.00%" in output


@pytest.mark.slow
def test_the_price_of_a_narrower_model_is_minimized(folder: Path) -> None:
    code, output, err = qatkit(
        *ARGUMENTS[:3], "90%", "--candidates", "smallest.yaml", "--minimize", "cost", "--price", "0.5", "--batch", "64",
        "--width", "0.25", "--sparsity", "2:4", "--out", "priced", "model.args.hidden=[256,256]", cwd=folder,
    )  # fmt: skip
    assert code == 0, output + err
    found = json.loads((folder / "priced" / "search.json").read_text())
    assert found["minimize"] == "latency"
    assert set(found["latency"]) == {"dense", "found"}
    assert all(rungs[0]["cost"] > 0 for rungs in found["ladders"].values())
    assert "per thousand requests instead of" in output
    assert "ms per call instead of" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "much"), "--budget: 'much' is not a budget; use full trainings such as 2"),
        (("--minimize", "cost"), "--price: a price is required for --minimize cost"),
        (("--sparsity", "2"), "--sparsity: '2' is out of range; use a fraction between 0 and 1, or a pattern"),
        (("--depth", "0.5"), "stages.qat.shrink.layers: "),
        (("--max-loss", "much"), "--max-loss: 'much' is not a part; use a value such as 1% or 0.01"),
        (("export=null",), "export: a search measures exported files; add export: {format: onnx}"),
        (("export.format=mlx",), "export.format: a search measures files in their runtime, but MLX does not run"),
        (("stages.qat.quantize=null",), "stages.qat: a search changes the formats of the last stage"),
        (
            ("stages.qat.quantize.layers={'*': {scheme: W4A16}}",),
            "a search sets the format of every layer",
        ),
    ],
)
def test_what_a_search_needs_is_said(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    code, output, err = qatkit("search", "searched.yaml", *arguments, *ARGUMENTS[4:6], "--out", "none", cwd=folder)
    assert code == 2, output
    assert said in err
    assert not list((folder / "none").rglob("*.ckpt")), "nothing was trained"
