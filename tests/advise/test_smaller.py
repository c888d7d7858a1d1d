"""The smaller model of a plan has the size of the model that its `shrink` block leaves, and families are told apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    T5Config,
    ViTConfig,
)  # fmt: skip

from qatkit.advise.families import family_of
from qatkit.advise.phases import forward_phases
from qatkit.advise.serving import weight_bytes
from qatkit.advise.smaller import smaller_model
from qatkit.models import cnn, llama, mlp, resnet
from qatkit.pruning.channel_importance import last_layer
from qatkit.pruning.channels import prune_channels
from qatkit.tasks import call

SHAPE = {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 128, "context": 64}


def test_embeddings_of_a_smaller_language_model_keep_their_size() -> None:
    with torch.device("meta"):
        small = llama(1000, **(SHAPE | {"layers": 2, "intermediate": 96}))
        found = smaller_model(llama(1000, **SHAPE), "language", None)
    assert weight_bytes(found, "Q4_0") == weight_bytes(small, "Q4_0")
    assert weight_bytes(found, "BF16") - 2 * 2 * 1000 * 64 < weight_bytes(found, "BF16") / 2  # mostly the vocabulary


@pytest.mark.parametrize("built", [cnn, mlp])
def test_a_smaller_network_has_the_parameters_that_pruning_leaves(built: Any) -> None:
    model, x = built(), torch.zeros(2, 1, 8, 8)
    pruned = prune_channels(model, x[:1], 0.5, [last_layer(model, x)])
    meta = copy.deepcopy(model).to("meta").eval()
    found = smaller_model(meta, "convolutional", [x.to("meta"), torch.zeros(2, device="meta")])
    sizes = [[tuple(weight.shape) for weight in each.parameters()] for each in (pruned, found)]
    assert sizes[0] == sizes[1]
    assert sum(weight.numel() for weight in meta.parameters()) == sum(weight.numel() for weight in model.parameters())


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows(x)[0][:, -1])


class Bag(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))


def text_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(2, 8, dtype=torch.long)}


@pytest.mark.parametrize(
    ("build", "inputs", "family"),
    [
        (cnn, [torch.zeros(2, 1, 8, 8)], "convolutional"),
        (resnet, [torch.zeros(2, 1, 8, 8)], "convolutional"),
        (mlp, [torch.zeros(2, 1, 8, 8)], "mlp"),
        (lambda: AutoModelForSequenceClassification.from_config(BertConfig(**TINY)), text_inputs(), "encoder"),
        (
            lambda: AutoModelForImageClassification.from_config(ViTConfig(**TINY, image_size=16, patch_size=8)),
            {"pixel_values": torch.zeros(2, 3, 16, 16)},
            "encoder",
        ),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), [torch.zeros(2, 4, 16)], "encoder"),
        (Reader, [torch.zeros(2, 4, 16)], "unknown"),
        (Bag, [torch.zeros(2, 3, dtype=torch.long)], "unknown"),
        (
            lambda: AutoModelForSeq2SeqLM.from_config(T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)),
            text_inputs() | {"decoder_input_ids": torch.zeros(2, 4, dtype=torch.long)},
            "unknown",
        ),
    ],
    ids=["cnn", "resnet", "mlp", "bert", "vit", "torch encoder", "lstm", "bag", "t5"],
)  # fmt: skip
def test_a_model_belongs_to_the_family_of_its_layers(build: Any, inputs: Any, family: str) -> None:
    with torch.device("meta"):
        model = build().eval()
    batch = (
        {key: value.to("meta") for key, value in inputs.items()} if isinstance(inputs, dict) else [inputs[0].to("meta")]
    )
    assert family_of(model, forward_phases(model, lambda: call(model, batch))) == family
