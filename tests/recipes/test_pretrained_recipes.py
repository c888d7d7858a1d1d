"""The shipped recipes on somebody's model, by the overrides in their headers: the text becomes its tokens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qatkit import QatkitError
from qatkit.data import stdlib_text
from qatkit.data.tokenizers import load_tokenizer
from qatkit.pipeline.export import export_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.recipe import FactoryConfig
from qatkit.recipe.loading import list_recipes, load_recipe
from qatkit.run.compatibility import with_tokenizer
from qatkit.run.folder import Run
from qatkit.tasks import evaluate
from tests.data.corpus import save_tokenizer
from tests.models.families import tiny

RECIPES = Path(__file__).parents[2] / "recipes"
HEADER = re.compile(r"^# Your model: (.*) (stages\.\S+)$", re.MULTILINE)
NAMED = [name for name in list_recipes() if HEADER.search((RECIPES / f"{name}.yaml").read_text())]
DATA = "data.args={context: 32, vocab_size: 2048, include: ['email/*'], val_fraction: 0.2, test_fraction: 0.1}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a tokenizer of its own beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny("qwen3", vocab_size=2048, hidden_size=64, intermediate_size=64, head_dim=32).save_pretrained(tmp_path / "own")
    save_tokenizer(tmp_path / "own")
    return tmp_path / "own"


def overrides(name: str, folder: Path) -> list[str]:
    found = HEADER.search((RECIPES / f"{name}.yaml").read_text())
    assert found is not None
    words = shlex.split(f"{found[1]} {found[2]}")
    assert len(words) == 3
    return [word.replace("Qwen/Qwen3-0.6B", str(folder)) for word in words]


def test_the_recipes_for_language_models_say_how() -> None:
    wanted = {"int4_qat", "int4_qat_lora", "qlora", "qlora_merge_int4", "sparse24_kd_int4", "distill_layers"}
    assert {f"llm/{name}" for name in wanted} <= set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_takes_a_model_from_a_folder(name: str, folder: Path) -> None:
    validate_recipe(load_recipe(name, overrides(name, folder)))


def test_the_text_becomes_the_tokens_of_the_model_and_its_tokenizer_is_shipped(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe("llm/qlora", [*overrides("llm/qlora", folder), DATA, "stages.qlora.max_steps=2"])
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    export_run(run)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(run.out / "export" / "qlora" / "dense").get_vocab() == theirs.get_vocab()
    data = stdlib_text(32, include=["email/*"], val_fraction=0.2, test_fraction=0.1, tokenizer=str(folder))
    text = theirs.decode(data.train[0]["input_ids"])  # type: ignore[index]
    assert len(text.split()) > 3
    assert theirs(text)["input_ids"] == data.train[0]["input_ids"].tolist()  # type: ignore[index]
    loss = evaluate(run.load_model("dense"), data.test_dataloader())["loss"]
    assert run.record("dense").metrics["test/loss"] == pytest.approx(loss, rel=1e-5)


def test_tokens_that_the_model_reads_otherwise_are_refused(folder: Path, tmp_path: Path) -> None:
    learned = stdlib_text(32, 600, include=["email/*"], val_fraction=0.2, test_fraction=0.1)
    learned.prepare_data()
    learned.tokenizer.save_pretrained(tmp_path / "other")
    args = DATA.replace("vocab_size: 2048", f"tokenizer: {tmp_path / 'other'}")
    recipe = load_recipe("llm/qlora", [*overrides("llm/qlora", folder), args, "stages.qlora.max_steps=2"])
    with pytest.raises(
        QatkitError, match=r"data\.args\.tokenizer: this tokenizer splits text differently .* the model '.*own'"
    ):
        run_stages(Run(recipe, tmp_path / "run"))
    for file in folder.glob("tok*"):  # a model without one learns the tokens that it is given
        file.unlink()
    load_tokenizer.cache_clear()
    run_stages(Run(recipe, tmp_path / "run"))


def test_only_pretrained_models_of_qatkit_bring_a_tokenizer(folder: Path) -> None:
    text = FactoryConfig("qatkit.data:stdlib_text")
    own = FactoryConfig("qatkit.models:causal_lm", {"name_or_path": str(folder)})
    assert with_tokenizer(text, own).args == {"tokenizer": str(folder)}
    named = FactoryConfig("qatkit.data:stdlib_text", {"tokenizer": None})
    assert with_tokenizer(named, own) == named
    assert with_tokenizer(text, FactoryConfig("theirs:resnet", {"name_or_path": "resnet50"})) == text
    assert with_tokenizer(FactoryConfig("qatkit.data:digits"), own).args == {}
    for file in folder.glob("tok*"):
        file.unlink()
    assert with_tokenizer(text, own) == text
