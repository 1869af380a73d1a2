"""A small correct engine in NumPy, in short methods, so that a mutant can break just one of them.

Its model: every token leaves a vector; a position's logits read the sum of the vectors before it,
each fading with its distance, and the position itself.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from lmopt.contracts import EngineReport, EngineRequest, PaddingSide
from lmopt.errors import (
    ArtifactNotFoundError,
    ClosedError,
    DtypeError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.signature import ArrayState, Signature, Step
from lmopt.types import BATCH, PAST, SEQUENCE, TOTAL, AnyArray, FloatArray, IntArray, TensorSpec
from lmopt_fake.spec import BACKEND

VOCAB, WIDTH, FADE = 23, 16, 0.8
KEY = "past_key_values.0.key"

SIGNATURE = Signature.from_graph(
    (
        TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
        TensorSpec("attention_mask", "int64", (BATCH, TOTAL)),
        TensorSpec("position_ids", "int64", (BATCH, SEQUENCE)),
        TensorSpec(KEY, "float32", (BATCH, 1, PAST, WIDTH)),
    ),
    (
        TensorSpec("logits", "float32", (BATCH, SEQUENCE, VOCAB)),
        TensorSpec("present.0.key", "float32", (BATCH, 1, TOTAL, WIDTH)),
    ),
)


def make_weights() -> FloatArray:
    """`(2, VOCAB, WIDTH)`: the vector of each token, and what reads the sum."""
    return np.random.default_rng(0).normal(size=(2, VOCAB, WIDTH)).astype(np.float32)


def reference(weights: FloatArray, row: IntArray) -> FloatArray:
    """The definition, one position after the other."""
    total, logits = np.zeros(WIDTH, np.float32), []
    for position, token in enumerate(row):
        total = np.float32(FADE) * total + weights[0][token]
        logits.append(weights[1] @ total + np.float32(np.sin(position)))
    return np.stack(logits).astype(np.float32)


class FakeEngine:
    """See the module's docstring."""

    def __init__(self, request: EngineRequest) -> None:
        self.facts = request.facts
        self.weights = self.read_weights(request)
        self.closed = False

    def read_weights(self, request: EngineRequest) -> FloatArray:
        assert request.artifact is not None
        return np.load(request.artifact.file("weights.npy"))

    @property
    def ragged(self) -> bool:
        return True

    def check_open(self) -> None:
        if self.closed:
            raise ClosedError("closed")

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> ArrayState:
        self.check_open()
        return SIGNATURE.begin(batch, padding_side)

    def layout(self, input_ids: IntArray, lengths: IntArray, state: ArrayState) -> Step:
        return SIGNATURE.step(input_ids, lengths, state)

    def graph(self, feeds: Mapping[str, AnyArray], cache: FloatArray) -> tuple[FloatArray, FloatArray]:
        ids, mask, positions = feeds["input_ids"], feeds["attention_mask"], feeds["position_ids"]
        cache = np.concatenate([cache, self.weights[0][ids][:, None]], axis=2)
        where = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        distance = positions[:, :, None] - where[:, None]
        sees = (distance >= 0) & (mask[:, None] > 0)
        fade = np.where(sees, np.float32(FADE) ** np.maximum(distance, 0), 0)
        logits = fade @ cache[:, 0] @ self.weights[1].T + np.sin(positions)[..., None]
        return logits.astype(np.float32), cache

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: ArrayState, *, last_only: bool = False
    ) -> tuple[FloatArray, ArrayState]:
        self.check_open()
        for array in (input_ids, lengths):
            if array.dtype.kind not in "iu":
                raise DtypeError(f"{array.dtype} given, int64 expected")
        step = self.layout(input_ids, lengths, state)
        logits, cache = self.graph(step.feeds, state.tensors[KEY])
        after = ArrayState({KEY: cache}, step.mask, step.lengths, step.padding_side)
        return self.give(step, logits, last_only), after

    def give(self, step: Step, logits: FloatArray, last_only: bool) -> FloatArray:
        return step.align(logits, last_only=last_only)

    def select(self, state: ArrayState, rows: IntArray) -> ArrayState:
        return SIGNATURE.select(state, rows)

    def join(self, states: Sequence[ArrayState]) -> ArrayState:
        return SIGNATURE.join(states)

    @property
    def rewinds(self) -> bool:
        return True

    def rewind(self, state: ArrayState, lengths: IntArray) -> ArrayState:
        kept, mask, slots = SIGNATURE.forget(state, lengths)
        return ArrayState({KEY: state.tensors[KEY][:, :, :slots]}, mask, kept, state.padding_side)

    def copy(self, state: ArrayState, *, capacity: int | None = None) -> ArrayState:
        tensors = {KEY: state.tensors[KEY].copy()}
        return ArrayState(tensors, state.mask.copy(), state.lengths.copy(), state.padding_side)

    most_best = 6

    def forward_best(
        self, input_ids: IntArray, state: ArrayState, count: int
    ) -> tuple[list[FloatArray], list[IntArray], ArrayState]:
        if not 1 <= count <= self.most_best:
            raise UnsupportedOptionError(f"{count} logits were asked for; there are 1 to {self.most_best}")
        logits, after = self.forward(input_ids, np.ones(len(input_ids), np.int64), state, last_only=True)
        ids = [self.best(line, count) for line in logits[:, 0]]
        return [line[one] for line, one in zip(logits[:, 0], ids, strict=True)], ids, after

    def best(self, line: FloatArray, count: int) -> IntArray:
        return np.flatnonzero(line >= np.sort(line)[-count])

    def tap_names(self) -> list[str]:
        return ["sum", "logits"]

    def taps(self, input_ids: IntArray, names: Sequence[str]) -> dict[str, AnyArray]:
        if set(names) - {"sum", "logits"}:
            raise UnsupportedOptionError(f"no such tap among {names}")
        logits, _ = self.forward(
            input_ids, np.full(len(input_ids), input_ids.shape[1]), self.begin(len(input_ids))
        )
        return dict.fromkeys(names, logits)

    def report(self) -> EngineReport:
        return EngineReport("fake", "cpu", "float32", 0, {"numpy": version("numpy")})

    def close(self) -> None:
        self.closed = True


ENGINE: type[FakeEngine] = FakeEngine
"""The class that `open_engine` opens; tests put a mutant here."""


def check_request(request: EngineRequest) -> None:
    """Refuse what cannot be honoured."""
    if request.options:
        raise UnsupportedOptionError(f"unknown option {min(request.options)!r}")
    if request.threads is not None:
        raise UnsupportedOptionError("threads cannot be set")
    support = BACKEND.supports(formats=("fake",), device=request.device, dtype=request.dtype)
    if not support.ok:
        raise UnsupportedError("; ".join(support.reasons))
    if request.artifact is None:
        raise ArtifactNotFoundError("no artefact given")


def open_engine(request: EngineRequest) -> Any:
    """Open whatever class is under test."""
    check_request(request)
    return ENGINE(request)
