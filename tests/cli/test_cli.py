"""The command line as a user meets it: real processes, exit codes, one message per mistake."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from itertools import takewhile
from pathlib import Path

import onnx
import pytest

from qatkit.recipe.loading import list_recipes
from tests.data.corpus import SENTENCES, save_tokenizer, write_lines
from tests.support import warm
from tests.support.matrix import representatives

SHORT = ["stages.dense.max_steps=30", "stages.qat.max_steps=20", "model.args.channels=[8,8]"]
TEXTS = """name: texts
model:
  factory: "qatkit.models:llama"
  args: {vocab_size: 300, hidden: 16, layers: 1, heads: 2, kv_heads: 1, intermediate: 16, context: 16}
data:
  factory: "qatkit.data:causal_text"
  args:
    source: {path: texts.jsonl, val_fraction: 0.1, test_fraction: 0.1}
    tokenizer: tokenizer
    context: 16
stages:
  dense: {max_steps: 2, batch_size: 4}
"""


def qatkit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([warm.qatkit(), *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    done = qatkit("run", "vision/digits_int8", *SHORT, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "stage qat: trained in" in done.stdout
    assert "report: run/report.md" in done.stdout
    return folder / "run"


def test_a_run_ends_with_exports_verifications_and_a_report(run: Path) -> None:
    for stage in ("dense", "ptq", "qat"):
        assert (run / "export" / stage / "onnx" / "model.onnx").is_file()
        assert json.loads((run / "export" / stage / "onnx" / "verification.json").read_text())["passed"]
    report = json.loads((run / "report.json").read_text())
    assert [(row["stage"], row["kind"]) for row in report["rows"]] == [
        ("dense", "dense"),
        ("ptq", "post-training"),
        ("qat", "trained"),
    ]
    assert "| qat | trained w7a8 |" in (run / "report.md").read_text()


def test_output_that_is_not_a_terminal_has_no_bars_and_no_escape_codes(run: Path) -> None:
    done = qatkit("report", run.name, cwd=run.parent)
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr


def test_json_is_the_report_alone_and_quiet_is_silent(run: Path) -> None:
    done = qatkit("report", run.name, "--json", cwd=run.parent)
    assert json.loads(done.stdout)["rows"][2]["stage"] == "qat"
    assert json.loads(qatkit("verify", run.name, "--json", cwd=run.parent).stdout)["qat"]["passed"] is True
    assert qatkit("report", run.name, "--quiet", cwd=run.parent).stdout == ""


def test_a_terminal_sees_a_bar_for_each_stage_with_metrics(tmp_path: Path) -> None:
    command = [warm.qatkit(), "run", "vision/digits_int4", *SHORT, "--until", "ptq"]
    master, slave = pty.openpty()
    size = struct.pack("HHHH", 40, 160, 0, 0)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=slave, stderr=slave, env=os.environ | {"TERM": "xterm"})
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):  # what a closed terminal answers
        while chunk := os.read(master, 4096):
            seen += chunk
    assert process.wait() == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen).decode()
    assert re.search(r"stage dense \(1 of 3\) .* \d+/30 train/loss \d\.\d{4}", text)


def test_a_tampered_file_fails_verify_with_exit_code_1_and_the_layer(run: Path) -> None:
    path = run / "export" / "qat" / "onnx" / "model.onnx"
    kept = path.read_bytes()
    model = onnx.load(path)
    codes = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("conv2.weight.codes"))
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
    onnx.save(model, path)
    done = qatkit("verify", run.name, cwd=run.parent)
    path.write_bytes(kept)
    assert done.returncode == 1
    assert "qat: FAILED" in done.stdout
    assert "conv2" in done.stdout
    assert qatkit("verify", run.name, cwd=run.parent).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "vision/digits_int5"), "did you mean 'vision/digits_int"),
        (("run", "vision/digits_int4", "stages.qat.lrr=1"), "stages.qat.lrr: unknown key"),
        (("run", "vision/digits_int4", "stages.qat.quantize.include=[conv9]"), "'conv9' matches no layer"),
        (("run", "vision/digits_int4", "--until", "end"), "--until: 'end' is not a stage"),
        (("run", "vision/digits_int4", "model.factory=qatkit.cli.main:subprocess.run"), "model.factory"),
        (("run", "vision/digits_int4", "model.factory=os:system"), "model.factory"),
        (("validate", "vision/digits_int4", "seed=${oc.env:HOME}"), "seed"),
        (("run", "vision/digits_int4", "--skip-bad"), "--skip-bad: qatkit.data:digits has no data.args.source"),
        (("validate", "vision/digits_int4", "--skip-bad"), "--skip-bad: qatkit.data:digits has no data.args.source"),
        (("verify", "nowhere"), "nowhere: is not a run folder"),
        (("show", "vision/digits"), "vision/digits"),
        (("plan", "vision/digits_int4"), "has no config with the number of layers and heads"),
    ],
)
def test_a_mistake_is_one_message_with_exit_code_2_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = qatkit(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 20
    assert list(tmp_path.iterdir()) == []


def test_skip_bad_trains_on_the_records_that_can_be_used_and_says_how_many_were_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tokenizer(tmp_path / "tokenizer")
    write_lines(tmp_path / "texts.jsonl", ["{", *({"text": text} for text in SENTENCES)])
    (tmp_path / "texts.yaml").write_text(TEXTS)
    refused = qatkit("run", "texts.yaml", "--out", "run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "texts.jsonl:1: is not JSON" in refused.stderr
    assert qatkit("validate", "texts.yaml", "--skip-bad", cwd=tmp_path).returncode == 0
    done = qatkit("run", "texts.yaml", "--skip-bad", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"skipped 1 of {len(SENTENCES) + 1} records; first: texts.jsonl:1: is not JSON" in done.stderr
    again = qatkit("run", "texts.yaml", "data.args.source.skip_bad=true", "--out", "run", cwd=tmp_path)
    assert "stage dense: already finished" in again.stdout, "the override is the same recipe"


@pytest.mark.parametrize("name", representatives(list_recipes(), {7, 12}))
def test_every_shipped_recipe_is_valid_and_says_what_it_costs(name: str, tmp_path: Path) -> None:
    assert qatkit("validate", name, cwd=tmp_path).returncode == 0
    lines = qatkit("show", name, cwd=tmp_path).stdout.splitlines()
    header = list(takewhile(lambda line: line.startswith("# "), lines))
    assert header.index(f"# Command: qatkit run {name}") > 0  # after what it does
    assert sum(line.startswith("# Cost: ") for line in header) == 1


@pytest.mark.parametrize("strategy", representatives(["ddp", "fsdp2"], {0}))
def test_the_demo_recipe_runs_on_two_processes_and_only_the_first_one_writes(strategy: str, tmp_path: Path) -> None:
    warm.with_peers()
    parallel = ["trainer.accelerator=cpu", "trainer.devices=2", f"trainer.strategy={strategy}"]
    done = qatkit("run", "vision/digits_int4", *SHORT, *parallel, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage qat: trained in") == 1
    assert (tmp_path / "run" / "report.md").is_file()
    again = qatkit("run", "vision/digits_int4", *SHORT, *parallel, "--out", "run", cwd=tmp_path)
    assert again.stdout.count("already finished") == 3, again.stdout
