"""Run graphs whose state comes back longer, or of fixed size: portable ones, and decoders after an encoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lmopt.backends.onnxruntime.encoder import Encoder
from lmopt.backends.onnxruntime.graph import Graph, run_values
from lmopt.backends.onnxruntime.session import ort
from lmopt.checking import check_sources, state_begins_with_source
from lmopt.contracts import EngineReport, PaddingSide
from lmopt.signature import LOGITS, ArrayState, number_sources
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts


class GrowingCacheEngine:
    """One exported decoder; its state is kept as values of ONNX Runtime between calls.

    Args:
        graph: Graph of the dialect `"portable"`, or of a decoder with an encoder; closed by this engine.
        facts: Facts of the model.
        encoder: What runs once for a source, closed by this engine; `None` for models without an encoder.
    """

    def __init__(self, graph: Graph, facts: ModelFacts, encoder: Encoder | None = None) -> None:
        self.facts = facts
        self._graph = graph
        self._encoder = encoder
        self._signature = graph.signature
        self._outputs = [LOGITS, *(one.present for one in graph.signature.changing)]

    @property
    def ragged(self) -> bool:
        """Whether rows may be unequal: whether the graph takes a mask, and one of their sources."""
        return self._signature.has_mask and (self._encoder is None or self.ragged_sources)

    @property
    def ragged_sources(self) -> bool:
        """Whether sources may be unequal: whether the graphs take a mask for them, or one length only."""
        source = self.facts.source
        return source is not None and (source.fixed or self._signature.has_source_mask)

    @property
    def rewinds(self) -> bool:
        """Whether rows can forget their last tokens: whether the state is a cache and nothing else."""
        return self._signature.rewinds

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> ArrayState:
        """Make the empty state of `batch` rows; the cache grows, so `capacity` has no use here."""
        self._graph.session()
        if self._encoder is not None:
            raise state_begins_with_source()
        return _with_ort_values(self._signature.begin(batch, padding_side))

    def encode(
        self,
        inputs: AnyArray,
        lengths: IntArray,
        *,
        capacity: int | None = None,
        padding_side: PaddingSide = "right",
    ) -> ArrayState:
        """Read the sources of some rows; see `lmopt.contracts.SupportsEncoder.encode`."""
        self._graph.session()
        inputs, mask = check_sources(inputs, lengths, self.facts.source, ragged=self.ragged_sources)
        assert self._encoder is not None
        made = self._encoder.run(inputs, mask)
        state = replace(self._signature.begin(len(inputs), padding_side), sources=number_sources(len(inputs)))
        state.tensors = {
            name: made[name] if name in made else _to_ort(array) for name, array in state.tensors.items()
        }
        return state

    def encoded(self, state: ArrayState) -> Mapping[str, AnyArray]:
        """Show what rows hold of their sources."""
        self._graph.session()
        return {
            name: one.numpy().astype(np.float32) for name, one in self._signature.held(state, _taking).items()
        }

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: ArrayState, *, last_only: bool = False
    ) -> tuple[FloatArray, ArrayState]:
        """Read new tokens; see `lmopt.contracts.Engine.forward`."""
        session = self._graph.session()
        step = self._signature.step(input_ids, lengths, state)
        feeds = {name: _to_ort(array) for name, array in step.feeds.items()}
        try:
            logits, *present = run_values(
                session, self._graph.device, feeds | state.tensors, self._outputs, self._graph.run_options
            )
        except Exception as error:
            raise self._graph.failed(error, len(lengths), input_ids.shape[1]) from error
        tensors = state.tensors | {
            one.past.name: value for one, value in zip(self._signature.changing, present, strict=True)
        }
        aligned = step.align(logits.numpy(), last_only=last_only)
        after = replace(state, tensors=tensors, mask=step.mask, lengths=step.lengths)
        return aligned.astype(np.float32, copy=False), after

    def select(self, state: ArrayState, rows: IntArray) -> ArrayState:
        """Keep, drop, reorder or repeat rows."""
        self._graph.session()
        rows = np.asarray(rows, np.int64)
        if np.array_equal(rows, np.arange(len(state.lengths))):
            return state
        return self._signature.select(state, rows, _taking)

    def join(self, states: Sequence[ArrayState]) -> ArrayState:
        """Put the rows of several states into one batch."""
        self._graph.session()
        if len(states) == 1:
            return states[0]
        return _with_ort_values(self._signature.join([_with_arrays(one) for one in states]))

    def rewind(self, state: ArrayState, lengths: IntArray) -> ArrayState:
        """Let each row forget all but its first tokens."""
        self._graph.session()
        kept, mask, slots = self._signature.forget(state, lengths)
        after = replace(state, mask=mask, lengths=kept)
        if slots == state.mask.shape[1]:
            return after
        tensors = dict(state.tensors)
        for one in self._signature.changing:
            assert one.past_axis is not None
            kept_slots = (slice(None),) * one.past_axis + (slice(slots),)
            # A copy: the array that a value shows does not keep alive the array that the value was made from.
            tensors[one.past.name] = _to_ort(tensors[one.past.name].numpy()[kept_slots].copy())
        return replace(after, tensors=tensors)

    def copy(self, state: ArrayState, *, capacity: int | None = None) -> ArrayState:
        """Make an independent copy: calls make new values and leave old ones alone, so both share them."""
        self._graph.session()
        return replace(state, tensors=dict(state.tensors))

    def report(self) -> EngineReport:
        """Say which provider computes, with how many threads."""
        shown = {} if self._encoder is None else {"encoder": "runs once a source"}
        return self._graph.report(state="growing cache" if self._signature.grows else "recurrent", **shown)

    def close(self) -> None:
        """Release the session."""
        self._graph.close()
        if self._encoder is not None:
            self._encoder.close()

    def tap_names(self) -> list[str]:
        """Names of the modules whose output the graph can show."""
        first = [] if self._encoder is None else self._encoder.tap_names()
        return [*first, *self._graph.tap_names()]

    def taps(
        self, input_ids: IntArray, names: Sequence[str], source: AnyArray | None = None
    ) -> Mapping[str, AnyArray]:
        """Run ids from an empty state, or after a source, and show the named module outputs."""
        if self._encoder is None or source is None:
            self.begin(len(input_ids))  # refuses to go without a source where there is an encoder
            return self._graph.taps(input_ids, names)
        lengths = np.full(len(source), source.shape[-1])
        inputs, mask = check_sources(source, lengths, self.facts.source, ragged=self.ragged_sources)
        once = set(self._encoder.tap_names())
        shown = self._encoder.taps(inputs, mask, [name for name in names if name in once])
        if rest := [name for name in names if name not in once]:
            past = _with_arrays(self.encode(source, lengths)).tensors
            shown |= self._graph.taps(input_ids, rest, past=past)
        return shown


def _taking(rows: IntArray) -> Callable[["ort.OrtValue", int], "ort.OrtValue"]:
    return lambda value, axis: _to_ort(np.take(value.numpy(), rows, axis=axis))


def _to_ort(array: AnyArray) -> "ort.OrtValue":
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _with_arrays(state: ArrayState) -> ArrayState:
    tensors = {name: value.numpy() for name, value in state.tensors.items()}
    return replace(state, tensors=tensors)


def _with_ort_values(state: ArrayState) -> ArrayState:
    state.tensors = {name: _to_ort(array) for name, array in state.tensors.items()}
    return state
