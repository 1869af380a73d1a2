"""Answers of a teacher on disk: equal to the teacher itself, whole or not there, and never another's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lmopt.errors import (
    ArtifactExistsError,
    ArtifactNotFoundError,
    CorruptArtifactError,
    UnsupportedOptionError,
)
from lmopt.testing.models import VOCAB_SIZE, tiny_llama
from lmopt.training import teacher_cache
from lmopt.training.config import TrainingConfig
from lmopt.training.data import Corpus
from lmopt.training.objective import Batch
from lmopt.training.sources import ShuffledBlocks
from lmopt.training.teacher_cache import TeacherCache, log_of_the_rest
from lmopt.training.teacher_cache_building import build_teacher_cache
from lmopt.training.teachers import LiveTeacher

LENGTH = 10


@pytest.fixture
def corpus() -> Corpus:
    # The last block is shorter than the others.
    return Corpus(np.random.default_rng(0).integers(0, VOCAB_SIZE, 74).astype(np.int32), 1)


@pytest.fixture
def teacher() -> LiveTeacher:
    return LiveTeacher(tiny_llama(0), "the-teacher")


def batches(corpus: Corpus) -> list[Batch]:
    """All blocks, as the loop reads them."""
    config = TrainingConfig(block_size=LENGTH)
    source = ShuffledBlocks(corpus, LENGTH, 4, config.seed)
    found = [source.rows(step, 0, 4) for step in range(2)]
    return [
        Batch(torch.from_numpy(one.input_ids), torch.from_numpy(one.labels), one.blocks, step)
        for step, one in enumerate(found)
    ]


def student_logits(batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = tiny_llama(1)(input_ids=batch.input_ids).logits
    return logits.detach().requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_answers_it_is_the_teacher(
    corpus: Corpus, teacher: LiveTeacher, tmp_path: Path, temperature: float
) -> None:
    cache = build_teacher_cache(
        teacher, corpus, tmp_path / "c", block_size=LENGTH, top_k=VOCAB_SIZE, temperature=temperature
    )
    for batch in batches(corpus):
        slopes = []
        for one in (teacher, cache):
            logits = student_logits(batch)
            value = one.divergence(batch, logits, temperature=temperature, beta=0)  # type: ignore[attr-defined]
            slopes.append((value.detach(), *torch.autograd.grad(value.mean(), logits)))
        torch.testing.assert_close(slopes[0][0], slopes[1][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slopes[0][1], slopes[1][1], rtol=1e-3, atol=1e-6)


def test_with_few_answers_it_stays_below_and_near(
    corpus: Corpus, teacher: LiveTeacher, tmp_path: Path
) -> None:
    (batch, _) = batches(corpus)
    logits = student_logits(batch)
    whole = teacher.divergence(batch, logits, temperature=1, beta=0).mean()
    found = []
    for k in (4, 16, 64):
        cache = build_teacher_cache(teacher, corpus, tmp_path / str(k), block_size=LENGTH, top_k=k)
        found.append(float(cache.divergence(batch, logits, temperature=1, beta=0).mean()))
    assert found == sorted(found)
    assert found[0] < float(whole)
    assert found[-1] == pytest.approx(float(whole), rel=0.05)
    assert found[-1] <= float(whole) + 1e-6


def test_the_rest_of_probability_one() -> None:
    log_p = torch.tensor([[0.5, 0.25], [0.75, 0.25], [1.0, 1e-30]]).log()
    assert log_of_the_rest(log_p).exp().tolist() == pytest.approx([0.25, 0, 0])


def test_a_build_that_was_cut_off_goes_on(
    corpus: Corpus, teacher: LiveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD_BLOCKS", 3)
    folder = tmp_path / "c"
    calls: list[int] = []

    class CutOffError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        assert total == 8
        calls.append(done)
        if done == 5:
            raise CutOffError

    with pytest.raises(CutOffError):
        build_teacher_cache(teacher, corpus, folder, block_size=LENGTH, top_k=4, batch_rows=1, progress=stop)
    assert sorted(one.name for one in folder.glob("answers*.safetensors")) == ["answers-00000.safetensors"]
    with pytest.raises(ArtifactNotFoundError, match=r"lacks answers-00001.safetensors \(2 of 3 shards\)"):
        TeacherCache(folder)
    first = (folder / "answers-00000.safetensors").stat().st_mtime_ns
    calls.clear()
    build_teacher_cache(
        teacher, corpus, folder, block_size=LENGTH, top_k=4, batch_rows=1,
        progress=lambda stage, done, total: calls.append(done),
    )  # fmt: skip
    assert calls == [4, 5, 6, 7, 8]
    assert (folder / "answers-00000.safetensors").stat().st_mtime_ns == first
    assert not list(folder.glob("*.part"))


def test_another_teacher_corpus_or_form_is_refused(
    corpus: Corpus, teacher: LiveTeacher, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    build_teacher_cache(teacher, corpus, folder, block_size=LENGTH, top_k=4)
    other = Corpus(corpus.ids[::-1].copy(), 1)
    with pytest.raises(ArtifactExistsError, match="another corpus"):
        build_teacher_cache(teacher, other, folder, block_size=LENGTH, top_k=4)
    with pytest.raises(ArtifactExistsError, match="another teacher"):
        build_teacher_cache(LiveTeacher(teacher.module, "b"), corpus, folder, block_size=LENGTH, top_k=4)
    with pytest.raises(ArtifactExistsError, match=r"another top_k.*there: 4, asked for: 5"):
        build_teacher_cache(teacher, corpus, folder, block_size=LENGTH, top_k=5)


def test_a_student_that_reads_something_else_is_told(
    corpus: Corpus, teacher: LiveTeacher, tmp_path: Path
) -> None:
    cache = build_teacher_cache(teacher, corpus, tmp_path / "c", block_size=LENGTH, top_k=4)
    (batch, _) = batches(corpus)
    ids = batch.input_ids.clone()
    ids[-1, -1] = (ids[-1, -1] + 1) % VOCAB_SIZE
    changed = Batch(ids, batch.labels, batch.blocks, 0)
    with pytest.raises(CorruptArtifactError, match="other tokens than the teacher read"):
        cache.divergence(changed, student_logits(batch), temperature=1, beta=0)
    for wrong in ({"temperature": 2.0, "beta": 0.0}, {"temperature": 1.0, "beta": 0.5}):
        with pytest.raises(UnsupportedOptionError, match="forward KL"):
            cache.divergence(batch, student_logits(batch), **wrong)


def test_a_shard_that_was_changed_is_not_believed(
    corpus: Corpus, teacher: LiveTeacher, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    build_teacher_cache(teacher, corpus, folder, block_size=LENGTH, top_k=4)
    shard = folder / "answers-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # the last byte of an array: the file still parses
    shard.write_bytes(content)
    (batch, _) = batches(corpus)
    with pytest.raises(CorruptArtifactError, match="not the file that was written"):
        TeacherCache(folder).divergence(batch, student_logits(batch), temperature=1, beta=0)
    shard.unlink()
    again = build_teacher_cache(teacher, corpus, folder, block_size=LENGTH, top_k=4)
    assert again.divergence(batch, student_logits(batch), temperature=1, beta=0).isfinite().all()


def test_damage_and_absence_are_told(tmp_path: Path, corpus: Corpus, teacher: LiveTeacher) -> None:
    with pytest.raises(ArtifactNotFoundError, match="no teacher's answers"):
        TeacherCache(tmp_path)
    with pytest.raises(UnsupportedOptionError, match="top_k is 98"):
        build_teacher_cache(teacher, corpus, tmp_path / "c", block_size=LENGTH, top_k=98)
    (tmp_path / "teacher.json").write_text('{"teacher": 1}')
    with pytest.raises(CorruptArtifactError, match="damaged"):
        TeacherCache(tmp_path)
