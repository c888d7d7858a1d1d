"""A recipe is checked against its code without memory for a weight and without a look at the data."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.pipeline.validation import validate_recipe
from qatkit.recipe.loading import list_recipes, load_recipe

MODULE = """
    import torch
    from torch import nn

    def net(width: int = 8):
        return nn.ModuleDict({"enter": nn.Linear(8, width), "norm": nn.LayerNorm(width), "head": nn.Linear(width, 10)})

    def half():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10, dtype=torch.float16))

    def huge():
        return nn.Sequential(nn.Linear(10**6, 10**6), nn.Linear(10**6, 8))

    def reads_weights():
        layer = nn.Linear(4, 4)
        layer.scale = layer.weight.abs().max().item()
        return layer

    def no_model():
        return [1, 2]

    def refuses(width: int = 8):
        raise ValueError(f"width: {width} is odd")

    def data(path: str = "x", batch_size: int = 1, seed: int = 0):
        raise AssertionError("data must not be touched")

    def data_without_seed(batch_size: int = 1):
        raise AssertionError("data must not be touched")
"""

RECIPE = """
    name: tiny
    model: {factory: "validation_code:net"}
    data: {factory: "validation_code:data"}
    stages:
      dense: {max_steps: 1}
      first: {max_steps: 1, quantize: {weight: {num_bits: 8}}}
      qat: {max_steps: 1, quantize: {weight: {num_bits: 4}, include: ["*"], exclude: []}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "validation_code.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "tiny.yaml").write_text(textwrap.dedent(RECIPE))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "tiny.yaml"
    sys.modules.pop("validation_code", None)


def validate(path: Path, *overrides: str) -> dict[str, list[str]]:
    found = validate_recipe(load_recipe(path, overrides), allow=["validation_code"])
    return {stage: list(coverage.quantized) for stage, coverage in found.items()}


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    layers = validate_recipe(recipe)
    assert list(layers) == [stage for stage, config in recipe.stages.items() if config.quantize]
    assert all(coverage.quantized for coverage in layers.values())


def test_the_layers_of_each_quantizing_stage_are_told(recipe_file: Path) -> None:
    assert validate(recipe_file, "stages.qat.quantize.exclude=[head]") == {
        "first": ["enter", "head"],
        "qat": ["enter"],
    }


def test_a_model_larger_than_the_machine_is_validated(recipe_file: Path) -> None:
    assert validate(recipe_file, "model.factory=validation_code:huge")["qat"] == ["0", "1"]


def test_validation_leaves_the_random_state_alone(recipe_file: Path) -> None:
    before = torch.get_rng_state()
    validate(recipe_file)
    assert torch.equal(torch.get_rng_state(), before)


def test_foreign_code_needs_permission_to_be_validated_too(recipe_file: Path) -> None:
    with pytest.raises(QatkitError, match=r"data\.factory: 'validation_code:data' is outside qatkit"):
        validate_recipe(load_recipe(recipe_file))
    assert "validation_code" not in sys.modules


@pytest.mark.parametrize(
    ("overrides", "key", "parts"),
    [
        (["stages.qat.quantize.include=[haed]"], "stages.qat.quantize.include[0]", ["'haed'", "no layer", "head"]),
        (["stages.qat.quantize.include=['*', 'x.*']"], "stages.qat.quantize.include[1]", ["'x.*'", "no layer"]),
        (["stages.first.quantize.exclude=[hed]"], "stages.first.quantize.exclude[0]", ["'hed'", "head"]),
        (["stages.qat.quantize.include=[norm]"], "stages.qat.quantize.include[0]", ["LayerNorm"]),
        (["stages.qat.quantize.exclude=['*']"], "stages.qat.quantize.exclude", ["select no layer"]),
        (
            ["stages.qat.quantize.weight={strategy: group, group_size: 3}"],
            "stages.qat.quantize.weight.group_size",
            ["layer 'enter'", "3 does not divide in_features=8", "4, 8"],
        ),
        (
            ["stages.qat.quantize.weight={num_bits: 4, observer: mse}", "stages.qat.quantize.init=awq"],
            "stages.qat.quantize.init",
            ["awq does not support ModuleDict", "use gptq"],
        ),
        (
            ["stages.qat.quantize={activation: {num_bits: 8, strategy: token}, init: gptq}"],
            "stages.qat.quantize.init",
            ["gptq sets weights and their scales, but no weight is quantized"],
        ),
        (["model.factory=validation_code:nett"], "model.factory", ["no 'nett'", "did you mean 'net'?"]),
        (["model.args.widht=8"], "model.args.widht", ["no such argument", "'width'?"]),
        (["model.args.width=wide"], "model.args.width", ["'wide' is not an integer"]),
        (["model.factory=validation_code:refuses"], "model.args", ["8 is odd"]),
        (["model.factory=validation_code:refuses", "model.args.width=5"], "model.args", ["width: 5 is odd"]),
        (["model.factory=validation_code:no_model"], "model.factory", ["returned list", "nn.Module"]),
        (
            ["model.factory=validation_code:reads_weights"],
            "model.factory",
            ["fails on torch's meta device (RuntimeError", "without reading weight values"],
        ),
        (["data.factory=validation_code:dat"], "data.factory", ["did you mean 'data'?"]),
        (["data.args.pth=x"], "data.args.pth", ["no such argument", "'path'?"]),
        (["data.args.path=1"], "data.args.path", ["1 is not text"]),
        (["data.args.batch_size=1"], "data.args.batch_size", ["would be overwritten, because qatkit sets"]),
        (["data.factory=validation_code:data_without_seed"], "data.args", ["no argument 'seed', which qatkit passes"]),
    ],
)
def test_a_recipe_that_does_not_fit_its_code_is_refused_by_key(
    recipe_file: Path, overrides: list[str], key: str, parts: list[str]
) -> None:
    with pytest.raises(QatkitError) as caught:
        validate(recipe_file, *overrides)
    message = str(caught.value)
    assert message.startswith(f"{key}: "), message
    for part in parts:
        assert part in message


def test_a_teacher_that_no_stage_trained_is_warned_of(tmp_path: Path) -> None:
    text = tmp_path / "recipe.yaml"
    text.write_text(
        "name: x\nmodel: {factory: 'qatkit.models:mlp'}\ndata: {factory: 'qatkit.data:digits'}\n"
        "stages: {qat: {max_steps: 1, distill: {}, quantize: {weight: {num_bits: 4}}}}\n"
    )
    with pytest.warns(QatkitWarning, match=r"stages\.qat\.distill: no earlier stage can be the teacher"):
        validate_recipe(load_recipe(text))


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "vision/digits_int4",
            [],
            r"export\.format: stage 'dense': 'compressed_tensors' is supported only for transformers models.*format: "
            r"onnx",
        ),
        (
            "llm/int4_qat",
            ["stages.qat.quantize.weight.num_bits=3"],
            r"export\.format: stage 'qat': layer '.*q_proj': .* pack 3-bit codes .* weight: \{num_bits: 4\}",
        ),
        (
            "llm/int4_qat",
            ["stages.ptq.quantize.kv_cache={strategy: token}"],
            r"export\.format: stage 'ptq': transformers does not quantize the KV cache",
        ),
    ],
)
def test_what_the_export_cannot_hold_is_refused_before_training(
    recipe: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(QatkitError, match=message):
        validate_recipe(load_recipe(recipe, [*overrides, "export.format=compressed_tensors"]))


def test_float16_weights_are_not_trained_themselves(recipe_file: Path) -> None:
    with pytest.raises(QatkitError, match=r"stages\.dense: '1\.weight' is in float16.*dtype: float32 with trainer"):
        validate(recipe_file, "model.factory=validation_code:half")
    lora = "stages={adapted: {max_steps: 1, lora: {rank: 2}}, rounded: {max_steps: 0, quantize: {weight: {}}}}"
    assert validate(recipe_file, "model.factory=validation_code:half", lora) == {"rounded": ["0", "1"]}


def test_fused_experts_are_refused_for_compressed_folders_before_training(tmp_path: Path) -> None:
    from tests.models.families import tiny

    tiny("mixtral").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "experts.yaml").write_text(f"""
        name: experts
        model: {{factory: "qatkit.models:causal_lm", args: {{name_or_path: {tmp_path}/model}}}}
        data: {{factory: "qatkit.data:causal_text", args: {{source: {{path: x.jsonl}}, tokenizer: x}}}}
        stages: {{qat: {{max_steps: 1, quantize: {{weight: {{num_bits: 4}}, include: ["*self_attn*"]}}}}}}
        export: {{format: compressed_tensors}}
    """)
    with pytest.raises(
        QatkitError, match=r"layer 'model\.layers\.0\.mlp\.experts': transformers cannot load fused experts"
    ):
        validate(tmp_path / "experts.yaml")
    assert validate(tmp_path / "experts.yaml", "export.format=dense")


