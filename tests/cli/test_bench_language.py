"""`qatkit bench` of causal language models: prefill, decode, time to first token and memory in each runtime."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qatkit.errors import QatkitError
from qatkit.pipeline.bench import lengths, read_decoding
from qatkit.pipeline.wandb_run import numbers_of
from qatkit.recipe.loading import load_recipe
from qatkit.report.decoding import Decoded, comparison
from qatkit.run.exports import exports_of
from qatkit.run.folder import Run
from tests.cli.in_process import qatkit

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
  dense: {max_steps: 2, batch_size: 4}
  int4:
    max_steps: 1
    batch_size: 4
    quantize: {weight: {num_bits: 4, strategy: group, group_size: 32, SCALES}, exclude: [lm_head]}
export: [FORMATS]
"""


def made(folder: Path, formats: str, scales: str = "scale_dtype: float32") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(RECIPE.replace("FORMATS", formats).replace("SCALES", scales))
    done = qatkit("run", "small.yaml", "--out", "run", "--quiet", "--no-report", cwd=folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("bench"), "{format: dense}, {format: sparse}")


@pytest.mark.slow
def test_prefill_and_decode_are_measured_beside_the_dense_model_and_the_rest_is_named(folder: Path) -> None:
    done = qatkit("bench", "run", "--prompt-tokens", "24", "--new-tokens", "4", "--json", cwd=folder)
    assert done.code == 0, done.err
    content = json.loads(done.out)
    measured = content["decoding"]
    assert (measured["prompt_tokens"], measured["new_tokens"]) == (24, 4)
    assert list(measured["files"]) == ["dense", "int4"]
    for file in measured["files"].values():
        assert file["runtime"] == "transformers"
        assert set(file["versions"]) == {"torch", "transformers"}
        for key in ("first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s"):
            low, median, high = file[key]
            assert 0 < low <= median <= high
        assert 24 / file["first_token_s"][1] == pytest.approx(file["prefill_tokens_per_s"][1], rel=0.5)
        assert file["peak_bytes"] > 0
        assert file["load_s"] > 0
    assert measured["files"]["int4"]["relative_to"] == "dense"
    assert set(measured["files"]["int4"]["speedup"]) == {"prefill", "decode"}
    assert content["not_measured"] == {
        f"{stage}/sparse": "PyTorch computes with the decoded weights, as fast as without pruning"
        for stage in ("dense", "int4")
    }


@pytest.mark.slow
def test_the_report_has_what_was_measured_until_a_file_changes(folder: Path) -> None:
    done = qatkit("bench", "run", "--prompt-tokens", "8", "--new-tokens", "3", cwd=folder)
    assert done.code == 0, done.err
    first, *_ = done.out.splitlines()
    assert first.removeprefix("SLOWER: ").startswith("speed of int4 relative to dense in transformers: prefill ")
    assert "not measured: int4/sparse: PyTorch computes" in done.out
    assert qatkit("report", "run", "--quiet", cwd=folder).code == 0
    text, page = ((folder / "run" / name).read_text() for name in ("report.md", "report.html"))
    assert "## Prefill and decode" in text
    assert "- A prompt of 8 tokens and 3 new tokens, one text at a time, 1 thread" in text
    assert "- int4 relative to dense: prefill " in text
    assert "<h2>Prefill and decode</h2>" in page
    rows = json.loads((folder / "run" / "report.json").read_text())["rows"]
    assert numbers_of(rows[1])["decode_tokens_per_s"] == rows[1]["decoding"]["decode_tokens_per_s"][1]
    run = Run(load_recipe(folder / "run" / "recipe.yaml"), folder / "run")
    exports = exports_of(run, "dense")
    assert list(read_decoding(run, exports)) == ["dense", "int4"]
    config = folder / "run" / "export" / "int4" / "dense" / "config.json"
    before = config.read_text()
    config.write_text(before + " ")
    assert list(read_decoding(run, exports)) == ["dense"]
    config.write_text(before)


def test_options_without_effect_and_texts_that_do_not_fit_are_refused(folder: Path) -> None:
    done = qatkit("bench", "run", "--batch", "1", cwd=folder)
    assert (done.code, done.err) == (
        2,
        "error: --batch: has no effect, because the run has no exports of onnx or openvino; omit it\n",
    )
    done = qatkit("bench", "run", "--prompt-tokens", "130", cwd=folder)
    assert done.code == 2
    assert "--prompt-tokens: 130 prompt tokens and 2 new tokens do not fit into the model's context of 128" in done.err
    with pytest.raises(QatkitError, match="--new-tokens: 1 prompt tokens and 66 new tokens do not fit"):
        lengths(None, 66, 66)


def decoded(first: float, rest: float, size: int, peak: int | None) -> Decoded:
    return Decoded("transformers", {}, size, 0.1, peak, 8, 3, np.full(9, first), np.full(9, rest))


def test_a_slower_file_is_said_first() -> None:
    files = {"dense": decoded(1, 1, 400, 800), "a": decoded(0.5, 0.5, 100, 200), "b": decoded(1, 2, 100, None)}
    assert comparison(files, {"a": "dense", "b": "dense"}) == [
        "SLOWER: speed of b relative to dense in transformers: prefill 1.00x (1.00 to 1.00), decode 0.50x (0.50 to "
        "0.50); size: 0.25x",
        "speed of a relative to dense in transformers: prefill 2.00x (2.00 to 2.00), decode 2.00x (2.00 to 2.00); "
        "size: 0.25x; peak memory: 0.25x",
    ]
    assert files["a"].prefill()[1] == 8 / 0.5
    assert files["a"].decode()[1] == 2 / 0.5, "the first new token belongs to the prefill"


@pytest.mark.slow
def test_every_runtime_for_language_models_is_measured(tmp_path: Path) -> None:
    formats = ["compressed_tensors", "torchao", "onnx_genai", "openvino_genai"]
    out = made(tmp_path / "all", ", ".join(f"{{format: {name}}}" for name in formats))
    done = qatkit("bench", "run", "--prompt-tokens", "16", "--new-tokens", "3", "--json", cwd=out)
    assert done.code == 0, done.err
    content = json.loads(done.out)
    names = {"int4", "int4/torchao", "int4/onnx_genai", "int4/openvino_genai"}
    assert names == {name for name, file in content["decoding"]["files"].items() if "speedup" in file}
    assert content["not_measured"] == {}


@pytest.mark.slow
def test_a_runtime_in_its_own_environment_is_measured_or_named(tmp_path: Path) -> None:
    out = made(tmp_path / "mlx", "{format: dense}, {format: mlx}", "scale_dtype: float16")
    python = os.environ.get("QATKIT_MLX")
    arguments = ["--python", python] if python else []
    done = qatkit("bench", "run", "--prompt-tokens", "16", "--new-tokens", "3", "--json", *arguments, cwd=out)
    assert done.code == 0, done.err
    content = json.loads(done.out)
    names = {"int4", *(["int4/mlx"] if python else [])}
    assert names == {name for name, file in content["decoding"]["files"].items() if "speedup" in file}
    assert set(content["not_measured"]) == (set() if python else {"dense/mlx", "int4/mlx"})
    if not python:
        assert "run `qatkit environment mlx FOLDER`, pass --python" in content["not_measured"]["int4/mlx"]
