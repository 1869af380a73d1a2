"""One model split over several processes: tensor parallelism behind the engine contract.

The engine in the caller is a small shell. Every rank is a process of its own (`tensor_parallel_rank`), rank 0 too, so
that neither torch.distributed's one process group nor a rank's death touches the caller. Ranks hold the weights and
the states; calls and logits go through pipes.
"""

import collections
import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from lmopt.backends.torch.language_model import as_decoder, is_transformers
from lmopt.backends.torch.tensor_parallel_plans import check_module
from lmopt.backends.torch.tensor_parallel_ranks import Ranks
from lmopt.contracts import EngineReport, EngineRequest, PaddingSide
from lmopt.errors import (
    ClosedError,
    DeviceError,
    ParityError,
    UnsupportedError,
)
from lmopt.platform import usable_cpus
from lmopt.types import AnyArray, FloatArray, IntArray

_PROBE_TOKENS: Final = 8
_TOLERANCE: Final = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Most difference of the probe's logits, relative to the largest of them: a wrong plan exceeds it by far."""


def open_parallel(
    request: EngineRequest, size: int, plan: Mapping[str, str] | None
) -> "TensorParallelEngine":
    """Split a live module over processes.

    Args:
        request: What to open.
        size: Ranks.
        plan: For own modules: linears by path, with `*` for any layer, and their style.

    Raises:
        UnsupportedOptionError: The size does not divide the model's heads, or the plan is none.
        UnsupportedError: The model cannot be split.
        DeviceError: There are fewer GPUs than ranks.
        ParityError: The split model does not compute what the whole one does: the plan is wrong.
        WorkerDiedError: A rank died.
    """
    if request.module is None:
        raise UnsupportedError(
            "tensor parallelism needs a model, not an exported program: give lmopt the original"
        )
    check_module(request.module, size, plan)
    engine = TensorParallelEngine(request, size, None if plan is None else dict(plan))
    try:
        _probe(engine, request.module)
    except BaseException:
        engine.close()
        raise
    return engine


class RemoteState:
    """A state that the ranks hold; they drop it with this object."""

    def __init__(self, key: int, lengths: IntArray, dropped: "collections.deque[int]") -> None:
        self.key = key
        self.lengths = lengths
        self._dropped = dropped

    def __del__(self) -> None:
        """Tell the ranks, with the next call."""
        self._dropped.append(self.key)


