"""A teacher's likeliest answers on disk, computed once, so that it need not be in memory while a student trains.

A folder holds `teacher.json`, which says of which teacher and which corpus it is, and shards
`answers-00000.safetensors` of `SHARD_BLOCKS` blocks each:

- `input_ids` `(blocks, length)` int32: what the teacher read, compared with what the student reads,
- `ids` `(blocks, length, k)` int32: its `k` likeliest next tokens, the likeliest first,
- `logits` `(blocks, length, k)` float32: their logits over the temperature,
- `logsumexp` `(blocks, length)` float32: that of all logits over the temperature.

Beside each stands `answers-00000.sha256` with its hash, which is compared when the shard is first read. A shard appears
whole or not at all; a build that was cut off goes on behind the last one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lmopt.errors import (
    ArtifactNotFoundError,
    CorruptArtifactError,
    UnsupportedOptionError,
)
from lmopt.training.divergences import top_k_divergence
from lmopt.training.objective import IGNORE, Batch
from lmopt.training.teachers import learnt_rows

STATED: Final = "teacher.json"
"""File that says what the folder holds."""
SHARD_BLOCKS: Final = 64
_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What a folder's answers are of.

    Attributes:
        teacher: Fingerprint of the teacher's weights and configuration.
        corpus: Fingerprint of the corpus.
        block_size: Tokens of a block.
        blocks: Number of blocks.
        vocab_size: Width of the teacher's logits.
        top_k: Answers kept at each position.
        temperature: That the logits were divided by.
        bf16: Whether the teacher computed in bfloat16.
        version: Of this format.
    """

    teacher: str
    corpus: str
    block_size: int
    blocks: int
    vocab_size: int
    top_k: int
    temperature: float
    bf16: bool = False
    version: int = _VERSION


class TeacherCache:
    """Answers of a teacher, read from disk; a `lmopt.training.teachers.Teacher`.

    Args:
        folder: Folder that `build_teacher_cache` has filled.

    Raises:
        ArtifactNotFoundError: There is no such folder, or it is not complete.
        CorruptArtifactError: `teacher.json` is not of this format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_facts(folder)
        missing = [
            place for place in range(shard_count(self.facts)) if not shard_path(folder, place).is_file()
        ]
        if missing:
            raise ArtifactNotFoundError(
                f"{folder} lacks {shard_path(folder, missing[0]).name} ({len(missing)} of "
                f"{shard_count(self.facts)} shards): its build was cut off. Go on with it: "
                "build_teacher_cache with the same teacher, corpus and folder"
            )
        self._open: dict[int, Any] = {}

    def divergence(self, batch: Batch, logits: Tensor, *, temperature: float, beta: float) -> Tensor:
        """Forward KL over the kept answers and one event for all others; see `top_k_divergence`.

        Raises:
            UnsupportedOptionError: Another temperature than the cache's, or a `beta` other than 0, which needs all
                logits.
            CorruptArtifactError: The student reads something else than the teacher did, or a shard was changed.
        """
        if temperature != self.facts.temperature or beta != 0:
            raise UnsupportedOptionError(
                f"temperature={temperature:g} and beta={beta:g} are asked for, but {self.folder} holds the likeliest "
                f"answers at temperature {self.facts.temperature:g}, which serve beta=0 (forward KL) only. Build "
                "another cache, or keep the teacher in memory: LiveTeacher(module)"
            )
        found = [self._block(int(number)) for number in batch.blocks]
        read = torch.from_numpy(np.stack([one["input_ids"] for one in found]))
        if not torch.equal(read.to(torch.int64), batch.input_ids.cpu()):
            raise CorruptArtifactError(
                f"block {int(batch.blocks[0])} or a block beside it holds other tokens than the teacher read for "
                f"{self.folder}: the corpus, its order or block_size differ. Build the cache anew in another folder"
            )
        learnt = batch.labels != IGNORE

        def given(name: str) -> Tensor:
            stacked = torch.from_numpy(np.stack([one[name] for one in found])).to(logits.device)
            return learnt_rows(stacked, learnt)

        kept, total = given("logits"), given("logsumexp")
        log_p = kept - total[:, None]
        return top_k_divergence(
            learnt_rows(logits, learnt), given("ids").to(torch.int64), log_p,
            log_tail=log_of_the_rest(log_p), temperature=temperature,
        )  # fmt: skip

    def describe(self) -> Mapping[str, Any]:
        """Name teacher and cache."""
        return {"teacher": self.facts.teacher, "top_k": self.facts.top_k}

    def _block(self, number: int) -> dict[str, np.ndarray[Any, Any]]:
        place, row = divmod(number, SHARD_BLOCKS)
        if place not in self._open:
            path = shard_path(self.folder, place)
            if not hash_path(path).is_file() or hash_path(path).read_text(encoding="ascii") != hash_of(path):
                raise CorruptArtifactError(
                    f"{path} is not the file that was written: {hash_path(path).name} has another hash. Build it "
                    f"again: rm {path}, then build_teacher_cache with the same teacher, corpus and folder"
                )
            self._open[place] = safe_open(str(path), framework="np")
        shard = self._open[place]
        return {name: shard.get_slice(name)[row] for name in ("input_ids", "ids", "logits", "logsumexp")}


def log_of_the_rest(log_p: Tensor) -> Tensor:
    """Logarithm of what the kept answers leave of probability 1: `-inf` where that is nothing.

    Args:
        log_p: `(positions, k)` log-probabilities.
    """
    kept = log_p.double().exp().sum(-1)
    # Float32 logits know a probability near 1 to some 1e-7 only: a smaller rest is rounding.
    rest = torch.where(kept < 1 - 1e-6, 1 - kept, torch.zeros_like(kept))
    return rest.log().to(log_p.dtype)


def shard_count(facts: CacheFacts) -> int:
    """Number of shards that a folder has when it is complete."""
    return -(-facts.blocks // SHARD_BLOCKS)


def shard_path(folder: Path, place: int) -> Path:
    """Path of a shard."""
    return folder / f"answers-{place:05}.safetensors"


def hash_path(shard: Path) -> Path:
    """Path of the file that holds a shard's hash."""
    return shard.with_suffix(".sha256")


def hash_of(shard: Path) -> str:
    """SHA-256 of a shard, in hexadecimal digits."""
    with shard.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_facts(folder: Path) -> CacheFacts:
    """Read what a folder's answers are of.

    Raises:
        ArtifactNotFoundError: It does not say.
        CorruptArtifactError: What it says is damaged, or of another version.
    """
    path = folder / STATED
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = CacheFacts(**content)
    except FileNotFoundError:
        raise ArtifactNotFoundError(
            f"{folder} holds no {STATED}: no teacher's answers. Make them: build_teacher_cache"
        ) from None
    except (ValueError, TypeError) as error:
        raise CorruptArtifactError(
            f"{path} is damaged ({error}); remove the folder and build it anew"
        ) from error
    if facts.version != _VERSION:
        raise CorruptArtifactError(
            f"{path} has version {facts.version}; this lmopt reads {_VERSION}. Build it anew"
        )
    return facts