@pytest.mark.parametrize("factory", ["masked_text", "text_classification", "text_pairs"])
def test_texts_whose_next_token_nobody_predicts_are_not_evaluated(recipe_file: Path, factory: str) -> None:
    data = f"data={{factory: qatkit.data:{factory}, args: {{source: {{path: x.jsonl}}, tokenizer: x%s}}}}"
    own = ", classes: [a, b]" if factory == "text_classification" else ""
    assert validate(recipe_file, data % own)
    task = {"masked_text": "masked", "text_pairs": "pairs"}.get(factory, factory)
    with pytest.raises(QatkitError, match=rf"evaluate: .*the task is {task} .*; remove evaluate"):
        validate(recipe_file, data % own, "evaluate={}")


LLAMA = "model={factory: qatkit.models:llama, args: {vocab_size: 64, hidden: 16, layers: 1, heads: 2, kv_heads: 1}}"


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ("{stride: 33}", r"evaluate\.stride: 33 exceeds the window of 32 tokens, .*; use an integer from 1 to 32"),
        ("{stride: 9, context: 8}", r"evaluate\.stride: 9 exceeds the window of 8 tokens"),
        (
            "{context: 1000000}",
            r"evaluate\.context: 1000000 exceeds the model's \d+ positions; use at most \d+",
        ),
    ],
)
def test_windows_that_cannot_be_evaluated_are_refused_before_training(evaluate: str, message: str) -> None:
    data = "data.args.context=32"
    validate_recipe(load_recipe("llm/int4_qat", [data, "evaluate={stride: 32}"]))
    with pytest.raises(QatkitError, match=message):
        validate_recipe(load_recipe("llm/int4_qat", [data, f"evaluate={evaluate}"]))


