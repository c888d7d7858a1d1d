"""Recipes whose stages learn from the cache of a teacher, and how a teacher is held."""

from __future__ import annotations

import logging
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qatkit import QatkitError
from qatkit.cli.main import app
from qatkit.distillation.manifest import read_manifest
from qatkit.models import llama
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.teacher_cache import cache_folder, open_cache, write_cache
from qatkit.pipeline.validation import validate_recipe
from qatkit.pipeline.vocabulary import vocabulary
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.cli.in_process import qatkit as command
from tests.data.corpus import SENTENCES, save_tokenizer, write_lines
from tests.support import warm

TEXT = """\
name: cached
model:
  factory: "qatkit.models:llama"
  args: {vocab_size: 300, hidden: 32, layers: 2, heads: 2, kv_heads: 1, intermediate: 64, context: 16}
data:
  factory: "qatkit.data:stdlib_text"
  args: {vocab_size: 300, context: 16, include: ["email/*"], val_fraction: 0.2, test_fraction: 0.1, epoch_batches: 5}
trainer: {accelerator: cpu, devices: 1}
stages:
  dense: {max_steps: 20, batch_size: 16, lr: 5e-3}
  qat:
    max_steps: 10
    batch_size: 16
    distill: {temperature: 2.0, alpha: 0.8, cache: {top_k: 64}}
    quantize: {weight: {num_bits: 4, strategy: channel}, exclude: [lm_head]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("cached")
        (folder / "recipe.yaml").write_text(TEXT)
        run_stages(start(folder / "run", folder), until="dense")
        yield folder


def start(out: Path, folder: Path, *overrides: str) -> Run:
    return Run(load_recipe(folder / "recipe.yaml", list(overrides)), out)


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    """A run whose dense stage is finished."""
    shutil.copytree(folder / "run", tmp_path / "run")
    return tmp_path / "run"


def test_the_command_writes_the_cache_and_the_run_trains_from_it_with_no_teacher_in_memory(
    out: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = CliRunner().invoke(app, ["cache-teacher", str(folder / "recipe.yaml"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "stage qat: 160 samples, 2,560 tokens" in done.output
    run = start(out, folder)
    # beside the 258 bytes that it costs at 300 classes, a token has its share of keys and of what Arrow says of a file
    size = sum(path.stat().st_size for path in cache_folder(run, "qat").glob("*.arrow"))
    assert size / 2560 <= 350

    def no_teacher(*args: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("qatkit.stages.distill.teacher", no_teacher)
    assert run_stages(run) == ["qat"]


def test_from_the_cache_a_stage_trains_as_with_the_live_teacher(out: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "live")
    cached, live = start(out, folder), start(tmp_path / "live", folder, "stages.qat.distill.cache=null")
    for run in (cached, live):
        run_stages(run)
    assert (cached.record("qat").metrics["test/loss"]) == pytest.approx(
        live.record("qat").metrics["test/loss"], rel=5e-3
    )
    assert cache_folder(cached, "qat").is_dir()
    assert not (live.out / "teachers").exists()


def test_of_a_stream_the_cache_holds_all_that_the_stage_reads_of_it_in_however_many_epochs(tmp_path: Path) -> None:
    records = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES])
    source = f"{{path: {records}, val: {records}, test: {records}, streaming: true}}"
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "recipe.yaml").write_text(TEXT)
    run = start(
        tmp_path / "run", tmp_path, "data.factory=qatkit.data:causal_text", "stages.dense.max_steps=1",
        f"data.args={{source: {source}, tokenizer: {tokenizer}, context: 16, epoch_batches: 2}}",
        "stages.qat.max_steps=5", "stages.qat.batch_size=4", "stages.qat.quantize.calibration_batches=3",
        "stages.qat.quantize.activation={num_bits: 8, strategy: tensor}",
    )  # fmt: skip
    assert run_stages(run) == ["dense", "qat"]
    assert len(open_cache(run, "qat")[0]) <= 4 * (5 + 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.args.context=8", r"data\.args\.context: was 16, is now 8"),
        ("stages.qat.distill.temperature=1.0", r"temperature: was 2\.0, is now 1\.0"),
        ("stages.qat.distill.cache.top_k=32", "top_k: was 64, is now 32"),
        ("stages.qat.max_steps=12", "samples: was 160 in the order of seed 0, is now 192 in the order of seed 0"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_what_changed(
    out: Path, folder: Path, override: str, message: str
) -> None:
    write_cache(start(out, folder), "qat")
    with pytest.raises(QatkitError, match=message):
        write_cache(start(out, folder, override), "qat")


def test_a_changed_teacher_is_refused(out: Path, folder: Path) -> None:
    run = start(out, folder)
    write_cache(run, "qat")
    weights = run.folder("dense") / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(QatkitError, match=r"model\.safetensors has changed since stage .dense. was finished"):
        open_cache(run, "qat")


def test_missing_parts_are_named_with_the_command_that_makes_them(out: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=r"no cache in .*; run `qatkit cache-teacher RECIPE --out"):
        open_cache(start(out, folder), "qat")
    with pytest.raises(QatkitError, match=r"'dense', is not finished.*--until dense` first"):
        write_cache(start(tmp_path / "empty", folder), "qat")
    refused = command("cache-teacher", str(folder / "recipe.yaml"), "stages.qat.distill.cache=null", cwd=tmp_path)
    assert "no stage of ['dense', 'qat'] uses a teacher cache" in refused.err


def test_a_cache_shorter_than_the_data_is_refused_by_the_first_sample_that_it_lacks(out: Path, folder: Path) -> None:
    run = start(out, folder)
    cache = write_cache(run, "qat")
    whole = read_manifest(cache)
    short = start(out, folder, "stages.qat.max_steps=4")
    shutil.rmtree(cache)
    write_cache(short, "qat")
    cut = read_manifest(cache)
    assert whole is not None
    assert cut is not None
    replace(cut, fingerprint=whole.fingerprint).write(cache)
    with pytest.raises(QatkitError, match=r"in a batch are not among the 64 in .*: the cache is shorter than the data"):
        run_stages(run)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_teacher_in_few_bits_teaches_nearly_the_same(out: Path, folder: Path, tmp_path: Path, bits: int) -> None:
    overrides = ["stages.qat.distill.cache=null", "stages.qat.max_steps=2"]
    shutil.copytree(out, tmp_path / "whole")
    few = start(out, folder, *overrides, f"stages.qat.distill.teacher_bits={bits}")
    whole = start(tmp_path / "whole", folder, *overrides)
    losses = []
    for run in (few, whole):
        run_stages(run)
        losses.append(run.record("qat").metrics["test/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]


def test_hidden_states_come_from_the_cache_where_the_recipe_compares_them(out: Path, folder: Path) -> None:
    run = start(out, folder, "stages.qat.distill.hidden={layers: {model.layers.0: model.layers.1}, loss: cosine}")
    write_cache(run, "qat")
    cached, _ = open_cache(run, "qat")
    teacher = run.load_model("dense").eval()
    rows = next(iter(run.build_data(16).train_dataloader()))
    seen: list[Any] = []
    teacher.get_submodule("model.layers.1").register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        teacher(rows["input_ids"])
    state = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    found = cached.outputs_for((), {"input_ids": rows["input_ids"]}).hidden["model.layers.1"]
    torch.testing.assert_close(found, state, rtol=2e-3, atol=2e-3)
    run_stages(run)


@pytest.mark.slow
def test_globs_name_the_layers_that_are_cached_and_compared(out: Path, folder: Path) -> None:
    run = start(
        out,
        folder,
        "stages.qat.shrink={layers: 1}",
        "stages.qat.max_steps=2",
        "stages.qat.distill.hidden={layers: {'model.layers.*': 'model.layers.*'}, loss: cosine}",
        "stages.qat.distill.attention={layers: {'model.layers.*.self_attn.v_proj': 'model.layers.*.self_attn.v_proj'}, "
        "heads: 2, weight: 10}",
    )
    validate_recipe(run.recipe)
    write_cache(run, "qat")
    held, _ = open_cache(run, "qat")
    assert sorted(held.layers) == [
        "model.layers.1",
        "model.layers.1.self_attn.v_proj",
    ]  # the last of two, for the one kept
    run_stages(run)


def test_a_process_that_waits_for_a_cache_ends_with_the_one_that_was_to_write_it(tmp_path: Path) -> None:
    # the first process starts the second, as Lightning does, and fails
    code = (
        "import os, sys, time; from pathlib import Path; from qatkit.pipeline.teacher_cache import wait_for\n"
        "waits, waiting = os.pipe()\n"
        "if os.fork():\n    os.read(waits, 1); os._exit(0)\n"
        "sleep = time.sleep\ntime.sleep = lambda seconds: (os.write(waiting, b'.'), sleep(seconds))\n"
        f"try:\n    wait_for(Path({str(tmp_path / 'none')!r}))\n"
        f"except ValueError as error:\n    Path({str(tmp_path / 'said')!r}).write_text(str(error))\n"
    )
    subprocess.run([warm.python(), "-c", code], check=True)
    while not ((tmp_path / "said").exists() and (tmp_path / "said").read_text()):
        time.sleep(0.05)
    assert "rank 0 ended before" in (tmp_path / "said").read_text()


def test_models_of_different_tokenizers_are_refused_by_both_names_and_sizes(out: Path, folder: Path) -> None:
    run = start(out, folder)
    data = run.build_data(16)
    student, teacher = llama(300, 16, 1, 2, 1, 16, 16), llama(310, 16, 1, 2, 1, 16, 16)
    ours = out / "ours"
    data.tokenizer.save_pretrained(ours)
    student.config._name_or_path = teacher.config._name_or_path = str(ours)
    assert vocabulary(student, teacher, data, "qat") == 300
    assert vocabulary(student, student, data, "qat") is None
    other = data.tokenizer
    other.add_tokens(["<one more>"])
    other.save_pretrained(out / "theirs")
    teacher.config._name_or_path = str(out / "theirs")
    with pytest.raises(QatkitError, match=r"stages\.qat\.distill\.teacher: .*ours', 300 tokens.*theirs', 301 tokens"):
        vocabulary(student, teacher, data, "qat")


def test_more_classes_than_there_are_cannot_be_kept(out: Path, folder: Path) -> None:
    with pytest.raises(QatkitError, match=r"stages\.qat\.distill\.cache\.top_k: 300 is out of range .* 1 to 299"):
        write_cache(start(out, folder, "stages.qat.distill.cache.top_k=300"), "qat")


@pytest.mark.slow
def test_padded_vocabularies_are_trimmed_with_one_line_and_other_tokenizers_refused(
    out: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = (
        'stages.qat.model={factory: "qatkit.models:llama", args: {vocab_size: 320, hidden: 32, layers: 1, heads: 2, '
        "kv_heads: 1, intermediate: 64, context: 16}}"
    )
    for cache in ("null", "{top_k: 64}"):
        run = start(out.with_name(f"trimmed{cache[0]}"), folder, student, f"stages.qat.distill.cache={cache}")
        shutil.copytree(out, run.out)
        with caplog.at_level(logging.INFO, "qatkit.distillation.vocabulary"):
            run_stages(run)
    lines = [record for record in caplog.records if "trimmed to 300 tokens" in record.message]
    assert len(lines) == 1
