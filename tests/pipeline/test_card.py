"""The model card beside every exported file: metadata, code that runs, and the numbers of the verification."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from qatkit.cli.main import app
from qatkit.export.formats import FORMATS
from qatkit.export.usage import USAGES
from tests.support import warm
from tests.support.hub_server import COMMIT, TOKEN, hub

RECIPE = """\
name: small
model:
  factory: "qatkit.models:llama"
  args: {vocab_size: 300, hidden: 64, layers: 1, heads: 2, kv_heads: 1, intermediate: 96}
data:
  factory: "qatkit.data:stdlib_text"
  args: {vocab_size: 300, context: 32, include: ["email/i*", "email/m*"], val_fraction: 0.2, test_fraction: 0.2}
trainer: {accelerator: cpu, devices: 1}
stages:
  dense: {max_steps: 2, batch_size: 4, lr: 1.0e-3}
  int8: {max_steps: 2, batch_size: 4, lr: 1.0e-3, quantize: {weight: {num_bits: 8}, exclude: [lm_head]}}
export: [{format: compressed_tensors}, {format: sparse}]
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("card")
    (folder / "small.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["run", str(folder / "small.yaml"), "--out", str(folder / "run"), "--quiet"])
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_a_card_has_the_metadata_of_hubs_and_the_numbers_of_the_verification(out: Path) -> None:
    folder = out / "export" / "int8" / "compressed_tensors"
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qatkit", "compressed_tensors"],
    }
    check = json.loads((folder / "verification.json").read_text())
    dense = json.loads((folder.parent.parent / "dense" / "compressed_tensors" / "verification.json").read_text())
    assert "|  | `dense` | `int8` |" in card.text
    row = re.search(r"\| test perplexity in PyTorch \| ([\d.]+) \| ([\d.]+) \|", card.text)
    assert row is not None
    assert [float(value) for value in row.groups()] == pytest.approx(
        [dense["trained_metric"], check["trained_metric"]], rel=1e-3
    )
    assert "computes what training computed." in card.text
    assert (out / "recipe.yaml").read_text().strip() in card.text


def test_the_code_of_a_card_runs_in_the_folder(out: Path) -> None:
    folder = out / "export" / "int8" / "compressed_tensors"
    code = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    command = [warm.python(), "-c", f"{code[1]}\nprint(type(model).__name__)"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


def test_the_first_stage_is_compared_to_nothing(out: Path) -> None:
    text = (out / "export" / "dense" / "sparse" / "README.md").read_text()
    assert "|  | `dense` |\n" in text
    assert "library_name: qatkit" in text


@pytest.mark.filterwarnings("ignore:.*changed after it was verified:qatkit.errors.QatkitWarning")
def test_a_card_may_be_edited_and_a_file_that_fails_says_so_in_its_card(out: Path) -> None:
    folder = out / "export" / "int8" / "sparse"
    (folder / "README.md").write_text("mine")
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0, "the card is not part of what was verified"
    weights = folder / "model.sparse.safetensors"
    weights.write_bytes((out / "export" / "dense" / "sparse" / weights.name).read_bytes())
    result = CliRunner().invoke(app, ["verify", str(out)])
    assert result.exit_code == 1, result.output
    assert "does NOT compute what training computed" in (folder / "README.md").read_text()


def test_every_format_has_loading_instructions() -> None:
    assert list(USAGES) == list(FORMATS)


def pushed(out: Path, endpoint: str, home: Path, *arguments: str, token: str | None = TOKEN) -> tuple[int, str]:
    """`qatkit push` in a fresh process: the client reads the address when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    environment |= {} if token is None else {"HF_TOKEN": token}
    command = [sys.executable, "-m", "qatkit.cli", "push", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_verified_file_is_pushed_with_its_card_and_nothing_else_is(out: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["export", str(out)]).exit_code == 0
    with hub(tmp_path / "hub") as (endpoint, _):
        code, said = pushed(out, endpoint, tmp_path, "team/small")
        assert code == 2
        assert "'int8' has not been verified; run `qatkit verify" in said
        assert CliRunner().invoke(app, ["verify", str(out)]).exit_code == 0
        code, said = pushed(out, endpoint, tmp_path, "team/small", token=None)
        assert (code, "there is no token for the hub; run `hf auth login`" in said) == (2, True), said
        code, said = pushed(out, endpoint, tmp_path, "team/small", token="hf_another")
        assert (code, "'team/small' cannot be written" in said) == (2, True), said
        code, said = pushed(out, endpoint, tmp_path, "team/small")
        assert (code, said.strip()) == (0, f"{endpoint}/team/small/commit/{COMMIT}")
        folder, stored = out / "export" / "int8" / "compressed_tensors", tmp_path / "hub" / "models" / "team" / "small"
        names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        assert {path.relative_to(stored) for path in stored.rglob("*") if path.is_file()} == names
        assert all((stored / name).read_bytes() == (folder / name).read_bytes() for name in names)
        assert Path("README.md") in names
