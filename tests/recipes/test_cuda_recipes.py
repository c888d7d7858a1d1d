"""Recipes trained on a GPU: what they export is verified as what was trained on the CPU is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.cli.test_cli import SHORT
from tests.recipes.test_lora_recipes import SMALL as SMALL_LORA
from tests.recipes.test_sparse_int4_recipe import SMALL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = "trainer.accelerator=gpu"
MIXED = "trainer.precision=bf16-mixed"


@pytest.fixture(autouse=True)
def _one_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cuda_recipes"))


def trained(name: str, folder: Path, *overrides: str) -> Run:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    recipe = load_recipe(name, overrides)
    validate_recipe(recipe)
    run = Run(recipe, folder)
    assert run_stages(run) == list(recipe.stages)
    assert torch.cuda.max_memory_allocated() > before
    return run


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (MIXED,),
        (MIXED, "stages.int4.distill.teacher_bits=8"),
        (MIXED, "stages.int4.distill.teacher_bits=4"),
        (MIXED, "stages.int4.distill.cache={top_k: 16}"),
        (MIXED, "stages.int4.optimizer=adamw8bit", "stages.sparse24.optimizer=paged_adamw"),
        (MIXED, "stages.int4.quantize.init=awq"),
        ("trainer.precision=16-mixed", "stages.sparse24.prune.method=wanda"),
    ],
    ids=lambda overrides: ", ".join(overrides) or "float32",
)
def test_pruned_taught_and_quantized_it_ships_exactly_what_was_trained(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    run = trained("llm/sparse24_kd_int4", tmp_path, *SMALL, GPU, *overrides)
    export_run(run)
    for stage, check in verify_run(run).items():
        assert check.passed, (stage, check.failures)
        assert check.mean_error == 0.0
    weights = load_file(run.folder("int4") / "model" / "model.safetensors")
    zeros = run.record("int4").zeros
    assert len(zeros) == 2 * 7
    for name in zeros:
        assert ((weights[f"{name}.weight"] != 0).view(-1, 4).sum(-1) <= 2).all(), name
    loss = {stage: run.record(stage).metrics["test/loss"] for stage in run.rows}
    assert loss["sparse24"] < loss["magnitude24"]
    assert loss["int4"] < loss["one_shot"]
    assert [row["stage"] for row in report_run(run)["rows"]] == run.rows


@pytest.mark.parametrize("name", ["qlora", "qlora_merge_int4", "int4_qat_lora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_over_few_bits_are_merged_into_what_is_shipped(name: str, bits: int, tmp_path: Path) -> None:
    small = [*SMALL_LORA, GPU, MIXED]
    for stage, config in load_recipe(f"llm/{name}").stages.items():
        small += [f"stages.{stage}.max_steps={min(config.max_steps, 6)}", f"stages.{stage}.batch_size=16"]
        small += [f"stages.{stage}.quantize.weight.group_size=16"] if config.quantize else []
        small += [f"stages.{stage}.lora.bits={bits}"] if config.lora and config.lora.bits else []
    run = trained(f"llm/{name}", tmp_path, *small)
    export_run(run)
    for stage, check in verify_run(run).items():
        assert check.passed, (stage, check.failures)
        assert check.mean_error == 0.0


@pytest.mark.parametrize("name", ["digits_int8", "digits_int4"])
def test_the_command_line_takes_the_gpu_by_itself_and_onnx_runtime_computes_what_was_trained(
    name: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "from qatkit.cli.main import main; main()", "run", f"vision/{name}", *SHORT]
    done = subprocess.run(
        [*command, "--out", "run"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"LIGHTNING_LOG_LEVEL": "INFO"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["verification"]["passed"] for row in report["rows"]] == [True] * 3