class TensorParallelEngine:
    """The shell of a model that is split over processes; see `open_parallel`."""

    def __init__(self, request: EngineRequest, size: int, plan: dict[str, str] | None) -> None:
        module: nn.Module = request.module  # type: ignore[assignment]
        self.facts = request.facts
        self._device = torch.device(request.device).type
        self._threads = request.threads or max(1, usable_cpus() // size)
        self._keys = itertools.count()
        self._dropped: collections.deque[int] = collections.deque()
        if self._device == "cuda" and torch.cuda.device_count() < size:
            raise DeviceError(
                f"tensor_parallel_size={size} needs so many GPUs; this machine has {torch.cuda.device_count()}"
            )
        own = str(next(module.parameters()).dtype).removeprefix("torch.")
        folder = Path(tempfile.mkdtemp(prefix="lmopt-ranks-"))  # nobody else may enter it
        try:
            order = {
                "size": size,
                "model": str(_hand_over(module, folder)),
                "meeting": str(folder / "meeting"),
                "dtype": own if request.dtype == "auto" else request.dtype,
                "threads": self._threads,
                "plan": plan,
                "facts": asdict(request.facts),
            }
            variables = [_variables(number, size, self._device) for number in range(size)]
            self._ranks = Ranks(f"{__package__}.tensor_parallel_rank", variables)
            places = [f"cuda:{number}" if self._device == "cuda" else "cpu" for number in range(size)]
            try:
                opened, _ = self._ranks.ask(
                    lambda rank: {**order, "rank": rank, "device": places[rank]}, doing="it opened the model"
                )
            except BaseException:
                self._ranks.end()
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.ragged: bool = opened["ragged"]
        self.rewinds: bool = opened["rewinds"]
        self._dtype = opened["dtype"]

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> RemoteState:
        """Make the empty state of `batch` rows."""
        return self._state("begin", batch=batch, capacity=capacity, padding_side=padding_side)[0]

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: RemoteState, *, last_only: bool = False
    ) -> tuple[FloatArray, RemoteState]:
        """Read new tokens; see `lmopt.contracts.Engine.forward`."""
        ids = [np.asarray(input_ids, np.int64), np.asarray(lengths, np.int64)]
        after, logits = self._state("forward", ids, state=state.key, last_only=last_only)
        return logits[0], after

    def select(self, state: RemoteState, rows: IntArray) -> RemoteState:
        """Keep, drop, reorder or repeat rows."""
        return self._state("select", [np.asarray(rows, np.int64)], state=state.key)[0]

    def join(self, states: Sequence[RemoteState]) -> RemoteState:
        """Put the rows of several states into one batch."""
        return self._state("join", states=[one.key for one in states])[0]

    def rewind(self, state: RemoteState, lengths: IntArray) -> RemoteState:
        """Let each row forget all but its first tokens."""
        return self._state("rewind", [np.asarray(lengths, np.int64)], state=state.key)[0]

    def copy(self, state: RemoteState, *, capacity: int | None = None) -> RemoteState:
        """Make an independent copy."""
        return self._state("copy", state=state.key, capacity=capacity)[0]

    def report(self) -> EngineReport:
        """Say where the ranks are."""
        if not self._ranks.alive:
            raise ClosedError("this engine is closed; open a new lmopt.Runtime")
        return EngineReport(
            backend="torch",
            device=self._device,
            dtype=self._dtype,
            threads=self._threads,
            versions={"torch": version("torch")},
            details={
                "tensor_parallel_size": len(self._ranks),
                "ranks": self._ranks.pids,
                "ragged": self.ragged,
            },
        )

    def close(self) -> None:
        """End the ranks; calling it twice is harmless."""
        self._ranks.end()

    def _state(
        self, do: str, arrays: Sequence[AnyArray] = (), **order: Any
    ) -> tuple[RemoteState, list[AnyArray]]:
        """Let all ranks do the same; the new state, and what else rank 0 has to say."""
        key = next(self._keys)
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        whole = {"do": do, "key": key, "drop": dropped, **order}
        _, found = self._ranks.ask(lambda rank: whole, arrays, doing=f"it was asked to {do}")
        return RemoteState(key, found[0].copy(), self._dropped), found[1:]


def _hand_over(module: nn.Module, folder: Path) -> Path:
    """Write a module where its ranks find it."""
    if is_transformers(module):
        from lmopt.backends.torch.loading import quiet

        with quiet():
            module.save_pretrained(folder / "model")  # type: ignore[operator]
        return folder / "model"
    try:
        if own := [one for one in module.modules() if type(one).__module__ == "__main__"]:
            raise TypeError(f"{type(own[0]).__name__} stands in __main__")
        torch.save(module, folder / "model.pt")
    except Exception as error:
        raise UnsupportedError(
            f"{type(module).__name__} cannot be handed to other processes ({type(error).__name__}: {error}). Define "
            "its class at the top of a module that can be imported, not in a function, a notebook or a script."
        ) from error
    return folder / "model.pt"


def _variables(rank: int, size: int, device: str) -> dict[str, str]:
    """What torch.distributed and transformers read from the environment."""
    found = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    if device == "cpu":
        # transformers splits over accelerators where it sees any.
        found |= {
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
    return found


def _probe(engine: TensorParallelEngine, module: nn.Module) -> None:
    """Hold a few logits of the split model against those of the whole one."""
    ids = np.arange(1, _PROBE_TOKENS + 1, dtype=np.int64)[None] % engine.facts.vocab_size
    found, _ = engine.forward(ids, np.array([_PROBE_TOKENS]), engine.begin(1))
    device = next(module.parameters()).device
    with torch.no_grad():
        wanted = as_decoder(module.eval()).start(torch.from_numpy(ids).to(device))[0].float().cpu().numpy()
    error = float(np.abs(found - wanted).max() / max(1.0, float(np.abs(wanted).max())))
    if not error <= _TOLERANCE[engine.report().dtype]:
        raise ParityError(
            f"split over {len(engine.report().details['ranks'])} ranks, {type(module).__name__} computes something "
            f"else (relative difference {error:.2g}). The plan splits what must stay whole, such as one linear "
            "for queries, keys and values together."
        )
