"""Perplexity, and divergence from the reference, by lmopt's own measure, whoever gives the logits."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.worker import Worker, WorkerError
from lmopt.evaluation import DifferenceMeter, perplexity
from lmopt.types import FloatArray, IntArray, ModelFacts


@dataclass
class _State:
    lengths: IntArray


class LogitsOf:
    """An engine that has a worker compute, as far as `lmopt.evaluation.perplexity` needs one."""

    ragged = False

    def __init__(
        self, worker: Worker, facts: ModelFacts, folder: Path, see: Callable[[bytes, FloatArray], None]
    ):
        self.facts = facts
        self._worker, self._folder, self._see = worker, folder, see
        self._calls = 0

    def begin(self, batch: int, *, capacity: int | None = None, padding_side: str = "right") -> _State:
        """Give an empty state."""
        return _State(np.zeros(batch, np.int64))

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: _State, *, last_only: bool = False
    ) -> tuple[FloatArray, _State]:
        """Ask for the logits of the one row."""
        self._calls += 1
        file = self._folder / f"{self._calls}.npy"
        self._worker.logits(input_ids[0].tolist(), file)
        found = np.load(file, mmap_mode="r")
        if found.shape != (input_ids.shape[1], self.facts.vocab_size):
            raise WorkerError(f"the logits have shape {found.shape}")
        self._see(input_ids.tobytes(), found)
        return found[None], _State(lengths)


def qualities(
    workers: Mapping[str, Worker],
    reference: str | None,
    ids: Sequence[int],
    facts: ModelFacts,
    context: int = 512,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Measure each program on the same text.

    Args:
        workers: By name.
        reference: The one that the others are held against.
        ids: Text.
        facts: Of the model.
        context: Tokens of a window.
        progress: Told what is going on.

    Returns:
        By name `perplexity`, and with a reference `kl_mean`, `kl_p99` and `top1`; or `problem`.
    """
    found: dict[str, dict[str, Any]] = {}
    context = min(context, facts.context_length or context)
    with tempfile.TemporaryDirectory() as place:
        expected: dict[bytes, FloatArray] = {}
        names = sorted(workers, key=lambda name: name != reference)
        for name in names:
            progress(f"perplexity: {name}")
            meter = DifferenceMeter()

            def see(key: bytes, logits: FloatArray, name: str = name, meter: DifferenceMeter = meter) -> None:
                if name == reference:
                    expected[key] = logits
                elif key in expected:
                    meter.update(expected[key], np.asarray(logits))

            folder = Path(place) / str(len(found))
            folder.mkdir()
            workers[name].resume()
            try:
                engine: Any = LogitsOf(workers[name], facts, folder, see)
                measured = perplexity(engine, ids, context=context, stride=context)
            except WorkerError as error:
                found[name] = {"problem": str(error)}
                continue
            finally:
                if workers[name].process.poll() is None:
                    workers[name].pause()
            found[name] = {"perplexity": measured.value, "tokens_scored": measured.tokens_scored}
            if name != reference and expected:
                difference = meter.result()
                found[name] |= {
                    "kl_mean": difference.kl_mean,
                    "kl_p99": difference.kl_p99,
                    "top1": difference.top1_raw,
                }
            if name != reference:
                for file in folder.iterdir():
                    file.unlink()
    return found
