"""Shrinking in recipes: the architecture is recorded, taught, exported as a plain model, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from qatkit import QatkitError
from qatkit.models import cnn
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.pipeline.verify import verify_run
from qatkit.recipe import FactoryConfig
from qatkit.recipe.loading import load_recipe
from qatkit.report.page import write_page
from qatkit.run.architecture import Architecture
from qatkit.run.folder import Run

TEXT = [
    "model.args={vocab_size: 300, hidden: 32, layers: 3, heads: 4, kv_heads: 2, intermediate: 64, context: 16}",
    "data.args={vocab_size: 300, context: 16, include: ['email/*'], val_fraction: 0.2, test_fraction: 0.1, "
    "epoch_batches: 10}",
    "stages.dense.max_steps=40",
    "stages.recover.max_steps=30",
    "stages.recover.lr=6e-3",
    "stages.cut.shrink={layers: 2, heads: 0.5, neurons: 0.5, hidden: 24, calibration_batches: 2}",
    "trainer.accelerator=cpu",
]
IMAGES = """
name: channels
model: {factory: "qatkit.models:cnn", args: {channels: [8, 16]}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 40, lr: 1.0e-2}
  shrink: {max_steps: 30, lr: 5.0e-3, shrink: {channels: 0.5}, distill: {alpha: 0.7}}
  qat:
    max_steps: 20
    distill: {alpha: 0.7}
    quantize: {weight: {num_bits: 8}, activation: {num_bits: 8, symmetric: false, strategy: tensor}}
export: {format: onnx}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    run = Run(load_recipe("llm/shrink", TEXT), tmp_path_factory.mktemp("text"))
    validate_recipe(run.recipe)
    assert run_stages(run) == ["dense", "cut", "recover"]
    export_run(run)
    return run


def images_of(folder: Path, *overrides: str) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "channels.yaml").write_text(IMAGES)
    return Run(load_recipe(str(folder / "channels.yaml"), list(overrides)), folder / "run")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Run:
    pytest.importorskip("torch_pruning")
    run = images_of(tmp_path_factory.mktemp("images"))
    validate_recipe(run.recipe)
    run_stages(run)
    export_run(run)
    return run


def test_plain_from_pretrained_loads_the_smaller_model_with_equal_outputs(text: Run) -> None:
    folder = text.out / "export" / "recover" / "dense"
    loaded, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    config = loaded.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 2, 1)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (24, 32, 8)
    tokens = torch.arange(12).view(1, -1)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, text.load_model("recover").eval()(tokens).logits)
    assert all(check.passed for check in verify_run(text).values())


def test_the_report_shows_parameters_multiplications_and_time_before_and_after(text: Run, tmp_path: Path) -> None:
    verify_run(text)
    rows = {row["stage"]: row for row in report_run(text)["rows"]}
    dense, cut = rows["dense"]["cost"], rows["cut"]["cost"]
    for stage, cost in (("dense", dense), ("cut", cut)):
        loaded = AutoModelForCausalLM.from_pretrained(text.out / "export" / stage / "dense")
        assert cost["parameters"] == loaded.num_parameters()
    per_token = {
        "dense": 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64),
        "cut": 2 * (2 * 24 * 16 + 2 * 24 * 8 + 3 * 24 * 32),
    }
    attention = {"dense": 3 * 4 * 2 * 8 * 16, "cut": 2 * 2 * 2 * 8 * 16}  # scores and values, 16 tokens each
    head = {"dense": 300 * 32, "cut": 300 * 24}
    for stage, cost in (("dense", dense), ("cut", cut)):
        expected = 16 * (per_token[stage] + attention[stage] + head[stage])
        assert expected <= cost["macs"] <= expected + 16 * 16 * 8  # and the rotary angles
    assert 0 < cut["torch_ms"] < 1.5 * dense["torch_ms"]
    text_page = (text.out / "report.md").read_text()
    assert "## Models" in text_page
    assert f"| cut | {cut['parameters']} ({dense['parameters'] / cut['parameters']:.2f}x fewer) |" in text_page
    write_page([text.out], tmp_path / "page.html")
    assert "<h2>Models</h2>" in (tmp_path / "page.html").read_text()


