"""The teacher cache: contents, bytes per token, kills, and caches written with other inputs."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError
from qatkit.distillation.cache import CachedTeacher, cache_teacher, model_hash
from qatkit.distillation.manifest import is_complete, read_manifest
from qatkit.distillation.sparse import top_k_kd_loss
from tests.distillation.tensors import sines
from tests.support import warm
from tests.support.waiting import wait_for

FINGERPRINT = {"model": "a1", "data order": "b2", "tokenizer": "c3"}
CLASSES, SAMPLES, LENGTH = 301, 10, 6


class Logits:
    """A teacher with known outputs that counts its calls."""

    def __init__(self, classes: int = CLASSES) -> None:
        self.everything = sines(1, SAMPLES, LENGTH, classes, scale=6)
        self.calls: list[list[int]] = []

    def __call__(self, batch: Tensor) -> Tensor:
        self.calls.append(batch.tolist())
        return self.everything[batch]


def batches() -> list[Tensor]:
    return list(torch.arange(SAMPLES).split(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_from_the_cache_is_that_of_the_whole_teacher_but_for_half_precision(
    tmp_path: Path, temperature: float
) -> None:
    teacher, student = Logits(), sines(2, SAMPLES, LENGTH, CLASSES, scale=6)
    assert cache_teacher(teacher, batches(), tmp_path, FINGERPRINT, k=16, temperature=temperature) == SAMPLES
    cached = CachedTeacher(tmp_path, FINGERPRINT)
    assert len(cached) == SAMPLES
    wanted = torch.tensor([7, 0, 3])
    labels = torch.zeros(3, LENGTH, dtype=torch.long)
    labels[1, 2:] = -100
    expected = top_k_kd_loss(student[wanted], teacher.everything[wanted], 16, temperature, labels=labels)
    assert cached.loss(student[wanted], wanted, labels=labels).item() == pytest.approx(expected.item(), rel=1e-3)
    assert cached.loss(teacher.everything[wanted], wanted).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("classes", "most"), [(CLASSES, 258), (70_000, 322)])
def test_a_token_takes_the_stated_bytes_and_class_numbers_above_16_bits_survive(
    tmp_path: Path, classes: int, most: int
) -> None:
    teacher = Logits(classes)
    teacher.everything[..., -1] = 9.0  # the most probable class is the last
    cache_teacher(teacher, batches(), tmp_path, FINGERPRINT)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.arrow"))
    assert size <= SAMPLES * LENGTH * most + 4096  # Arrow's file overhead
    targets = CachedTeacher(tmp_path, FINGERPRINT)(range(SAMPLES))
    # of two classes that differ by a rounding error either may be in the top k
    torch.testing.assert_close(teacher.everything.gather(-1, targets.indices), teacher.everything.topk(64).values)
    assert all(row.unique().numel() == 64 for row in targets.indices.flatten(0, 1))
    exact = teacher.everything.double().log_softmax(-1).topk(64).values
    torch.testing.assert_close(targets.log_p.double(), exact, rtol=1e-3, atol=0)


def test_after_a_kill_only_the_unfinished_file_is_computed_again_and_the_cache_is_the_same(tmp_path: Path) -> None:
    class Killed(Logits):
        def __call__(self, batch: Tensor) -> Tensor:
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(batch)

    options: dict[str, Any] = {"k": 8, "shard_batches": 2}
    cache_teacher(Logits(), batches(), tmp_path / "whole", FINGERPRINT, **options)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(Killed(), batches(), tmp_path / "cut", FINGERPRINT, **options)
    with pytest.raises(QatkitError, match=r"is incomplete; run cache_teacher\(\.\.\., folder\) again"):
        CachedTeacher(tmp_path / "cut", FINGERPRINT)
    teacher = Logits()
    assert cache_teacher(teacher, batches(), tmp_path / "cut", FINGERPRINT, **options) == SAMPLES
    assert teacher.calls == [[4, 5], [6, 7], [8, 9]]
    again = Logits()
    assert cache_teacher(again, batches(), tmp_path / "cut", FINGERPRINT, **options) == SAMPLES
    assert not again.calls
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


@pytest.mark.medium
def test_a_killed_process_leaves_whole_files_and_the_next_goes_on(tmp_path: Path) -> None:
    code = (
        "import signal\nfrom pathlib import Path\nfrom qatkit.distillation.cache import cache_teacher\n"
        "from tests.distillation.test_cache import FINGERPRINT, Logits, batches\nlogits = Logits()\n"
        "def hanging(batch):\n    if len(logits.calls) == 3:\n        signal.pause()\n    return logits(batch)\n"
        f"cache_teacher(hanging, batches(), Path({str(tmp_path / 'cut')!r}), FINGERPRINT, k=8, shard_batches=1)\n"
    )
    process = subprocess.Popen([warm.python(), "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    wait_for(tmp_path / "cut" / "000001.arrow", process)
    process.kill()
    process.communicate()  # until the writing process has ended
    assert not is_complete(tmp_path / "cut")
    teacher = Logits()
    for folder, answers in (("whole", Logits()), ("cut", teacher)):
        cache_teacher(answers, batches(), tmp_path / folder, FINGERPRINT, k=8, shard_batches=1)
    assert len(teacher.calls) < len(batches())
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_a_cache_with_another_fingerprint_is_refused_by_the_changed_key(tmp_path: Path) -> None:
    cache_teacher(Logits(), batches(), tmp_path, FINGERPRINT)
    other = FINGERPRINT | {"tokenizer": "d4"}
    with pytest.raises(QatkitError, match="tokenizer: was c3, is now d4"):
        CachedTeacher(tmp_path, other)
    with pytest.raises(QatkitError, match="tokenizer: was c3, is now d4"):
        cache_teacher(Logits(), batches(), tmp_path, other)
    with pytest.raises(QatkitError, match="k: was 64, is now 32"):
        cache_teacher(Logits(), batches(), tmp_path, FINGERPRINT, k=32)


def test_samples_of_different_lengths_are_padded_and_padding_does_not_count(tmp_path: Path) -> None:
    teacher = Logits()

    def cut(batch: Tensor) -> Tensor:
        return teacher(batch)[:, : 3 if batch[0] == 0 else LENGTH]

    cache_teacher(cut, batches(), tmp_path, FINGERPRINT, k=16)
    cached = CachedTeacher(tmp_path, FINGERPRINT)
    student = sines(2, 2, LENGTH + 1, CLASSES, scale=6)
    held = torch.tensor([[True] * 3 + [False] * 4, [True] * 6 + [False]])
    assert torch.equal(cached([0, 9]).mask, held[:, :LENGTH])
    everything = torch.cat([teacher.everything[[0, 9]], torch.zeros(2, 1, CLASSES)], dim=1)
    expected = top_k_kd_loss(student, everything, 16, mask=held)
    assert cached.loss(student, [0, 9]).item() == pytest.approx(expected.item(), rel=1e-3)


def test_mistakes_are_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=r"no cache in .*; run cache_teacher\(\.\.\., folder\) first"):
        CachedTeacher(tmp_path, FINGERPRINT)
    broken = Logits()
    broken.everything[5] = torch.nan
    with pytest.raises(QatkitError, match=r"batch 2 \(counting from 0\) contain NaN"):
        cache_teacher(broken, batches(), tmp_path, FINGERPRINT)
    cache_teacher(Logits(), batches(), tmp_path, FINGERPRINT)
    with pytest.raises(QatkitError, match=r"samples: \[10\] are not all in the cache; use indices from 0 to 9"):
        CachedTeacher(tmp_path, FINGERPRINT)([10])


def test_the_hash_of_a_model_depends_on_its_weights_and_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    first = model_hash(model)
    assert model_hash(model) == first
    assert model_hash(model[0]) != first
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    assert model_hash(model) != first


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    cache_teacher(Logits(), batches(), tmp_path, FINGERPRINT, k=8, shard_batches=2)
    return tmp_path


def test_no_flipped_bit_of_the_outputs_is_silent(written: Path) -> None:
    files = sorted(written.glob("*.arrow"))
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        for position in range(0, len(whole), len(whole) // 11):
            flip(path, position)
            with pytest.raises(
                QatkitError, match=rf"{path} has changed since it was written; restore the file, or delete"
            ):
                CachedTeacher(written, FINGERPRINT)
            path.write_bytes(whole)
        path.write_bytes(whole[:-1])
        with pytest.raises(QatkitError, match=f"{path} has changed"):
            cache_teacher(Logits(), batches(), written, FINGERPRINT, k=8, shard_batches=2)
        path.unlink()
        with pytest.raises(QatkitError, match=f"{path} is missing"):
            CachedTeacher(written, FINGERPRINT)
        path.write_bytes(whole)
    CachedTeacher(written, FINGERPRINT)


def test_no_flipped_bit_of_the_manifest_is_silent(written: Path) -> None:
    path, cache = written / "cache.json", read_manifest(written)
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        try:
            assert read_manifest(written) == cache  # a blank became another blank
        except QatkitError as error:
            assert str(path) in str(error)  # noqa: PT017  (an error is what most flips must give)
        path.write_bytes(whole)


def test_a_changed_file_of_an_unfinished_cache_is_not_built_upon(written: Path, tmp_path: Path) -> None:
    cache = read_manifest(written)
    assert cache is not None
    replace(cache, samples=None, tokens=None).write(written)
    flip(written / "000001.arrow", 100)
    with pytest.raises(QatkitError, match=r"000001\.arrow has changed since it was written"):
        cache_teacher(Logits(), batches(), written, FINGERPRINT, k=8, shard_batches=2)
