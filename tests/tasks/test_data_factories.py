"""Every data factory of files in a recipe: dense, quantized and distilled, exported, verified by the task's metric."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qatkit.pipeline.verify import read_verification
from qatkit.recipe.loading import load_recipe
from qatkit.run.exports import exports_of
from qatkit.run.folder import Run
from qatkit.tasks import METRICS, TASKS
from tests.cli.in_process import qatkit
from tests.data.files import houses, write_boxes, write_csv, write_images, write_masks, write_tones
from tests.support.matrix import representatives

RECIPE = """
name: any
seed: 1
model: {{factory: {model}}}
data: {{factory: {data}}}
trainer: {{accelerator: cpu}}
stages:
  dense: {{max_steps: {steps}, lr: 1.0e-2, batch_size: 16}}
  qat:
    max_steps: 10
    lr: 1.0e-3
    batch_size: 16
    distill: {{loss: {loss}, alpha: 0.5}}
    quantize: {{weight: {{num_bits: 8, strategy: channel}}}}
export: {{format: dense}}
"""
HALF = "val_fraction: 0.2, test_fraction: 0.2"
WAV2VEC2 = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, conv_dim: [16, 16], "
    "conv_kernel: [10, 8], conv_stride: [5, 4], num_feat_extract_layers: 2, num_conv_pos_embeddings: 16, "
    "num_conv_pos_embedding_groups: 2, classifier_proj_size: 16, mask_time_length: 2}"
)
Case = tuple[Callable[[Path], object], str, str, str, int, float]
CASES: dict[str, Case] = {  # files, model, data, loss, steps of the dense stage, and how good it must become
    "table_classification": (
        lambda folder: write_csv(folder / "houses.csv", houses()),
        '"qatkit.models:mlp", args: {in_features: 4, hidden: [16], num_classes: 2}',
        f'"qatkit.data:table_classification", args: {{source: {{path: houses.csv, {HALF}}}, classes: [cheap, dear], '
        "numeric: [size, age], categorical: {town: [north, south]}}",
        "kl", 60, 0.8,
    ),
    "table_regression": (
        lambda folder: write_csv(folder / "houses.csv", houses()),
        '"qatkit.models:mlp", args: {in_features: 4, hidden: [16], num_classes: 2}',
        f'"qatkit.data:table_regression", args: {{source: {{path: houses.csv, {HALF}}}, targets: [price, rent], '
        "numeric: [size, age], categorical: {town: [north, south]}}",
        "mse", 200, 0.6,
    ),
    "image_classification": (
        lambda folder: write_images(folder / "photos", ["cat", "dog"]),
        '"qatkit.models:cnn", args: {channels: [8, 8], in_channels: 3, size: 8, num_classes: 2}',
        f'"qatkit.data:image_classification", args: {{source: {{path: photos, {HALF}}}, images: {{size: 8}}}}',
        "kl", 40, 0.8,
    ),
    "image_multilabel": (
        lambda folder: write_masks(folder / "scenes"),
        '"qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 3}',
        f'"qatkit.data:image_multilabel", args: {{source: {{path: scenes/images.jsonl, {HALF}}}, '
        "classes: [top, left, red], images: {size: 8, grayscale: true, augment: false}}",
        "binary_kl", 40, 0.8,
    ),
    "image_segmentation": (
        lambda folder: write_masks(folder / "scenes"),
        '"tests.tasks.sets:pixel_net", args: {classes: 2}',
        f'"qatkit.data:image_segmentation", args: {{source: {{path: scenes/images.jsonl, {HALF}}}, '
        "classes: [dark, bright], images: {size: 8, grayscale: true}}",
        "kl", 60, 0.8,
    ),
    "audio_classification": (
        lambda folder: write_tones(folder / "tones", {"low": 300.0, "high": 1500.0}),
        f'"qatkit.models:untrained_model", args: {{family: wav2vec2, head: AudioClassification, config: {WAV2VEC2}, '
        "num_classes: 2}",
        f'"qatkit.data:audio_classification", args: {{source: {{path: tones, {HALF}}}, seconds: 0.1, '
        "sampling_rate: 8000}",
        "kl", 40, 0.8,
    ),
    "image_detection": (
        lambda folder: write_boxes(folder / "boxes"),
        '"qatkit.models:untrained_model", args: {family: yolos, head: ObjectDetection, num_classes: 2, config: {'
        "image_size: [16, 16], patch_size: 8, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
        "intermediate_size: 64, num_detection_tokens: 3}}",
        f'"qatkit.data:image_detection", args: {{source: {{path: boxes/boxes.jsonl, {HALF}}}, classes: [red, blue], '
        "images: {size: 16, augment: false}}",
        "kl", 300, 0.1,
    ),
}  # fmt: skip


DETECTOR = ["stages.dense.lr=3.0e-3", "stages.qat.lr=1.0e-5"]  # a transformer with two losses
EXCLUDED = {"audio_classification": "[wav2vec2.encoder.pos_conv_embed*]"}  # weight_norm computes its weight


@pytest.mark.parametrize("name", representatives([pytest.param(name, id=name) for name in CASES], {0, 5, 6}))
def test_a_recipe_trains_distils_exports_and_verifies_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write, model, data, loss, steps, bound = CASES[name]
    write(tmp_path)
    (tmp_path / "any.yaml").write_text(RECIPE.format(model=model, data=data, loss=loss, steps=steps))
    excluded = f"stages.qat.quantize.exclude={EXCLUDED.get(name, '[]')}"
    overrides = [excluded, *DETECTOR] if name == "image_detection" else [excluded]
    done = qatkit("run", "any.yaml", *overrides, "--out", "run", "--allow", "tests", cwd=tmp_path)
    assert done.code == 0, done.err
    run = Run(load_recipe(tmp_path / "any.yaml", overrides), tmp_path / "run", ["tests"])
    monkeypatch.chdir(tmp_path)
    task = TASKS[run.build_data(16).task]
    for exported in exports_of(run):
        stage = exported.stage
        value = run.record(stage).metrics[f"test/{task.metric}"]
        assert (value > bound) == METRICS[task.metric].higher_is_better, f"{stage}: {value}"
        verification = read_verification(run, exported)
        assert verification["passed"]
        assert (verification["task"], verification["agreement"]) == (task.name, 1.0)
        assert verification["trained_metric"] == pytest.approx(value, rel=1e-5)
