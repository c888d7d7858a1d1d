"""A recipe that exports to GGUF: the file has the tokenizer of the data, and `verify` finds another one."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qatkit import QatkitError
from qatkit.export.gguf.format import export_gguf
from qatkit.pipeline.export import check_export_tokenizer, export_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.recipes.test_language_models import SMALL

OVERRIDES = [
    *SMALL,
    "stages.dense.max_steps=2",
    "stages.ptq.quantize={scheme: Q8_0, exclude: [lm_head]}",
    "stages.qat.max_steps=2",
    "stages.qat.quantize={scheme: Q4_0, observer: lsq, exclude: [lm_head]}",
    "export={format: gguf}",
    "evaluate=null",
]


@pytest.mark.slow
def test_the_file_has_the_tokenizer_of_the_data_and_verification_finds_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    run = Run(load_recipe("llm/int4_qat", OVERRIDES), tmp_path / "run")
    run_stages(run)
    paths = {path.parts[-3]: path for path in export_run(run)}
    checks = verify_run(run)
    assert {name: (check.passed, check.mean_error) for name, check in checks.items()} == {
        "dense": (True, 0.0), "ptq": (True, 0.0), "qat": (True, 0.0)
    }  # fmt: skip
    assert gguf.GGUFReader(paths["qat"]).fields["tokenizer.ggml.model"].contents() == "gpt2"
    loaded = AutoModelForCausalLM.from_pretrained(paths["qat"].parent, gguf_file="model.gguf", dtype=torch.float32)
    model, tokens = run.load_model("qat").eval(), torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    export_gguf(model, paths["qat"])
    with pytest.warns(match=r"model\.gguf: the file changed after it was verified"):
        check = verify_run(run)["qat"]
    assert check.failures[0] == ("metadata 'tokenizer.ggml.model' is 'no_vocab', but 'gpt2' in the trained model"), (
        check.failures
    )


def test_a_tokenizer_that_the_file_cannot_hold_is_refused_before_training() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    recipe = load_recipe("llm/int4_qat", OVERRIDES)
    with pytest.raises(
        QatkitError, match=r"export\.format: llama\.cpp does not support the tokenizer's model WordLevel"
    ):
        check_export_tokenizer(recipe, words)
    check_export_tokenizer(load_recipe("llm/int4_qat"), words)
