"""A language model from recipe to report: the shipped recipe, made small, on text that comes with Python."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatkit.common.labels import IGNORED
from qatkit.pipeline.export import export_run
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.report.content import write_report
from qatkit.report.page import write_page
from qatkit.run.folder import Run

SMALL = [
    "model.args={vocab_size: 300, hidden: 32, layers: 2, heads: 2, kv_heads: 1, intermediate: 64, context: 16}",
    "data.args={vocab_size: 300, context: 16, include: ['email/*'], val_fraction: 0.2, test_fraction: 0.1, "
    "epoch_batches: 10}",
    "stages.dense.max_steps=40",
    "stages.qat.max_steps=20",
    "stages.ptq.quantize.weight.group_size=16",
    "stages.qat.quantize.weight.group_size=16",
    "evaluate={stride: 4}",
]
DENSE = [*SMALL, "export={format: dense}", "evaluate=null"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        run = Run(load_recipe("llm/int4_qat", DENSE), tmp_path_factory.mktemp("language"))
        assert run_stages(run) == ["dense", "ptq", "qat"]
        export_run(run)
        yield run


def test_a_stage_is_measured_as_transformers_measures_its_model(finished: Run) -> None:
    model, batches = finished.load_model("qat").eval(), finished.build_data(16).test_dataloader()
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch).loss) * labels
            count += labels
    metrics = finished.record("qat").metrics
    assert metrics["test/loss"] == pytest.approx(total / count, rel=1e-6)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert 0 < metrics["test/accuracy"] < 1
    assert metrics["test/loss"] < finished.record("dense").metrics["test/loss"] < math.log(300)


def test_plain_transformers_loads_the_exported_folder_and_computes_what_was_trained(finished: Run) -> None:
    folder = finished.out / "export" / "qat" / "dense"
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("def decode(self, value):", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, finished.load_model("qat").eval()(tokens).logits)
        plain = finished.load_model("qat", quantizers=False).eval()(tokens).logits
    assert not torch.equal(loaded(tokens).logits, plain), "rounding must matter here"
    weight = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert all(len(group.unique()) <= 16 for group in weight.view(-1, 16))


@pytest.mark.filterwarnings("ignore:.*changed after it was verified:qatkit.errors.QatkitWarning")
def test_verification_compares_logits_and_perplexity_and_finds_one_changed_weight(
    finished: Run, tmp_path: Path
) -> None:
    for stage, check in verify_run(finished).items():
        assert check.passed, check.failures
        assert check.metric == "perplexity"
        assert check.trained_metric == check.runtime_metric
        assert check.trained_metric == pytest.approx(finished.record(stage).metrics["test/perplexity"], rel=1e-6)
        assert (check.mean_error, check.agreement) == (0.0, 1.0)
        assert (check.quantization_error > 0) == (stage != "dense")
        assert "tokens, outputs differ by 0 on average" in check.text
    copy = Run(finished.recipe, tmp_path / "copy")
    shutil.copytree(finished.out, copy.out)
    path = copy.out / "export" / "qat" / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 4] += 0.1
    save_file(tensors, path)
    check = verify_run(copy)["qat"]
    assert not check.passed
    assert check.failures[0].startswith("'model.layers.1.self_attn.q_proj.weight': 1 of 1024 values differ")
    assert check.trained_metric != check.runtime_metric


def test_the_report_judges_by_perplexity(finished: Run, tmp_path: Path) -> None:
    verify_run(finished)
    report = report_run(finished)
    rows = {row["stage"]: row for row in report["rows"]}
    assert rows["qat"]["test_perplexity"] == finished.record("qat").metrics["test/perplexity"]
    assert all(row["latency"] == [] for row in report["rows"])
    text = (finished.out / "report.md").read_text()
    assert "| stage | kind | test perplexity | in the runtime | size | parity |" in text
    cells = f"| {rows['dense']['test_perplexity']:.3f} (loss {rows['dense']['test_loss']:.4f}) |"
    assert cells in text
    assert "accurac" not in text.lower()
    write_page([finished.out], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Perplexity versus size" in page
    assert "Down and to the left is better." in page
    assert "validation perplexity " in page
    assert "Both models predict the same next token for all" in page
    for words in ("test accuracy", "Accuracies", "test samples", "kernels"):
        assert words not in page, words
    curves = {stage["stage"]: stage["curves"]["metrics"] for stage in report["stages"]}
    assert len(curves["dense"]["val/perplexity"]["steps"]) == 4  # an epoch is ten batches here
    assert curves["dense"]["val/loss"]["values"][-1] < curves["dense"]["val/loss"]["values"][0]


def test_a_language_model_and_a_classifier_share_a_page_but_no_axis(finished: Run, tmp_path: Path) -> None:
    verify_run(finished)
    report = report_run(finished)
    for row in report["rows"]:
        row.pop("test_perplexity"), row.pop("test_loss")
        row["verification"]["task"] = "text_classification"
    for stage in report["stages"]:
        stage["metrics"] = {"val/accuracy": 0.5}
    (tmp_path / "classifier").mkdir()
    write_report(tmp_path / "classifier", report)
    write_page([finished.out, tmp_path / "classifier"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<h3>Perplexity versus size and latency</h3>" in page
    assert "<h3>Accuracy versus size and latency</h3>" in page
    for figure in ("all-perplexity-size", "all-accuracy-size", "run0-size", "run1-size"):
        assert page.count(f'data-figure="{figure}"') == 1, figure
    assert '<th scope="col">test perplexity</th>' in page
    assert '<th scope="col">test accuracy</th>' in page


def test_a_stage_that_broke_off_within_a_pass_over_the_text_ends_with_the_same_bits(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, step = Run(finished.recipe, tmp_path), CompressionModule.training_step

    def breaks(self: CompressionModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 25:
            raise RuntimeError("the power is gone")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(CompressionModule, "training_step", breaks)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run_stages(again, until="dense")
    saved = torch.load(again.folder("dense") / "last.ckpt", weights_only=True)["global_step"]
    assert saved == 20  # the end of the second slice of ten batches
    assert run_stages(again, until="ptq") == ["dense", "ptq"]
    for name in ("dense", "ptq"):
        first, second = (run.folder(name) / "model" / "model.safetensors" for run in (finished, again))
        assert first.read_bytes() == second.read_bytes()


def test_int4_codes_are_shipped_to_transformers_with_tokenizer_and_config(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.out / "stages", tmp_path / "stages")
    shutil.copy(finished.out / "recipe.yaml", tmp_path)
    run = Run(load_recipe("llm/int4_qat", SMALL), tmp_path)
    assert [path.parent.name for path in export_run(run)] == ["dense", "ptq", "qat"]
    assert all(check.passed for check in verify_run(run).values())
    report = {row["stage"]: row for row in report_run(run)["rows"]}
    assert report["qat"]["verification"]["runtime_metric"] == report["qat"]["verification"]["trained_metric"]
    assert report["qat"]["bytes"] < 0.6 * report["dense"]["bytes"]  # half of these weights are the embedding
    scores = {stage: row["language"] for stage, row in report.items()}
    assert (scores["dense"]["context"], scores["dense"]["stride"]) == (16, 4)
    assert (scores["dense"]["kl"], scores["dense"]["agreement"]) == (0.0, 1.0)
    assert scores["qat"]["kl"] > 0
    assert 0 < scores["qat"]["agreement"] <= 1
    assert 0 < scores["dense"]["loss"] < report["dense"]["test_loss"]  # more is seen before each token
    header = "| in the runtime | perplexity, context 16, stride 4 | agreement with dense | KL to dense | size |"
    assert header in (tmp_path / "report.md").read_text()
    folder = tmp_path / "export" / "qat" / "compressed_tensors"
    tokens = AutoTokenizer.from_pretrained(folder)("def decode(self, value):", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        assert torch.equal(loaded, finished.load_model("qat").eval()(tokens).logits)
    write_page([tmp_path], tmp_path / "page.html")
    assert (
        "transformers, reading the compressed folder, computes what training computed"
        in (tmp_path / "page.html").read_text()
    )
