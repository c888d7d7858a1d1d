"""`make demo-llm` made small: pruned 2:4, taught by the dense model, int4, and every zero a code 0 in the file."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.support import warm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.args={vocab_size: 300, hidden: 32, layers: 2, heads: 2, kv_heads: 1, intermediate: 64, context: 16}",
    "data.args={vocab_size: 300, context: 16, include: ['email/*'], val_fraction: 0.2, test_fraction: 0.1, "
    "epoch_batches: 10}",
    "trainer.accelerator=cpu", "evaluate.stride=8",
    *(f"stages.{stage}.batch_size=64" for stage in ("dense", "magnitude24", "one_shot", "sparse24", "int4")),
    *(f"stages.{stage}.max_steps={steps}" for stage, steps in (("dense", 60), ("sparse24", 10), ("int4", 10))),
    *(f"stages.{stage}.quantize.weight.group_size=16" for stage in ("one_shot", "int4")),
]  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """The run that the command of the Makefile leaves, and what it prints."""
    command = ["make", "--no-print-directory", "-n", "demo-llm"]
    makes = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    program, *arguments = shlex.split(makes.splitlines()[-1])
    assert program == ".venv/bin/qatkit"
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [warm.qatkit(), *arguments, *SMALL], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "sparse_int4")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = folder / arguments[arguments.index("--out") + 1]
    return Run(load_recipe(out / "recipe.yaml"), out), done.stdout


def test_the_demo_ends_with_a_table_of_perplexity_size_and_parity(shown: tuple[Run, str]) -> None:
    run, printed = shown
    assert "page: runs/demo-llm/report.html" in printed
    table = (run.out / "report.md").read_text().splitlines()[2:]
    for column in (
        "test perplexity",
        "perplexity, context 16, stride 8",
        "agreement with dense",
        "KL to dense",
        "size",
    ):
        assert column in table[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2 : 2 + len(run.rows)]]
    assert [row[0] for row in rows] == ["dense", "magnitude24", "one_shot", "sparse24", "int4"]
    assert [row[-1] for row in rows] == ["passed"] * 5


def test_transformers_computes_the_trained_numbers_to_the_last_bit(shown: tuple[Run, str]) -> None:
    run, _ = shown
    tokens = torch.arange(16)[None]
    for stage in run.rows:
        loaded = AutoModelForCausalLM.from_pretrained(run.out / "export" / stage / "compressed_tensors").eval()
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, run.load_model(stage).eval()(tokens).logits), stage


def test_both_trained_stages_come_from_the_dense_model_and_learn_from_it(shown: tuple[Run, str]) -> None:
    run, _ = shown
    assert (run.recipe.parent_of("sparse24"), run.recipe.parent_of("int4")) == ("dense", "sparse24")
    assert {run.recipe.teacher_of(stage) for stage in ("sparse24", "int4")} == {"dense"}
    loss = {stage: run.record(stage).metrics["test/loss"] for stage in run.rows}
    assert loss["sparse24"] < loss["magnitude24"]
    assert loss["int4"] < loss["one_shot"]


@pytest.mark.parametrize(("stage", "before"), [("one_shot", "magnitude24"), ("int4", "sparse24")])
def test_two_of_every_four_codes_in_the_file_are_0_where_pruning_put_the_zeros(
    shown: tuple[Run, str], stage: str, before: str
) -> None:
    run, _ = shown
    file = load_file(run.out / "export" / stage / "compressed_tensors" / "model.safetensors")
    pruned = run.load_model(before).state_dict()
    packed = [key.removesuffix(".weight_packed") for key in file if key.endswith(".weight_packed")]
    assert set(packed) == set(run.record(before).zeros) == set(run.record(stage).zeros)
    assert len(packed) == 2 * 7
    for layer in packed:
        shape = torch.Size(file[f"{layer}.weight_shape"].tolist())
        codes, zeros = unpack_from_int32(file[f"{layer}.weight_packed"], 4, shape), pruned[f"{layer}.weight"] == 0
        assert not codes[zeros].any(), layer
        assert torch.equal(zeros.view(-1, 4).sum(dim=1), torch.full((zeros.numel() // 4,), 2)), layer
        assert (codes != 0).any(), layer