def test_the_whole_model_teaches_and_training_recovers(text: Run) -> None:
    assert text.recipe.teacher_of("recover") == "dense"
    dense, cut, recover = (text.record(name).metrics["test/loss"] for name in text.recipe.stages)
    assert dense < cut
    assert recover < cut
    assert text.record("dense").architecture is None
    assert text.record("recover").architecture == text.record("cut").architecture


def test_a_convolutional_network_is_rebuilt_by_its_factory_and_quantized(images: Run) -> None:
    args = {"channels": [4, 8]}
    assert images.record("shrink").architecture == Architecture(FactoryConfig("qatkit.models:cnn", args))
    plain = cnn(**args)  # type: ignore[arg-type]
    plain.load_state_dict(load_file(images.folder("shrink") / "model" / "model.safetensors"))
    model = images.load_model("qat")
    assert [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)] == [4, 8]
    assert all(check.passed for check in verify_run(images).values())
    assert images.record("qat").metrics["test/accuracy"] > 0.7


def test_a_resumed_shrink_stage_ends_with_the_same_bits(images: Run, tmp_path: Path) -> None:
    from qatkit.pipeline.module import CompressionModule

    again, step = images_of(tmp_path), CompressionModule.training_step
    with pytest.MonkeyPatch.context() as patch:

        def breaks(self: CompressionModule, batch: object, batch_idx: int) -> torch.Tensor:
            if self.global_step == 25 and self.stage.shrink is not None:
                raise RuntimeError("the power is gone")
            return step(self, batch, batch_idx)

        patch.setattr(CompressionModule, "training_step", breaks)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run_stages(again)
    assert run_stages(again, until="shrink") == ["shrink"]
    for key, value in images.load_model("shrink").state_dict().items():
        assert torch.equal(value, again.load_model("shrink").state_dict()[key]), key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("{heads: 3}", r"stages\.cut\.shrink\.heads: 3 query heads cannot be divided among 2"),
        ("{layers: 9}", r"stages\.cut\.shrink\.layers: 9 is out of range; use an integer from 1 to 3"),
        ("{layers: 4, layers_by: last}", r"stages\.cut\.shrink\.layers: 4 is out of range; use an integer from 1 to 3"),
        (
            "{keep_layers: [2, 1]}",
            r"shrink\.keep_layers: \[2, 1\] is not an ascending list of indices of the model's 3 layers",
        ),
        ("{neurons: 64}", r"stages\.cut\.shrink: the model already has these sizes"),
        ("{channels: 0.5}", r"stages\.cut\.shrink\.channels: LlamaForCausalLM has no arguments\(\) method"),
        ("{kv_heads: 9}", r"stages\.cut\.shrink\.kv_heads: 9 is out of range; use an integer from 1 to 2"),
        ("{channels: 8}", r"stages\.cut\.shrink\.channels: 8\.0 is out of range; use a fraction between 0 and 1"),
        ("{heads: 0}", r"stages\.cut\.shrink\.heads: 0 is out of range"),
        ("{hidden: 1.5}", r"stages\.cut\.shrink\.hidden: 1\.5 is out of range"),
        ("{layers_by: last}", r"stages\.cut\.shrink\.layers: no size is set"),
        ("{heads: 2, layers_by: last}", r"stages\.cut\.shrink\.layers_by: 'last' has no effect without layers"),
        (
            "{channels: 0.5, layers: 2}",
            r"stages\.cut\.shrink\.channels: this size is supported only for convolutional networks",
        ),
        ("{layers: 2, keep_layers: [0]}", r"stages\.cut\.shrink\.keep_layers: \[0\] and layers=2 are both set"),
    ],
)
def test_an_invalid_size_is_refused_before_a_weight_is_read(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=message):
        validate_recipe(load_recipe("llm/shrink", [*TEXT, f"stages.cut.shrink={override}"]))


