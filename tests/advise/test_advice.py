"""`qatkit advise` in ten situations: the plans are pinned, and the recipe of the first possible one is valid."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qatkit.advise.advice import OTHER_PTQ
from qatkit.advise.devices import DEVICES
from qatkit.advise.options import OPTIONS, RUNTIMES, evidence_for, options_of
from qatkit.recipe.loading import load_recipe
from tests.cli.in_process import qatkit

ROOT = Path(__file__).parent.parent.parent
MODELS = {
    "mlp": "factory: 'qatkit.models:mlp', args: {hidden: [256, 256]}",
    "cnn": "factory: 'qatkit.models:cnn', args: {channels: [16, 32, 32]}",
    "resnet": "factory: 'qatkit.models:resnet', args: {channels: [16, 32]}",
}
LLAMAS = {  # hidden, intermediate, layers, heads, kv_heads
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}


class Situation(NamedTuple):
    model: str
    options: str
    plans: list[str]
    slow: bool = False


SITUATIONS = {
    "an MLP on a phone-class CPU": Situation(
        "mlp",
        "--device raspberry-pi-5",
        ["int8 (ARM), PTQ: 85.0 kB", "int8 (ARM), QAT + KD: 85.0 kB", "smaller model, int8 (ARM), QAT + KD: 26.1 kB"],
    ),
    "a CNN on a phone-class CPU": Situation(
        "cnn",
        "--device raspberry-pi-5",
        ["int8 (ARM), PTQ: 15.9 kB", "int8 (ARM), QAT + KD: 15.9 kB", "smaller model, int8 (ARM), QAT + KD: 4.5 kB"],
    ),
    "a CNN without training and without loss": Situation(
        "cnn", "--device epyc-9654 --no-training --max-loss 0", ["int8 (VNNI), PTQ: 15.9 kB"]
    ),
    "a ResNet on a server in OpenVINO": Situation(
        "resnet",
        "--device xeon-8480 --runtime openvino",
        [
            "int8 in OpenVINO (VNNI), PTQ: 44.4 kB",
            "int8 in OpenVINO (VNNI), QAT + KD: 44.4 kB",
        ],
    ),
    "a 1B model on a phone-class CPU": Situation(
        "1b",
        "--device raspberry-pi-5 --context 2048",
        ["Q4_0, PTQ, GPTQ: 876.7 MB", "Q8_0, PTQ: 1.4 GB", "TQ2_0, QAT + KD: 580.3 MB"],
    ),
    "a 1B model in half a gigabyte": Situation(
        "1b",
        "--device raspberry-pi-5 --memory 0.5 --context 512",
        [
            "smaller model, Q4_0, QAT + KD: 487.7 MB",
            "smaller model, TQ2_0, QAT + KD: 370.1 MB",
            "Q4_0, PTQ, GPTQ: 826.4 MB, does not fit",
            "Q8_0, PTQ: 1.3 GB, does not fit",
        ],
    ),
    "a 7B model on a graphics card": Situation(
        "7b",
        "--device rtx4090",
        ["W4A16, PTQ, GPTQ: 6.0 GB", "FP8_DYNAMIC, PTQ: 9.2 GB", "W8A8, PTQ: 9.2 GB", "W2A16, QAT + KD: 4.4 GB"],
        slow=True,
    ),
    "a 7B model without any loss": Situation(
        "7b",
        "--device h100 --max-loss 0",
        [
            "W4A16, QAT + KD: 6.0 GB",
            "FP8_DYNAMIC, QAT + KD: 9.2 GB",
            "W8A8, QAT + KD: 9.2 GB",
            "W2A16, QAT + KD: 4.4 GB",
        ],
        slow=True,
    ),
    "a 13B model with a long context in 24 GB": Situation(
        "13b",
        "--device l4 --context 8192",
        ["W4A16, PTQ, GPTQ: 13.9 GB", "FP8_DYNAMIC, PTQ: 20.1 GB", "W8A8, PTQ: 20.1 GB", "W2A16, QAT + KD: 10.7 GB"],
        slow=True,
    ),
    "a 70B model on one 80 GB card": Situation(
        "70b",
        "--device a100",
        ["W4A16, PTQ, GPTQ: 37.7 GB", "W8A8, PTQ: 70.9 GB", "W2A16, QAT + KD: 20.6 GB"],
        slow=True,
    ),
}


def made(model: str, folder: Path) -> str:
    if model in MODELS:
        (folder / "model.yaml").write_text(
            f"name: model\nmodel: {{{MODELS[model]}}}\ndata: {{factory: 'qatkit.data:digits'}}\n"
            "stages:\n  dense: {max_steps: 10}\nexport: {format: onnx}\n"
        )
        return "model.yaml"
    hidden, intermediate, layers, heads, kv_heads = LLAMAS[model]
    config: dict[str, Any] = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 16384,
    }  # fmt: skip
    (folder / model).mkdir()
    (folder / model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * each.slow) for name, each in SITUATIONS.items()]
)
def test_the_plans_of_a_situation_are_pinned_and_the_recipe_is_valid(name: str, tmp_path: Path) -> None:
    situation = SITUATIONS[name]
    done = qatkit("advise", made(situation.model, tmp_path), *situation.options.split(), cwd=tmp_path)
    assert done.code == 0, done.err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if "│" in line]
    plans = [f"{plan}: {memory}" for _, plan, _, memory, *_ in rows]
    assert plans == situation.plans
    if situation.model in LLAMAS:
        (tmp_path / situation.model / "model.safetensors").touch()
    larger = ["--force"] if situation.slow else []  # trained on a larger machine than that of the test
    checked = qatkit("validate", "advised.yaml", *larger, cwd=tmp_path)
    assert checked.code == 0, checked.err


def test_the_expected_loss_is_the_measured_one_and_names_its_benchmark(tmp_path: Path) -> None:
    done = qatkit("advise", made("1b", tmp_path), "--device", "raspberry-pi-5", "--context", "512", cwd=tmp_path)
    assert done.code == 0, done.err
    rows = json.loads((ROOT / "benchmarks" / "results" / "qat_recovery.json").read_text())["rows"]
    (row,) = (each for each in rows if (each["format"], each["method"]) == ("Q4_0", "GPTQ"))
    expected = 100 * math.expm1(float(row["difference from baseline"].split()[0]))
    assert re.search(rf"Q4_0, PTQ, GPTQ .*│ {expected:.2f}%", done.out)
    assert f"in benchmarks/qat_recovery.py: held-out loss {row['held-out loss']}" in done.out


def test_the_cost_follows_from_the_price_and_the_least_time(tmp_path: Path) -> None:
    model = made("mlp", tmp_path)
    done = qatkit("advise", model, "--device", "raspberry-pi-5", "--price", "3.6", cwd=tmp_path)
    # 3.6 per hour is 0.001 per second, so a thousand calls of 5.04 µs cost 5.04e-06
    assert re.search(r"int8 \(ARM\), PTQ .*5\.04 µs +│ 5\.04e-06 +│", done.out), done.out


REFUSED = {
    ("--device", "rasberry-pi-5"): "--device: unknown device 'rasberry-pi-5'; did you mean 'raspberry-pi-5'?",
    (
        "--device",
        "raspberry-pi-5",
        "--runtime",
        "vllm",
    ): "--runtime: 'vllm' computes no compressed format of MLPs on 'raspberry-pi-5'; use --runtime onnxruntime",
    (
        "--device",
        "l4",
    ): "--device: 'onnxruntime' computes no compressed format of MLPs on 'l4'; for MLPs, use one of: m1-",
    ("--device", "l4", "--runtime", "tensorrt"): "--runtime: unknown runtime 'tensorrt'",
    ("--device", "raspberry-pi-5", "--out", "model.yaml"): "model.yaml: the file exists",
    ("--device", "raspberry-pi-5", "--context", "8"): "--context: the model is not a language model",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_an_impossible_request_is_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = qatkit("advise", made("mlp", tmp_path), *arguments, cwd=tmp_path)
    assert done.code == 2
    assert REFUSED[arguments] in done.err


def test_every_option_has_evidence_for_the_families_that_were_measured() -> None:
    for option in OPTIONS.values():
        methods = ["PTQ, GPTQ"] if option.gptq else OTHER_PTQ
        for family in {"language", "mlp", "convolutional"} & set(option.families):
            assert evidence_for(family, option.evidence, methods) is not None, option.name
            assert evidence_for(family, option.evidence, ["QAT + KD"]) is not None, option.name


def test_a_device_whose_processor_is_unknown_has_no_formats() -> None:
    for device in DEVICES.values():
        assert any(options_of(runtime, "language", device) for runtime in RUNTIMES), device.name
        unknown = replace(device, processor=None)
        assert not any(options_of(runtime, "language", unknown) for runtime in RUNTIMES)


def test_evidence_of_another_tool_is_named(tmp_path: Path) -> None:
    done = qatkit("advise", made("mlp", tmp_path), "--device", "raspberry-pi-5", cwd=tmp_path)
    assert "plan 1: W8A8, quantize_static of ONNX Runtime, in benchmarks/serve.py: MLP in ONNX Runtime" in done.out


def test_the_context_is_at_most_the_positions_of_the_model(tmp_path: Path) -> None:
    model, outputs = made("1b", tmp_path), []
    for context in ("16384", "20000"):
        out = f"{context}.yaml"
        done = qatkit("advise", model, "--device", "l4", "--context", context, "--out", out, cwd=tmp_path)
        assert done.code == 0, done.err
        outputs.append(done.out.replace(out, ""))
    note = "note: the context is 16,384 tokens instead of 20,000, because the model has 16,384 positions\n"
    assert note in outputs[1]
    assert outputs[1].replace(note, "") == outputs[0]


def test_what_no_plan_achieves_is_said(tmp_path: Path) -> None:
    arguments = ("--device", "raspberry-pi-5", "--no-training", "--memory", "0.1", "--context", "512")
    done = qatkit("advise", made("1b", tmp_path), *arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "note: no plan fits into 0.1 GB, because the smallest one needs 529.9 MB; use a shorter" in done.out
    done = qatkit("advise", made("cnn", tmp_path), *arguments[:3], "--max-loss", "0", "--out", "b.yaml", cwd=tmp_path)
    assert "note: no plan that fits is within --max-loss 0: the smallest expected loss is 0." in done.out


@pytest.mark.filterwarnings("default:.*recurrent layer run as a loop:qatkit.errors.QatkitWarning")
def test_an_encoder_has_its_own_formats_and_an_unknown_model_no_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is quoted the evidence of an MLP."""
    (tmp_path / "advised_models.py").write_text(MADE)
    monkeypatch.syspath_prepend(tmp_path)
    for factory, plan, note in (
        ("encoder", "dynamic int8, ", ""),
        (
            "reader",
            "int8 (ARM), ",
            "note: no plan has an expected loss, because the benchmarks do not include Reader, whose",
        ),
    ):
        (tmp_path / f"{factory}.yaml").write_text(
            f"name: model\nmodel: {{factory: 'advised_models:{factory}'}}\ndata: {{factory: 'advised_models:rows'}}\n"
            "stages:\n  dense: {max_steps: 10}\nexport: {format: onnx}\n"
        )
        done = qatkit(
            "advise", f"{factory}.yaml", "--device", "raspberry-pi-5", "--allow", "advised_models",
            "--out", f"{factory}2.yaml", cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert plan in done.out
        assert note in done.out
        assert "MLP" not in done.out
        assert ("the steps of a recurrent layer run as a loop" in done.err) == (factory == "reader")


MADE = """\
import torch
from torch import nn
from torch.utils.data import TensorDataset
from qatkit.data import SplitDataModule


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 10))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.rows(x)[0][:, -1])


reader = Reader


def rows(batch_size, seed):
    part = TensorDataset(torch.rand(64, 4, 16), torch.zeros(64, dtype=torch.long))
    return SplitDataModule(part, part, part, batch_size, seed)
"""


def test_a_smaller_model_without_evidence_has_no_expected_loss(tmp_path: Path) -> None:
    done = qatkit("advise", made("mlp", tmp_path), "--device", "raspberry-pi-5", cwd=tmp_path)
    assert re.search(r"smaller model, int8 .*not measured", done.out)


def test_the_recipe_keeps_the_stages_before_compression(tmp_path: Path) -> None:
    done = qatkit("advise", "vision/digits_int4", "--device", "xeon-8480", cwd=tmp_path)
    assert done.code == 0, done.err
    recipe = load_recipe(tmp_path / "advised.yaml")
    assert list(recipe.stages) == ["dense", "ptq"]
    assert recipe.stages["dense"] == load_recipe("vision/digits_int4").stages["dense"]
    assert recipe.stages["ptq"].quantize is not None
    assert recipe.stages["ptq"].quantize.target == "onnxruntime-vnni"
    left = "the plan leaves out parts of the recipe: stage 'ptq', stage 'qat'"
    assert f"note: {left}" in done.out
    assert f"# {left[0].upper()}{left[1:]}." in (tmp_path / "advised.yaml").read_text()
