"""Every task from a recipe: dense, then quantized and distilled, exported and verified with the metric of the task."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from qatkit import QatkitError
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from qatkit.tasks import METRICS, TASKS
from tests.cli.in_process import qatkit
from tests.support.matrix import representatives

RECIPE = """
name: any
seed: 1
model: {{factory: "tests.tasks.sets:{model}", args: {args}}}
data: {{factory: "tests.tasks.sets:{data}"}}
trainer: {{accelerator: cpu}}
stages:
  dense: {{max_steps: 150, lr: 1.0e-2, batch_size: 32}}
  qat:
    max_steps: 20
    lr: 1.0e-3
    batch_size: 32
    distill: {{loss: {loss}, alpha: 0.5}}
    quantize: {{weight: {{num_bits: 8, strategy: channel}}}}
export: {{format: dense}}
"""
Case = tuple[str, str, str, str, float]
CASES: list[Case] = [  # model, its arguments, data, loss, and how good the dense model must become
    ("dense_net", "{outputs: 3}", "labels", "binary_kl", 0.8),
    ("dense_net", "{outputs: 2}", "values", "mse", 0.5),
    ("pixel_net", "{}", "pixels", "kl", 0.8),
    ("bert", "{head: ForTokenClassification}", "words", "kl", 0.9),
    ("bert", "{head: ForQuestionAnswering}", "spans", "kl", 0.9),
    ("t5", "{}", "counts", "jsd", 3.0),
    ("bert", "{head: Model}", "partners", "cosine", 0.9),
    ("bert", "{head: Model}", "partners", "similarity", 0.9),
]


def run_of(case: Case, folder: Path, *overrides: str) -> Run:
    model, args, data, loss, _ = case
    (folder / "any.yaml").write_text(RECIPE.format(model=model, args=args, data=data, loss=loss))
    # T5's output layer is tied to its embeddings, which stay unquantized
    untied = ["stages.qat.quantize.exclude=[lm_head]"] if model == "t5" else []
    return Run(load_recipe(folder / "any.yaml", [*untied, *overrides]), folder / "run", ["tests"])


@pytest.mark.parametrize(
    "case", representatives([pytest.param(case, id=f"{case[2]} {case[3]}") for case in CASES], {0, 2, 4, 6})
)
def test_a_task_is_trained_distilled_exported_and_verified(case: Case, tmp_path: Path) -> None:
    run = run_of(case, tmp_path)
    validate_recipe(run.recipe, ["tests"])
    run_stages(run)
    export_run(run)
    task = TASKS[run.build_data(32).task]
    metric = METRICS[task.metric]
    for name, checked in verify_run(run).items():
        assert checked.passed, checked.summary()
        assert (checked.task, checked.metric, checked.agreement) == (task.name, task.metric, 1.0)
        value = run.record(name).metrics[f"test/{task.metric}"]
        assert checked.trained_metric == pytest.approx(value, rel=1e-6)
        assert (value > case[4]) == metric.higher_is_better, f"{name}: {value}"
    report_run(run)
    assert f"test {metric.name}" in (run.out / "report.md").read_text()


INT8 = "quantize={weight: {num_bits: 8}, activation: {num_bits: 8, symmetric: false, strategy: tensor}, exclude: %s}"
ONNX = [
    (CASES[2], "[]", ["batch", 1, "height", "width"]),
    (CASES[3], "['*embeddings*']", ["batch", "sequence"]),
    (CASES[4], "['*embeddings*']", ["batch", "sequence"]),
    (CASES[5], "[shared, '*embed_tokens', '*relative_attention_bias', lm_head]", ["batch", "sequence"]),
    (CASES[6], "['*embeddings*']", ["batch", "sequence"]),
]


@pytest.mark.parametrize(
    ("case", "exclude", "dims"), representatives([pytest.param(*c, id=c[0][2]) for c in ONNX], {1})
)
def test_a_task_is_exported_to_onnx_with_named_inputs_and_dynamic_sizes(
    case: Case, exclude: str, dims: list[object], tmp_path: Path
) -> None:
    short = ["export.format=onnx", "stages.dense.max_steps=30", f"stages.qat.{INT8 % exclude}"]
    run = run_of(case, tmp_path, *short)
    validate_recipe(run.recipe, ["tests"])
    run_stages(run)
    for path in export_run(run):
        inputs = onnx.load(path).graph.input
        assert [dim.dim_param or dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] == dims
    for name, checked in verify_run(run).items():
        assert checked.passed, checked.summary()
        assert checked.weights > 0 or name == "dense"
    report = report_run(run)
    kernel = "MatMulIntegerToFloat" if "sequence" in dims else "QLinearConv"
    assert kernel in report["rows"][-1]["kernels"]["integer"]


@pytest.mark.parametrize(
    ("case", "loss", "message"),
    [
        (CASES[0], "kl", r"'kl' compares classes, but the outputs of this task are labels; use mse, binary_kl$"),
        (CASES[1], "kl", r"the outputs of this task are values; use mse$"),
        (CASES[2], "cosine", r"'cosine' compares embeddings, but the outputs of this task are classes; use kl, "),
        (CASES[6], "kl", r"the outputs of this task are embeddings; use mse, cosine, similarity$"),
    ],
)
def test_a_loss_that_does_not_compare_the_outputs_of_the_task_is_refused_before_training(
    case: Case, loss: str, message: str, tmp_path: Path
) -> None:
    run = run_of(case, tmp_path, f"stages.qat.distill.loss={loss}")
    with pytest.raises(QatkitError, match=rf"^stages\.qat\.distill\.loss: .*{message}"):
        validate_recipe(run.recipe, ["tests"])


def test_a_file_that_cannot_hold_a_weight_tied_to_an_unquantized_one_is_refused_before_training(tmp_path: Path) -> None:
    run = run_of(CASES[5], tmp_path, "stages.qat.quantize.exclude=[]")
    with pytest.raises(QatkitError, match=r"'shared\.weight' and 'lm_head\.weight' share one tied weight"):
        validate_recipe(run.recipe, ["tests"])


@pytest.mark.parametrize(("case", "metric"), [(CASES[0], "f1"), (CASES[1], "rmse")])
def test_the_command_judges_by_the_metric_of_the_task(case: Case, metric: str, tmp_path: Path) -> None:
    run = run_of(case, tmp_path)
    short = ["stages.dense.max_steps=6", "stages.qat.max_steps=6"]
    done = qatkit("run", "any.yaml", *short, "--out", "run", "--allow", "tests", cwd=tmp_path)
    assert done.code == 0, done.err
    value = METRICS[metric].show(run.record("qat").metrics[f"test/{metric}"])
    assert f", test {metric} {value}\n" in done.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{METRICS[metric].title} versus size" in page