@pytest.mark.parametrize(
    ("shrink", "message"),
    [
        (
            "{neurons: 0.5}",
            r"stages\.shrink\.shrink\.neurons: .* is not a Llama-like .*; use channels: 0.5 for a convolutional",
        ),
        ("{channels: 0.5, exclude: [conv1, con9]}", r"stages\.shrink\.shrink\.exclude\[1\]: 'con9' matches no linear"),
        ("{channels: 0.1}", r"stages\.shrink\.shrink: .* layer 'conv1' .*\(in a recipe, channels: 0\.125 or more\)"),
    ],
)
def test_settings_that_do_not_fit_a_convolutional_network_are_refused_by_key(
    tmp_path: Path, shrink: str, message: str
) -> None:
    run = images_of(tmp_path, f"stages.shrink.shrink={shrink}")
    with pytest.raises(QatkitError, match=message):
        validate_recipe(run.recipe)


def test_later_stages_are_validated_on_the_smaller_model() -> None:
    quantize = "stages.recover.quantize={weight: {num_bits: 4, strategy: group, group_size: 32}, exclude: [lm_head]}"
    with pytest.raises(QatkitError, match=r"stages\.recover\.quantize\.weight\.group_size: .*in_features=24"):
        validate_recipe(load_recipe("llm/shrink", [*TEXT, quantize]))
    with pytest.raises(QatkitError, match=r"stages\.recover\.prune\.include\[0\]: '\*layers\.2\.\*' matches no linear"):
        validate_recipe(
            load_recipe("llm/shrink", [*TEXT, "stages.recover.prune={sparsity: 0.5, include: ['*layers.2.*']}"])
        )


def test_layers_are_kept_by_position_or_index() -> None:
    from qatkit.models import llama
    from qatkit.recipe import ShrinkConfig
    from qatkit.stages.shrink import check

    with torch.device("meta"):
        whole = llama(300, hidden=32, layers=6, heads=4, kv_heads=2, intermediate=64)
    for config in (
        ShrinkConfig(layers=3, layers_by="uniform"),
        ShrinkConfig(layers=0.5, layers_by="last"),
        ShrinkConfig(keep_layers=[0, 2, 4], neurons=0.5),
    ):
        smaller: nn.Module = check(config, whole)
        assert smaller.config.num_hidden_layers == len(smaller.model.layers) == 3  # type: ignore[union-attr, arg-type]


def test_shrinking_after_pruning_or_quantization_is_refused(tmp_path: Path) -> None:
    for block, message in (
        ("stages.dense.prune={sparsity: 0.5}", r"stages\.shrink\.shrink: an earlier stage pruned weights"),
        ("stages.dense.quantize={weight: {num_bits: 8}}", r"stages\.shrink\.shrink: stage 'dense' fitted"),
    ):
        with pytest.raises(QatkitError, match=message):
            images_of(tmp_path, block)


def test_heads_of_bert_are_refused_and_its_layers_can_be_removed() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    from qatkit.recipe import ShrinkConfig
    from qatkit.stages.shrink import check

    with torch.device("meta"):
        bert = BertForSequenceClassification(
            BertConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4)
        )
    with pytest.raises(
        QatkitError, match=r"BertForSequenceClassification is not a Llama-like .*; remove whole layers instead"
    ):
        check(ShrinkConfig(heads=1), bert)
    assert check(ShrinkConfig(layers=2, layers_by="uniform"), bert).config.num_hidden_layers == 2  # type: ignore[union-attr]


