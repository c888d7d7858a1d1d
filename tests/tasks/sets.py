"""Tiny models and data of every task, as the factories of a user's recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qatkit.data import SplitDataModule

WORDS, TOKENS = 20, 8


class Rows(Dataset[Any]):
    """Samples as dicts, of which the default collation makes batches."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.columns.items()}


class Pairs(Rows):
    """Samples as pairs."""

    def __getitem__(self, index: int) -> Any:
        return tuple(values[index] for values in self.columns.values())


def split(rows: type[Rows], columns: dict[str, Tensor], task: str, batch_size: int, seed: int) -> SplitDataModule:
    """96 training, 32 validation and 32 test samples."""
    train, val, test = (
        rows({name: values[first:last] for name, values in columns.items()})
        for first, last in ((0, 96), (96, 128), (128, 160))
    )
    return SplitDataModule(train, val, test, batch_size=batch_size, seed=seed, task=task)


def images() -> Tensor:
    return torch.randn(160, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(2, WORDS, (160, TOKENS), generator=torch.Generator().manual_seed(0))


def labels(batch_size: int, seed: int) -> SplitDataModule:
    """Which of three corners of an image are bright."""
    x = images()
    x[:, 0, [0, 0, 5], [0, 5, 0]] *= 4
    return split(Pairs, {"x": x, "y": (x[:, 0, [0, 0, 5], [0, 5, 0]] > 0).float()}, "multilabel", batch_size, seed)


def values(batch_size: int, seed: int) -> SplitDataModule:
    """The means of an image's halves."""
    x = images()
    return split(Pairs, {"x": x, "y": x.view(160, 2, 18).mean(-1) * 4}, "regression", batch_size, seed)


def pixels(batch_size: int, seed: int) -> SplitDataModule:
    """Dark, medium and bright pixels."""
    x = images()
    return split(Pairs, {"x": x, "y": (x[:, 0] > -0.5).long() + (x[:, 0] > 0.5)}, "segmentation", batch_size, seed)


def words(batch_size: int, seed: int) -> SplitDataModule:
    """Whether a token is odd; -100 at every eighth."""
    ids = tokens()
    odd = (ids % 2).masked_fill(ids % 8 == 0, -100)
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": odd}
    return split(Rows, columns, "token_classification", batch_size, seed)


def spans(batch_size: int, seed: int) -> SplitDataModule:
    """Where token 0 and token 1 stand."""
    ids = tokens()
    start = torch.arange(160) % 4
    ids[torch.arange(160), start], ids[torch.arange(160), start + 3] = 0, 1
    columns = {"input_ids": ids, "start_positions": start, "end_positions": start + 3}
    return split(Rows, columns, "question_answering", batch_size, seed)


def counts(batch_size: int, seed: int) -> SplitDataModule:
    """Numbers that count on from the first token of the text."""
    ids = tokens()
    output = (ids[:, :1] + torch.arange(TOKENS)) % WORDS
    shifted = torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)
    columns = {"input_ids": ids, "decoder_input_ids": shifted, "labels": output}
    return split(Rows, columns, "seq2seq", batch_size, seed)


def partners(batch_size: int, seed: int) -> SplitDataModule:
    """A text and its copy with other words at the end."""
    ids = tokens()
    other = ids.clone()
    other[:, 6:] = ids[:, :2]

    def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        both = torch.stack([row[part] for part in ("text", "partner") for row in rows])
        return {
            "input_ids": both, "attention_mask": torch.ones_like(both), "labels": torch.arange(len(rows)),
            "task": "pairs", "pooling": "mean",
        }  # fmt: skip

    data = split(Rows, {"text": ids, "partner": other}, "pairs", batch_size, seed)
    data.collate = collate
    return data


TASKS = {labels: "multilabel", values: "regression", pixels: "segmentation", words: "token_classification",
         spans: "question_answering", counts: "seq2seq", partners: "pairs"}  # fmt: skip
for factory, name in TASKS.items():
    factory.task = name  # type: ignore[attr-defined]  # as a user declares it


def dense_net(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, outputs))


def pixel_net(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))


def bert(head: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    return getattr(transformers, f"Bert{head}")(config)  # type: ignore[no-any-return]


def t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        vocab_size=WORDS, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def detector() -> nn.Module:
    import transformers

    config = transformers.YolosConfig(
        image_size=[16, 16], patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_detection_tokens=3, num_labels=2,
    )  # fmt: skip
    return transformers.YolosForObjectDetection(config)


def boxes() -> list[dict[str, Any]]:
    """Two batches of images with one box each."""
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}
    return [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": [label] * 4} for _ in range(2)]
