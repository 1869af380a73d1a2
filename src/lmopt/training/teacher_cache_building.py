"""Let a teacher read a corpus once, and keep its likeliest answers; see `lmopt.training.teacher_cache`."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from lmopt.artifact.durable import sync
from lmopt.errors import ArtifactExistsError, UnsupportedOptionError
from lmopt.training import teacher_cache
from lmopt.training.data import Corpus
from lmopt.training.teacher_cache import (
    STATED,
    CacheFacts,
    TeacherCache,
    hash_of,
    hash_path,
    read_facts,
    shard_count,
    shard_path,
)
from lmopt.training.teachers import LiveTeacher
from lmopt.types import IntArray


def build_teacher_cache(
    teacher: LiveTeacher,
    corpus: Corpus,
    folder: Path,
    *,
    block_size: int,
    top_k: int = 64,
    temperature: float = 1.0,
    batch_rows: int = 8,
    bf16: bool = False,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> TeacherCache:
    """Let a teacher read a corpus once and keep its likeliest answers.

    Args:
        teacher: The teacher; its `name` should be its fingerprint.
        corpus: What the student will be trained on.
        folder: Where to keep them; what an earlier build with the same arguments has finished is kept.
        block_size: Tokens of a block, the `block_size` of the training.
        top_k: Answers kept at each position. 64 take 520 bytes a token.
        temperature: Of the distillation.
        batch_rows: Blocks read at once.
        bf16: Whether to compute in bfloat16.
        device: Where the teacher reads; it is moved there.
        progress: Called with the stage's name, the blocks done and their total.

    Raises:
        UnsupportedOptionError: `top_k` or `temperature` is impossible.
        ArtifactExistsError: The folder holds the answers of another teacher, corpus or form.
    """
    blocks = -(-(corpus.ids.size - 1) // block_size)
    width = teacher.logits(torch.from_numpy(corpus.ids[None, :1].astype(np.int64))).shape[-1]
    if not 1 <= top_k <= width or not 0 < temperature < math.inf:
        raise UnsupportedOptionError(
            f"top_k is {top_k!r} and temperature {temperature!r}; expected 1 .. {width} and a number above 0"
        )
    facts = CacheFacts(teacher.name, corpus.fingerprint, block_size, blocks, width, top_k, temperature, bf16)
    folder.mkdir(parents=True, exist_ok=True)
    # Processes that train together all come here: the first one works, the others find it done.
    with FileLock(folder / ".lock"):
        _claim(folder, facts)
        _fill(folder, facts, teacher, corpus, batch_rows, device, progress)
    return TeacherCache(folder)


def _fill(
    folder: Path,
    facts: CacheFacts,
    teacher: LiveTeacher,
    corpus: Corpus,
    batch_rows: int,
    device: str,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Write the shards that are not there yet."""
    for place in range(shard_count(facts)):
        target = shard_path(folder, place)
        if target.is_file():
            continue
        parts: list[dict[str, Tensor]] = []
        last = min((place + 1) * teacher_cache.SHARD_BLOCKS, facts.blocks)
        for ids in _batches(corpus, facts.block_size, place * teacher_cache.SHARD_BLOCKS, last, batch_rows):
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=facts.bf16):
                logits = teacher.logits(torch.from_numpy(ids).to(device))
            parts.append(_answers(ids, logits, facts.top_k, facts.temperature))
            if progress is not None:
                progress(
                    "read by the teacher",
                    place * teacher_cache.SHARD_BLOCKS + sum(len(one["ids"]) for one in parts),
                    facts.blocks,
                )
        staged = target.with_suffix(".part")
        save_file({name: torch.cat([one[name] for one in parts]) for name in parts[0]}, staged)
        # The hash first: a shard that is there has one, whatever cut the build off.
        hash_path(target).write_text(hash_of(staged), encoding="ascii")
        sync(hash_path(target))
        sync(staged)
        staged.rename(target)
        sync(folder)


def _answers(ids: IntArray, logits: Tensor, top_k: int, temperature: float) -> dict[str, Tensor]:
    cooled = logits.float() / temperature
    best = cooled.topk(top_k, dim=-1)
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int32)),
        "ids": best.indices.to(torch.int32).cpu(),
        "logits": best.values.cpu().contiguous(),
        "logsumexp": cooled.logsumexp(-1).cpu(),
    }


def _batches(corpus: Corpus, length: int, first: int, last: int, rows: int) -> Iterator[IntArray]:
    """Cut blocks as `lmopt.training.sources.ShuffledBlocks` does."""
    for start in range(first, last, rows):
        numbers = np.arange(start, min(start + rows, last))
        places = numbers[:, None] * length + np.arange(length)
        yield corpus.ids[np.minimum(places, corpus.ids.size - 1)].astype(np.int64)


def _claim(folder: Path, facts: CacheFacts) -> None:
    """Write what the folder will hold, or see that it is the same."""
    stated = folder / STATED
    if stated.is_file():
        there = asdict(read_facts(folder))
        if unlike := [name for name, value in asdict(facts).items() if there[name] != value]:
            raise ArtifactExistsError(
                f"{folder} holds answers for another {', '.join(unlike)} (there: {there[unlike[0]]!r}, asked for: "
                f"{getattr(facts, unlike[0])!r}). Give another folder, or remove this one: rm -r {folder}"
            )
        return
    staged = stated.with_suffix(".part")
    staged.write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    sync(staged)
    staged.rename(stated)