def on_meta(name: str, **config: object) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
    if name != "OPTForCausalLM":  # whose config knows neither
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 48}
    with torch.device("meta"):
        made: nn.Module = kind(kind.config_class(**sizes | config))
    return made


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "OPTForCausalLM",
            {"heads": 0.5},
            r"^heads: OPTForCausalLM is not a Llama-like .*; remove whole layers instead",
        ),
        ("OPTForCausalLM", {"layers": 2}, r"^layers: OPTForCausalLM is not a Llama-like .*keep_layers\)$"),
        ("CohereForCausalLM", {"neurons": 0.5}, r"^neurons: CohereForCausalLM is not a Llama-like"),
        (
            "StableLmForCausalLM",
            {"heads": 0.5},
            r"^StableLmForCausalLM with {'num_attention_heads': 2, .* cannot express",
        ),
        ("StableLmForCausalLM", {"hidden": 24}, r"^StableLmForCausalLM with {'hidden_size': 24, .* cannot express"),
        (
            "Qwen3MoeForCausalLM",
            {"keep_layers": [1, 2]},
            r"^Qwen3MoeForCausalLM with {'num_hidden_layers': 2} has 'model",
        ),
    ],
)
def test_a_model_that_the_run_could_not_shrink_is_refused_by_name(
    name: str, size: dict[str, Any], message: str
) -> None:
    from qatkit.recipe import ShrinkConfig
    from qatkit.stages.shrink import check

    # experts in every second layer: the second of the two that stay would have them, and it is the first
    more = {"num_experts": 2, "decoder_sparse_step": 2} if "Moe" in name else {}
    with pytest.raises(QatkitError, match=message):
        check(ShrinkConfig(**size), on_meta(name, **more))


@pytest.mark.parametrize(
    ("name", "size"), [("OPTForCausalLM", {"keep_layers": [1, 3]}), ("StableLmForCausalLM", {"layers": 2})]
)
def test_such_a_model_loses_the_layers_that_it_can(name: str, size: dict[str, Any]) -> None:
    from qatkit.recipe import ShrinkConfig
    from qatkit.stages.shrink import check

    smaller: Any = check(ShrinkConfig(**size), on_meta(name))
    assert smaller.config.num_hidden_layers == 2


def test_a_weight_tied_between_convolutions_is_refused_before_a_stage_runs() -> None:
    from qatkit.recipe import ShrinkConfig
    from qatkit.stages.shrink import check

    model = cnn(channels=[8, 8, 8])
    model.conv3.weight = model.conv2.weight
    with pytest.raises(QatkitError, match=r"^layer 'conv3' shares its weight with 'conv2\.weight'"):
        check(ShrinkConfig(channels=0.5), model)


@pytest.mark.filterwarnings("ignore:.*changed after it was verified:qatkit.errors.QatkitWarning")
def test_a_sparse_export_is_smaller_and_equal_and_a_changed_one_fails(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from qatkit.pruning.storage import load_sparse

    overrides = (
        'model={factory: "qatkit.models:mlp", args: {hidden: [64]}}',
        "stages.shrink={max_steps: 2, prune: {sparsity: 0.9}}",
        "stages.dense.max_steps=5",
        "stages.qat={max_steps: 0, prune: {sparsity: 0.95}}",
        "export.format=sparse",
    )
    run = images_of(tmp_path, *overrides)
    run_stages(run)
    path = export_run(run)[-1]
    assert path.name == "model.sparse.safetensors"
    weights, expected = load_sparse(path), run.load_model("qat").state_dict()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    checks = verify_run(run)
    assert all(check.passed and check.format == "sparse" for check in checks.values())
    row = report_run(run)["rows"][-1]
    dense = sum(value.numel() * 4 for value in expected.values())
    assert row["dense_bytes"] == dense
    assert row["bytes"] == path.stat().st_size < 0.25 * dense
    assert f"{row['bytes'] / dense:.1%} of the" in (run.out / "report.md").read_text()
    assert "torch_ms" not in row["cost"], "all stages have the same model"
    weights["1.weight"][0, 0] += 1
    save_file(weights, path)
    assert not verify_run(run)["qat"].passed