def test_a_cache_of_more_classes_than_the_teacher_has_is_refused_before_training() -> None:
    cache = "stages.qat.distill={cache: {top_k: %d}}"
    with pytest.raises(QatkitError, match=r"^stages\.qat\.distill\.cache\.top_k: 2048 is not less than the number"):
        validate_recipe(load_recipe("llm/int4_qat", [cache % 2048]))
    validate_recipe(load_recipe("llm/int4_qat", [cache % 2047]))


@pytest.mark.parametrize("key", ["on_policy", "sequence_level"])
def test_rows_of_several_documents_are_not_continued(recipe_file: Path, key: str) -> None:
    plan = f"{{{key}: {{fraction: 0.5, prompt: 4, new_tokens: 4}}}}"
    stages = f"stages={{dense: {{max_steps: 1}}, taught: {{max_steps: 1, distill: {plan}}}}}"
    data = "data={factory: qatkit.data:%s, args: {source: {path: x.jsonl}, tokenizer: x}}"
    assert validate(recipe_file, LLAMA, stages, data % "chat") == {}
    with pytest.raises(QatkitError, match=rf"^stages\.taught\.distill\.{key}: .*set data\.factory: .*chat"):
        validate(recipe_file, LLAMA, stages, data % "causal_text")


def test_samples_of_a_model_that_cannot_write_are_refused_by_the_block_to_leave_out(recipe_file: Path) -> None:
    stages = "stages={dense: {max_steps: 1, samples: {every: 1, prompts: [a], max_new_tokens: %d}}}"
    with pytest.raises(QatkitError, match=r"^stages\.dense\.samples: \w+ cannot generate text;.*; remove samples$"):
        validate(recipe_file, stages % 4)
    with pytest.raises(QatkitError, match=r"^stages\.dense\.samples\.max_new_tokens: .*add up to 100000 tokens"):
        validate(recipe_file, LLAMA, stages % 99999)


@pytest.mark.parametrize("task", ["mine.yaml", "folder/task", "../arc_easy"])
def test_a_task_from_a_file_runs_code_and_needs_permission(task: str) -> None:
    recipe = load_recipe("llm/int4_qat", [f"evaluate.tasks=['{task}']"])
    with pytest.raises(QatkitError, match=rf"^evaluate\.tasks: '{task}' is a file, .*--allow lm_eval$"):
        validate_recipe(recipe)
