"""`qatkit generate`: the text of every format is the one that the trained model continues with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from qatkit.cli.main import app
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.support import warm

RECIPE = """\
name: small
model:
  factory: "qatkit.models:llama"
  args: {vocab_size: 300, hidden: 64, layers: 1, heads: 2, kv_heads: 1, intermediate: 96, tie_embeddings: false}
data:
  factory: "qatkit.data:stdlib_text"
  args: {vocab_size: 300, context: 32, include: ["email/i*", "email/m*"], val_fraction: 0.2, test_fraction: 0.2}
trainer: {accelerator: cpu, devices: 1}
stages:
  int4: {max_steps: 30, batch_size: 4, lr: 3.0e-3, quantize: {scheme: Q4_0, exclude: [lm_head]}}
export: [{format: dense}, {format: gguf}, {format: onnx_genai}, {format: sparse}]
"""
PROMPT = "import the"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("generate")
    (folder / "small.yaml").write_text(RECIPE)
    arguments = ["run", str(folder / "small.yaml"), "--out", str(folder / "run"), "--quiet", "--no-report"]
    with warm.children():  # the model builder of onnxruntime-genai is a process of its own
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder / "run"


def generated(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["generate", *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("form", ["dense", "gguf", "onnx_genai"])
def test_the_text_is_that_of_the_trained_model(out: Path, form: str) -> None:
    run = Run(load_recipe(out / "recipe.yaml"), out)
    tokenizer = AutoTokenizer.from_pretrained(out / "export" / "int4" / "dense")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = run.load_model("int4").eval().generate(ids, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    code, output = generated(str(out), "--prompt", PROMPT, "--format", form, "--tokens", "12")
    assert code == 0, output
    assert output == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"


def test_what_cannot_generate_is_refused_with_what_can(out: Path) -> None:
    code, output = generated(str(out), "--prompt", PROMPT, "--format", "sparse")
    assert code != 0
    assert "--format: 'sparse' files do not generate text; use dense, compressed_tensors, gguf" in output
    code, output = generated(str(out), "--prompt", PROMPT, "--format", "mlx")
    assert code != 0
    assert "the run has no 'mlx' files; use dense or gguf or onnx_genai or sparse, or run `qatkit export" in output
    code, output = generated(str(out), "--prompt", PROMPT, "--stage", "int8")
    assert code != 0
    assert "--stage: unknown stage 'int8'; did you mean 'int4'?" in output


def test_a_prompt_that_does_not_fit_is_one_error(out: Path) -> None:
    code, output = generated(str(out), "--prompt", "a b c d e f g " * 80, "--format", "onnx_genai")
    assert code != 0
    assert "onnxruntime-genai failed" in output
    assert "use a shorter prompt or fewer tokens" in output


@pytest.mark.slow
@pytest.mark.skipif("QATKIT_MLX" not in os.environ, reason="QATKIT_MLX names no interpreter with MLX")
def test_mlx_writes_the_same_text(out: Path) -> None:
    assert CliRunner().invoke(app, ["export", str(out), "--format", "mlx"]).exit_code == 0
    code, output = generated(str(out), "--prompt", PROMPT, "--format", "mlx", "--tokens", "12")
    assert code != 0
    assert "run `qatkit environment mlx FOLDER`" in output
    python = os.environ["QATKIT_MLX"]
    code, output = generated(str(out), "--prompt", PROMPT, "--format", "mlx", "--tokens", "12", "--python", python)
    assert output == generated(str(out), "--prompt", PROMPT, "--tokens", "12")[1]
