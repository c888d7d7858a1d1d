"""The price of serving, with the numbers of the docstrings' sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from codecarbon.input import DataSource

from qatkit.advise.devices import DEVICES
from qatkit.advise.price import per_day, per_thousand
from qatkit.advise.roofline import call_seconds, layer_costs, training
from qatkit.errors import QatkitError
from qatkit.models import mlp
from qatkit.pipeline.energy import serving_energy
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.cli.in_process import qatkit


def test_two_dollars_an_hour_50_ms_and_batches_of_32_are_less_than_a_tenth_of_a_cent() -> None:
    assert per_thousand(2.0, 0.05, 32) == pytest.approx(0.000868, rel=1e-3)


@pytest.mark.parametrize(("requests", "devices"), [(1, 1), (86_400 * 640, 1), (86_400 * 640 + 640, 2), (0, 1)])
def test_devices_are_added_when_a_day_is_full(requests: float, devices: int) -> None:
    """32 requests per 50 ms are 640 per second."""
    assert per_day(2.0, 0.05, 32, requests) == (devices, devices * 48.0)


def test_the_command_compares_with_an_api(tmp_path: Path) -> None:
    arguments = ("--price", "2", "--latency", "50", "--batch", "32", "--requests", "500000", "--api", "0.03")
    done = qatkit("cost", *arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "48.00" in done.out
    assert "the API costs 7,500.00 per day for 500,000 requests of 500 tokens" in done.out
    assert "3,200 requests per day" in done.out
    done = qatkit("cost", *arguments, "--json", cwd=tmp_path)
    assert json.loads(done.out)["served"][0]["per_day"] == 48.0


def test_a_latency_or_a_run_is_needed_and_not_both(tmp_path: Path) -> None:
    for arguments in ((), (".", "--latency", "5")):
        done = qatkit("cost", "--price", "1", *arguments, cwd=tmp_path)
        assert (done.code, "pass either a run folder or --latency" in done.err) == (2, True)
    done = qatkit("cost", ".", "--price", "1", cwd=tmp_path)
    assert (done.code, "report.json" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((".", "--price", "1", "--batch", "8"), "--batch: this option has no effect without --latency"),
        (("--latency", "5", "--price", "1", "--tokens", "8"), "--tokens: this option has no effect without --api"),
        (("--latency", "5"), "Missing option '--price'"),
        (("--latency", "5", "--price", "1", "--device", "a100"), "--device: this option has no effect with --latency"),
        ((".", "--price", "1", "--context", "8"), "--context: this option has no effect without --device"),
        (("a", "--price", "1", "--device", "a10"), "--device: unknown device 'a10'"),
        (("--latency", "0", "--price", "1"), "--latency: 0 is out of range"),
        (("--latency", "5", "--price", "1", "--api", "0"), "--api: 0 is out of range"),
        (("--latency", "5", "--price", "1", "--api", "1", "--tokens", "0"), "--tokens: 0 is out of range"),
    ],
)
def test_options_without_effect_and_a_missing_price_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = qatkit("cost", *arguments, cwd=tmp_path)
    assert done.code == 2
    assert message in done.err


RECIPE = (
    'name: placed\nmodel: {factory: "qatkit.models:mlp", args: {hidden: [8]}}\n'
    'data: {factory: "qatkit.data:digits", args: {val_fraction: 0.1, test_fraction: 0.1}}\n'
    "trainer: {accelerator: cpu}\nstages:\n  dense: {max_steps: 30, batch_size: 32}\n"
    "  qat: {max_steps: 10, batch_size: 32, distill: {}, quantize: {weight: {num_bits: 8}}}\n"
)
PI = DEVICES["raspberry-pi-5"]


def test_predicted_latencies_and_the_cost_of_training_are_those_of_the_roofline(tmp_path: Path) -> None:
    (tmp_path / "placed.yaml").write_text(RECIPE)
    done = qatkit("cost", "placed.yaml", "--device", "raspberry-pi-5", "--price", "3600", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert {each["kind"] for each in content["served"]} == {"predicted"}
    assert [each["source"] for each in content["served"]] == [
        "without compression", "W8A16", "W4A16", "W8A8", "half of the neurons"
    ]  # fmt: skip
    model, images = mlp(hidden=(8,)), torch.zeros(32, 1, 8, 8)
    one, many = (layer_costs(model, lambda part=part: model(part)) for part in (images[:1], images))
    plain = content["served"][0]
    assert plain["latency_ms"] == pytest.approx(1e3 * call_seconds(one, PI, "fp32"))
    assert plain["per_thousand"] == pytest.approx(1000 * plain["latency_ms"] / 1e3)
    step, teacher = call_seconds(training(many), PI, "fp32"), call_seconds(many, PI, "fp32")
    assert content["training"] == {"dense": pytest.approx(30 * step), "qat": pytest.approx(10 * (step + teacher))}


def test_tokens_of_a_language_model_cost_what_decoding_them_takes(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 64}
    config |= {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ("--device", "a100", "--price", "3.6", "--batch", "2", "--context", "16", "--tokens", "100")
    done = qatkit("cost", ".", *arguments, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert content["training"] is None
    for each in content["served"]:
        seconds = each["latency_ms"] / 1e3
        assert each["per_million_tokens"] == pytest.approx(1e6 * 0.001 * seconds / 2)
        assert each["per_thousand"] == pytest.approx(1e3 * 0.001 * 100 * seconds / 2)


def test_a_device_that_is_too_slow_is_never_cheaper(tmp_path: Path) -> None:
    done = qatkit("cost", "--price", "2", "--latency", "60000", "--api", "0.03", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "never" in done.out


def test_latencies_are_those_of_a_report_and_their_energy_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "placed.yaml").write_text(
        'name: placed\nmodel: {factory: "qatkit.models:mlp", args: {hidden: [8]}}\n'
        'data: {factory: "qatkit.data:digits", args: {val_fraction: 0.1, test_fraction: 0.1}}\n'
        "trainer: {accelerator: cpu}\nstages: {dense: {max_steps: 2, batch_size: 32}}\nexport: {format: onnx}\n"
    )
    done = qatkit("run", "placed.yaml", "--out", "run", "--quiet", cwd=tmp_path)
    assert done.code == 0, done.err
    done = qatkit("cost", "run", "--price", "3.6", "--json", cwd=tmp_path)
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"][0]["latency"]
    for found, row in zip(json.loads(done.out)["served"], rows, strict=True):
        assert (found["source"], found["kind"], found["batch"]) == ("dense", "measured", row["batch_size"])
        assert found["per_thousand"] == pytest.approx(row["median_ms"] / 1e3 / row["batch_size"])
        assert found["watt_hours"] is None
    monkeypatch.setattr("qatkit.pipeline.energy.SECONDS", 1.5)
    done = qatkit("cost", "run", "--price", "3.6", "--country", "DEU", "--json", cwd=tmp_path)
    one, many = json.loads(done.out)["served"]
    mix = DataSource().get_global_energy_mix_data()["DEU"]["carbon_intensity"]  # grams per kWh
    for each in (one, many):
        assert each["grams"] == pytest.approx(each["watt_hours"] / 1e3 * mix)
    assert one["watt_hours"] > many["watt_hours"] > 0, "a batch of many takes less per request"
    done = qatkit("cost", "run", "--price", "3.6", "--country", "DEX", cwd=tmp_path)
    assert "--country: codecarbon has no data for 'DEX'" in done.err
    run = Run(load_recipe(tmp_path / "run" / "recipe.yaml"), tmp_path / "run")
    with pytest.raises(QatkitError, match="the report has 'before', which the run does not export any more"):
        serving_energy(run, "DEU", [("before", 1)])
