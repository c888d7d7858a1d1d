"""Documents in windows: no token is lost, none sees another document, and the order is found again after a stop."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from qatkit.callbacks.batches import first_batches
from torch import Tensor

from qatkit import QatkitError
from qatkit.data import Source, causal_text
from qatkit.data.datamodule import ResumableLoader
from qatkit.errors import QatkitWarning
from qatkit.tasks import answers, call, token_loss
from tests.data.corpus import SENTENCES, save_tokenizer, write_lines
from tests.models.families import CAUSAL, tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qatkit"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    file = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES])
    return Source(str(file), val_fraction=0.2, test_fraction=0.2)


def loss_of(model: Any, batch: dict[str, Tensor]) -> tuple[float, int]:
    loss, count = token_loss(*answers(call(model, batch), batch))
    return float(loss), int(count)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_loss_of_packed_documents_is_that_of_each_of_them_alone(
    family: str, source: Source, tokenizer: str
) -> None:
    model = tiny(family).eval()
    data = causal_text(source, tokenizer, context=64, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    total, count = 0.0, 0
    with torch.no_grad():
        packed, labels = loss_of(model, batch)
        unpacked, _ = loss_of(model, {name: batch[name] for name in ("input_ids", "labels")})
        for row, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            borders = [*(positions == 0).nonzero().flatten().tolist(), len(row)]
            assert len(borders) > 2
            for start, end in pairwise(borders):
                alone = row[None, start:end]
                if end - start > 1:
                    loss = float(model(input_ids=alone, labels=alone).loss)
                    total, count = total + loss * (end - start - 1), count + end - start - 1
    assert labels == count
    assert packed == pytest.approx(total / count, rel=1e-5)
    assert abs(unpacked - packed) > 1e-4, "seeing other documents must matter here"


def test_the_windows_hold_every_document_once_and_whole(source: Source, tokenizer: str) -> None:
    data = causal_text(source, tokenizer, context=16)
    texts = []
    for split in (data.train, data.val, data.test):
        rows = split._rows  # type: ignore[attr-defined]
        stream = rows.streams["input_ids"]
        windows = torch.cat([split[index]["input_ids"] for index in range(len(split))])  # type: ignore[arg-type]
        assert windows.tolist() == stream[: len(windows)].tolist()
        texts.append(data.tokenizer.decode(stream.tolist()).split("<|endoftext|>")[:-1])
    assert sorted(text for part in texts for text in part) == sorted(SENTENCES)
    assert all(len(part) > 5 for part in texts)


def stop_and_resume(make: Any, batches: int) -> None:
    whole, first, second = (make().train_dataloader() for _ in range(3))
    expected = [batch["input_ids"] for batch in whole]
    assert not torch.equal(expected[batches], expected[0])
    served = iter(first)
    for _ in range(batches):
        next(served)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for found, wanted in zip(second, expected[batches:], strict=True):
        assert torch.equal(found["input_ids"], wanted)


def test_a_loader_that_stopped_within_an_epoch_goes_on_with_the_next_batch(source: Source, tokenizer: str) -> None:
    stop_and_resume(lambda: causal_text(source, tokenizer, context=16, batch_size=4, epoch_batches=6), 2)


def test_a_stream_that_stopped_goes_on_with_the_next_batch_and_begins_again_at_its_end(
    tmp_path: Path, source: Source, tokenizer: str
) -> None:
    for name in ("a", "b", "val", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {text}"} for text in SENTENCES])
    streamed = Source(
        str(tmp_path / "[ab].jsonl"), str(tmp_path / "val.jsonl"), str(tmp_path / "test.jsonl"), streaming=True
    )
    make = lambda: causal_text(streamed, tokenizer, context=16, batch_size=4, epoch_batches=200)  # noqa: E731
    for batches in (1, 3, 150):
        stop_and_resume(make, batches)
    loader = make().train_dataloader()
    text = "".join(make().tokenizer.decode(batch["input_ids"].flatten()) for batch in loader)
    documents = [f"{name} {text}" for name in "ab" for text in SENTENCES]
    assert text.startswith("<|endoftext|>".join([*documents, documents[0]])), "every document once, then from the start"


def test_an_epoch_of_a_stream_goes_on_where_the_one_before_it_ended(tmp_path: Path, tokenizer: str) -> None:
    for name in ("train", "val", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in SENTENCES])
    source = Source(*(str(tmp_path / f"{name}.jsonl") for name in ("train", "val", "test")), streaming=True)
    short = causal_text(source, tokenizer, context=16, batch_size=2, epoch_batches=3).train_dataloader()
    long = causal_text(source, tokenizer, context=16, batch_size=2, epoch_batches=6).train_dataloader()
    twice = [batch["input_ids"] for _ in range(2) for batch in short]
    assert all(torch.equal(first, second["input_ids"]) for first, second in zip(twice, long, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("limit", [None, 3], ids=["whole epochs", "epochs of limit_train_batches"])
def test_resuming_in_lightning_sees_the_batches_that_the_whole_run_saw(
    limit: int | None, streaming: bool, tmp_path: Path, source: Source, tokenizer: str
) -> None:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Records(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[list[int]] = []

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.seen.append(batch["input_ids"].flatten().tolist())
            return self.weight.square()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(steps: int, ckpt: Path | None = None) -> list[list[int]]:
        module = Records()
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, limit_train_batches=limit,
            callbacks=[ModelCheckpoint(tmp_path / f"{steps}", every_n_train_steps=1, filename="{step}", save_top_k=-1)],
        )  # fmt: skip
        data = causal_text(read, tokenizer, context=16, batch_size=4, epoch_batches=5)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt)
        return module.seen

    read = source
    if streaming:
        for name in ("train", "val", "test"):
            write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {text}"} for text in SENTENCES])
        read = Source(*(str(tmp_path / f"{name}.jsonl") for name in ("train", "val", "test")), streaming=True)
    whole = fit(13)
    assert isinstance(causal_text(source, tokenizer, batch_size=1).train_dataloader(), ResumableLoader)
    assert len({str(batch) for batch in whole}) > 5
    for step in (5, 6, 7):  # 5 ends an epoch, and 6 one of three batches
        assert fit(13, tmp_path / "13" / f"step={step}.ckpt") == whole[step:]


@pytest.mark.parametrize("streaming", [False, True])
def test_calibration_does_not_use_up_the_first_batches(
    streaming: bool, tmp_path: Path, source: Source, tokenizer: str
) -> None:
    for name in ("train", "val", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in SENTENCES])
    streamed = Source(*(str(tmp_path / f"{name}.jsonl") for name in ("train", "val", "test")), streaming=True)
    make = lambda: causal_text(streamed if streaming else source, tokenizer, context=16, batch_size=2, epoch_batches=6)  # noqa: E731
    expected = [batch["input_ids"] for batch in make().train_dataloader()]
    loader = make().train_dataloader()
    looked_at = [batch["input_ids"] for batch in first_batches(loader, 2)]
    trained_on = [batch["input_ids"] for batch in loader]
    assert torch.equal(torch.stack(looked_at), torch.stack(expected[:2]))
    assert torch.equal(torch.stack(trained_on), torch.stack(expected))


def test_tokens_are_made_once_and_again_when_the_file_changes(
    tmp_path: Path, cache: Path, source: Source, tokenizer: str
) -> None:
    folder = causal_text(source, tokenizer, context=16).folder
    stamp = (folder / "meta.json").stat().st_mtime_ns
    assert causal_text(source, tokenizer, context=32).folder == folder
    assert (folder / "meta.json").stat().st_mtime_ns == stamp
    write_lines(Path(source.path), [{"text": text} for text in SENTENCES[1:]])
    assert causal_text(source, tokenizer, context=16).folder != folder
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', r"is not JSON \(Expecting ',' delimiter.*\); fix the record"),
        ("[1]", r"is not a JSON object; write one JSON object per line"),
        ('{"txt": "a"}', r"has no column 'text'; its columns are \['txt'\]; fix the record"),
        ('{"text": 5}', r"column 'text' contains int, not text; fix the record"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line_and_can_be_left_out_and_counted(
    line: str, reason: str, tmp_path: Path, cache: Path, tokenizer: str
) -> None:
    records = [json.dumps({"text": text}) for text in SENTENCES]
    file = write_lines(tmp_path / "texts.jsonl", [*records[:6], line, *records[6:], line])
    source = Source(str(file), val_fraction=0.2, test_fraction=0.2)
    with pytest.raises(QatkitError, match=rf"texts\.jsonl:7: {reason}, or set source\.skip_bad: true"):
        causal_text(source, tokenizer, context=16).prepare_data()
    assert list(cache.iterdir()) == [], "nothing half made stays"
    skipping = Source(str(file), val_fraction=0.2, test_fraction=0.2, skip_bad=True)
    data = causal_text(skipping, tokenizer, context=16)
    with pytest.warns(QatkitWarning, match=rf"skipped 2 of {len(SENTENCES) + 2} records; first: .*:7: "):
        data.prepare_data()


@pytest.mark.parametrize("streaming", [False, True])
def test_blank_texts_as_in_wikitext_are_passed_over(streaming: bool, tmp_path: Path, tokenizer: str) -> None:
    def batch(folder: str, records: list[dict[str, str]]) -> Tensor:
        files = [str(write_lines(tmp_path / folder / f"{n}.jsonl", records)) for n in ("train", "val", "test")]
        data = causal_text(Source(*files, streaming=streaming), tokenizer, context=16, batch_size=8)
        assert "<|endoftext|><|endoftext|>" not in data.tokenizer.decode(data.test._rows.streams["input_ids"])  # type: ignore[attr-defined]
        return next(iter(data.train_dataloader()))["input_ids"]

    texts = [{"text": text} for text in SENTENCES]
    spaced = [record for text in texts for record in ({"text": ""}, text, {"text": " \n"})]
    assert torch.equal(batch("spaced", spaced), batch("plain", texts))


def test_bad_records_of_a_stream_are_named_or_counted_too(tmp_path: Path, tokenizer: str) -> None:
    for name in ("train", "val", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in SENTENCES])
    write_lines(tmp_path / "train.jsonl", [{"text": "a" * 40}, "{", *({"text": text} for text in SENTENCES)])
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("train", "val", "test")]
    with pytest.raises(QatkitError, match=r"train\.jsonl:2: is not JSON"):
        next(iter(causal_text(Source(*paths, streaming=True), tokenizer, context=16).train_dataloader()))
    loader = causal_text(Source(*paths, streaming=True, skip_bad=True), tokenizer, context=16).train_dataloader()
    with pytest.warns(QatkitWarning, match=r"skipped 1 of 32 records so far; most recent: .*train\.jsonl:2"):
        next(iter(loader))
    assert loader.bad == 1  # type: ignore[attr-defined]
