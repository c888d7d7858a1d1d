"""Models and data sets by their names on the hub: a real client, a real server, and clear words where there is none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import SENTENCES, save_tokenizer, write_lines
from tests.models.families import tiny
from tests.support.hub_server import hub

pytestmark = pytest.mark.slow

PRELUDE = """
import json, sys, time
from unittest.mock import patch
import torch
from qatkit import QatkitError
from qatkit.data import Source, causal_text
from qatkit.models import causal_lm, masked_lm

def attempt(make):
    with patch("time.sleep") as sleep:  # between attempts
        try:
            said = type(make()).__name__
        except QatkitError as error:
            said = str(error)
    return [said, sum(call.args[0] for call in sleep.call_args_list)]

def text(name, tokenizer="team/model", **options):
    data = causal_text(Source(name, **options), tokenizer, context=32, batch_size=2, epoch_batches=3)
    data.prepare_data()
    return data

result = {}
"""


def run(code: str, endpoint: str, home: Path) -> dict[str, Any]:
    """What a fresh process finds out: the libraries read the address when they are imported."""
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hub"), "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{code}\nprint(json.dumps(result))"],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    root = tmp_path / "repositories"
    for name in ("team/model", "team/gated"):
        tiny("llama").save_pretrained(root / "models" / name)  # type: ignore[operator]
        save_tokenizer(root / "models" / name)
    documents = [{"text": text} for text in SENTENCES]
    write_lines(root / "datasets" / "team/texts" / "train.jsonl", documents[:60])
    write_lines(root / "datasets" / "team/texts" / "validation.jsonl", documents[60:70])
    write_lines(root / "datasets" / "team/texts" / "test.jsonl", documents[70:])
    return root


def test_a_model_and_a_data_set_come_from_the_hub_and_later_from_its_cache(repositories: Path, tmp_path: Path) -> None:
    loading = """
model = causal_lm("team/model")
data = text("team/texts")
batch = next(iter(data.train_dataloader()))
result["model"] = [type(model).__name__, float(model(**batch).loss)]
result["records"] = [len(split._rows) for split in (data.train, data.val, data.test)]
result["first"] = data.tokenizer.decode(data.train._rows.row(0)["input_ids"].tolist())
"""
    asking = """
stream = text("team/texts", streaming=True)
windows = [batch["input_ids"].tolist() for batch in stream.train_dataloader()]
result["streamed"] = data.tokenizer.decode([token for batch in windows for row in batch for token in row])
result["wrong"] = attempt(lambda: causal_lm("team/modle"))
result["wrong_data"] = attempt(lambda: text("team/txets"))
result["wrong_split"] = attempt(lambda: text("team/texts", val="valid"))
result["gated"] = attempt(lambda: causal_lm("team/gated"))
result["gated_tokenizer"] = attempt(lambda: text("team/texts", "team/gated"))
"""
    with hub(repositories) as (address, requests):
        found = run(loading + asking, address, tmp_path)
    assert found["model"][0] == "LlamaForCausalLM"
    assert found["records"] == [60, 10, 10]
    assert found["first"] == SENTENCES[0] + "<|endoftext|>"
    assert found["streamed"].startswith(SENTENCES[0] + "<|endoftext|>" + SENTENCES[1])
    for name, words in {
        "wrong": "name_or_path: 'team/modle' is not a folder, and the request to the hub failed",
        "wrong_data": "source.path: 'team/txets' is not a folder, and the request to the hub failed",
        "wrong_split": "source.val: 'team/texts' has no split 'valid'; did you mean 'validation'?",
        "gated": "name_or_path: 'team/gated' is gated, and the hub denied access; accept the conditions",
        "gated_tokenizer": "tokenizer: 'team/gated' is gated",
    }.items():
        assert words in found[name][0], found[name]
    assert sum("modle" in request for request in requests) == 1, "a wrong name is asked for once"

    # the same address, where nothing answers any more
    refused = """
result["other"] = attempt(lambda: causal_lm("team/other"))
result["other_data"] = attempt(lambda: text("team/others"))
result["other_tokenizer"] = attempt(lambda: text("team/texts", "team/other"))
"""
    again = run(loading + refused, f"http://127.0.0.1:{closed_port()}", tmp_path)
    for name in ("model", "records", "first"):
        assert again[name] == found[name]
    for name in ("other", "other_data", "other_tokenizer"):
        said, slept = again[name]
        assert "the request to the hub failed" in said
        assert "when the network is available" in said
        assert slept < 5, "at once, without trying again and again"


def closed_port() -> int:
    """A port where nothing listens."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
    return port
