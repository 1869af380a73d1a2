"""The field's names for a decoder's inputs and outputs, and its state as plain arrays.

Any engine that runs an exported graph needs the same bookkeeping: which input is a mask, which
outputs become the next call's past, where padding goes, how rows are kept or reordered. It stands
here once, on NumPy arrays, for the built-in engines and for strangers.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from lmopt.checking import check_rewind, check_step, whole_numbers
from lmopt.contracts import PaddingSide
from lmopt.errors import CorruptArtifactError, ShapeError, UnsupportedError
from lmopt.types import (
    BATCH,
    DTYPE_BYTES,
    PAST,
    SOURCE,
    SOURCES,
    AnyArray,
    FloatArray,
    IntArray,
    TensorSpec,
)

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
LOGITS = "logits"
LOGITS_TO_KEEP = "logits_to_keep"
INPUT_FEATURES = "input_features"
SOURCE_MASK = "encoder_attention_mask"

_KEY_VALUE = re.compile(r"past_key_values\.(\d+)\.((?:encoder\.|decoder\.)?(?:key|value))")
_PLAIN = re.compile(r"past_state\.(.+)")
# What a row holds of its source: a graph of the decoder takes it and gives it back to nobody.
_OF_SOURCE = re.compile(r"past_key_values\.\d+\.encoder\.(key|value)|source_state\..+|" + SOURCE_MASK)


def present_name(past: str) -> str:
    """Give the output that becomes the input `past` of the next call.

    >>> present_name("past_key_values.3.key"), present_name("past_state.0")
    ('present.3.key', 'present_state.0')
    """
    if match := _KEY_VALUE.fullmatch(past):
        return f"present.{match[1]}.{match[2]}"
    if match := _PLAIN.fullmatch(past):
        return f"present_state.{match[1]}"
    raise CorruptArtifactError(
        f"graph input {past!r} is neither one of input_ids, attention_mask, position_ids nor a past "
        "state named past_key_values.<layer>.[decoder.|encoder.]key|value, past_state.<name> or source_state.<name>"
    )


def source_name(past: str) -> str:
    """Give the output of an encoder's graph that becomes the input `past` of the decoder's.

    >>> source_name("past_key_values.3.encoder.key"), source_name("source_state.0")
    ('present.3.encoder.key', 'source_state.0')
    """
    return past if past.startswith("source_state.") else present_name(past)


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of the state: the input it enters by and the output it leaves by.

    Attributes:
        past: Spec of the input; symbolic axes are `batch_size` and, if it grows,
            `past_sequence_length`. Of a source, `encoder_sequence_length`, and `source_batch_size` for `batch_size`
            where rows that hold one source and stand together hold it once.
        present: Name of the output; empty for what a row holds of its source, which no call changes.
        batch_axis: Axis of the rows.
        past_axis: Axis that grows by one a token, `None` for a state of fixed size.
        source_axis: Axis as long as the row's source, `None` where there is none.
    """

    past: TensorSpec
    present: str
    batch_axis: int
    past_axis: int | None
    source_axis: int | None = None

    @classmethod
    def of(cls, past: TensorSpec) -> "StateTensor":
        """Read the roles off the name and the symbolic axes of the input.

        Raises:
            CorruptArtifactError: The name, or a dynamic axis, is not one that a state has.
        """
        axes = [axis for axis in past.shape if isinstance(axis, str)]
        kept = _OF_SOURCE.fullmatch(past.name) is not None
        free = SOURCE if kept else PAST
        rows = SOURCES if kept and SOURCES in axes else BATCH
        if rows not in axes or set(axes) - {rows, free}:
            raise CorruptArtifactError(
                f"{past.name!r} has dynamic axes {axes}; expected {BATCH!r} and, if it has any length, {free!r}"
            )
        batch_axis = past.shape.index(rows)
        free_axis = past.shape.index(free) if free in axes else None
        if kept:
            return cls(past, "", batch_axis, None, free_axis)
        return cls(past, present_name(past.name), batch_axis, free_axis)

    def sizes(self, batch: int, past: int = 0, source: int = 0) -> list[int]:
        """Give the shape of the tensor for `batch` rows that hold `past` tokens, and `source` positions."""
        known = {BATCH: batch, SOURCES: batch, PAST: past, SOURCE: source}
        return [known[axis] if isinstance(axis, str) else axis for axis in self.past.shape]

    def empty(self, batch: int) -> AnyArray:
        """Make the tensor that `batch` rows start from: zeros, of length 0 along `past_axis`."""
        return np.zeros(self.sizes(batch), self.past.dtype)


def bytes_per_token(state: Sequence[StateTensor]) -> int:
    """Count the bytes by which the state of one row grows with each token that it reads."""
    growing = [one for one in state if one.past_axis is not None]
    return sum(math.prod(one.sizes(1, 1)) * DTYPE_BYTES[one.past.dtype] for one in growing)


@dataclass(slots=True)
class ArrayState:
    """State of a batch as arrays, or as whatever array-like values an engine keeps.

    Attributes:
        tensors: Input name to value.
        mask: `(batch, past)` int64, 1 where a slot of the past holds a token of the row.
        lengths: `(batch,)` int64, tokens that each row has read.
        padding_side: Where padding is laid when rows are unequal.
        sources: `(batch,)` int64, a number of each row's source (`number_sources`), equal where rows hold the same
            of it; `None` where there is none, or nobody kept count.
    """

    tensors: dict[str, Any]
    mask: IntArray
    lengths: IntArray
    padding_side: PaddingSide = "right"
    sources: IntArray | None = None


Taking: TypeAlias = Callable[[IntArray], Callable[[Any, int], Any]]
"""Given rows, gives what copies these rows of a tensor along an axis."""


def _taking(rows: IntArray) -> Callable[[Any, int], Any]:
    return lambda value, axis: np.take(value, rows, axis)


_numbers = itertools.count()


def number_sources(batch: int) -> IntArray:
    """Give each of some sources that were just read a number that no other has: `(batch,)` int64."""
    return np.array([next(_numbers) for _ in range(batch)], np.int64)


def together(sources: IntArray) -> int:
    """Count the rows that stand together and hold one source, where these are equally many of each; else 1.

    >>> together(np.array([7, 7, 9, 9])), together(np.array([7, 9, 7, 9])), together(np.array([7, 7, 9]))
    (2, 1, 1)
    """
    starts = np.flatnonzero(np.concatenate([[True], sources[1:] != sources[:-1], [True]]))
    runs = np.diff(starts)
    return int(runs[0]) if len(sources) and (runs == runs[0]).all() else 1


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a graph, laid out.

    Attributes:
        feeds: Input name to array, without the state's tensors.
        mask: Mask after the call.
        lengths: Lengths after the call.
        new: `(batch,)` int64 number of new tokens in each row.
    """

    feeds: Mapping[str, AnyArray]
    mask: IntArray
    lengths: IntArray
    new: IntArray
    padding_side: PaddingSide

    def align(self, logits: FloatArray, *, last_only: bool) -> FloatArray:
        """Bring the graph's logits to the caller's layout (rows start at column 0).

        Args:
            logits: `(batch, sequence, vocab_size)`, as laid out in `feeds`.
            last_only: Keep only what follows each row's last new token.
        """
        width = logits.shape[1]
        if width == 1:
            return logits
        rows = np.arange(len(self.new))
        shift = width - self.new if self.padding_side == "left" else np.zeros_like(self.new)
        if last_only:
            last: FloatArray = logits[rows, shift + self.new - 1][:, None]
            return last
        if not shift.any():
            return logits
        columns = np.minimum(np.arange(width)[None] + shift[:, None], width - 1)
        moved: FloatArray = logits[rows[:, None], columns]
        return moved


@dataclass(frozen=True, slots=True)
class Signature:
    """Roles of a graph's inputs and outputs.

    Attributes:
        state: State tensors in the graph's order.
        has_mask: Whether the graph takes `attention_mask`: only then can rows be unequal.
        has_positions: Whether it takes `position_ids`.
        vocab_size: Last axis of the logits.
    """

    state: tuple[StateTensor, ...]
    has_mask: bool
    has_positions: bool
    vocab_size: int

    @classmethod
    def from_graph(cls, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> "Signature":
        """Read the roles off names and symbolic axes.

        Raises:
            CorruptArtifactError: A name or an axis is not one that a decoder graph has.
        """
        plain = {INPUT_IDS, ATTENTION_MASK, POSITION_IDS}
        by_name = {spec.name: spec for spec in outputs}
        names = {spec.name for spec in inputs}
        if INPUT_IDS not in names or LOGITS not in by_name:
            raise CorruptArtifactError(
                f"the graph has inputs {sorted(names)} and outputs {sorted(by_name)}; a decoder has the "
                f"input {INPUT_IDS!r} and the output {LOGITS!r}"
            )
        vocab_size = by_name[LOGITS].shape[-1]
        if not isinstance(vocab_size, int):
            raise CorruptArtifactError(f"the last axis of {LOGITS!r} is {vocab_size!r}; it must be a number")
        state = tuple(_state_tensor(spec, by_name) for spec in inputs if spec.name not in plain)
        return cls(state, ATTENTION_MASK in names, POSITION_IDS in names, vocab_size)

    def begin(self, batch: int, padding_side: PaddingSide = "right") -> ArrayState:
        """Make the empty state of `batch` rows."""
        return ArrayState(
            {one.past.name: one.empty(batch) for one in self.state},
            np.zeros((batch, 0), np.int64),
            np.zeros(batch, np.int64),
            padding_side,
        )

    def step(self, input_ids: IntArray, lengths: IntArray, state: ArrayState) -> Step:
        """Lay out one call of the graph.

        Args:
            input_ids: `(batch, sequence)` int64, rows start at column 0.
            lengths: `(batch,)` int64 new tokens in each row.
            state: State before the call; not changed.

        Raises:
            DtypeError: Ids or lengths are not whole numbers.
            ShapeError: Batch, lengths and state do not fit together.
            TokenIdError: An id lies outside the vocabulary.
        """
        input_ids = whole_numbers(input_ids, "input_ids")
        new = whole_numbers(lengths, "lengths")
        check_step(input_ids, new, state.lengths, self.vocab_size, ragged=self.has_mask)
        width = input_ids.shape[1]
        column = np.arange(width)[None]
        if state.padding_side == "left" and (new < width).any():
            source = column - (width - new)[:, None]
            valid = source >= 0
            input_ids = np.take_along_axis(input_ids, np.maximum(source, 0), axis=1)
            position = state.lengths[:, None] + np.maximum(source, 0)
        else:
            valid = column < new[:, None]
            position = state.lengths[:, None] + np.minimum(column, new[:, None] - 1)
        mask = np.concatenate([state.mask, valid.astype(np.int64)], axis=1)
        # A padding id may be anything in the caller's array; 0 is in every vocabulary.
        feeds: dict[str, AnyArray] = {INPUT_IDS: np.where(valid, input_ids, 0)}
        if self.has_mask:
            feeds[ATTENTION_MASK] = mask
        if self.has_positions:
            feeds[POSITION_IDS] = position
        return Step(feeds, mask, state.lengths + new, new, state.padding_side)

    def select(self, state: ArrayState, rows: IntArray, taking: Taking = _taking) -> ArrayState:
        """Keep, drop, reorder or repeat rows.

        Beams of one source change places all the time, and what they hold of it, most of their state, is left alone.

        Args:
            state: State before; not changed.
            rows: `(n,)` int64, where the new rows stand in it.
            taking: How rows of a tensor are copied; of arrays, by `np.take`.
        """
        rows = np.asarray(rows, np.int64)
        take = taking(rows)
        moved = {one.past.name: take(state.tensors[one.past.name], one.batch_axis) for one in self.changing}
        sources = None if state.sources is None else state.sources[rows]
        after = ArrayState(
            state.tensors | moved, state.mask[rows], state.lengths[rows], state.padding_side, sources
        )
        number = self._rows_a_source(state)
        known = None if state.sources is None else state.sources[::number]
        return self._holding(after, rows // number, known, taking)

    def _rows_a_source(self, state: ArrayState) -> int:
        """How many rows hold one row of what the state holds of sources."""
        return together(state.sources) if self.shares_sources and state.sources is not None else 1

    def _holding(
        self, state: ArrayState, places: IntArray, known: IntArray | None, taking: Taking
    ) -> ArrayState:
        """Let a state hold of sources what its rows need.

        Args:
            state: Whose tensors still hold what they held before its rows came together.
            places: `(batch,)` int64, where each row's source stands in them.
            known: Numbers of the sources as they stand in them, if there are any.
            taking: As for `select`.
        """
        number = self._rows_a_source(state)
        if known is not None and state.sources is not None and np.array_equal(state.sources[::number], known):
            return state
        take = taking(places[::number])
        held = {
            one.past.name: take(state.tensors[one.past.name], one.batch_axis)
            for one in self.state
            if not one.present
        }
        return replace(state, tensors=state.tensors | held)

    def held(self, state: ArrayState, taking: Taking = _taking) -> dict[str, Any]:
        """Give what each row holds of its source but the mask, by the names of inputs; `taking` as for `select`."""
        take = taking(np.arange(len(state.lengths)) // self._rows_a_source(state))
        return {
            one.past.name: take(state.tensors[one.past.name], one.batch_axis)
            for one in self.state
            if not one.present and one.past.name != SOURCE_MASK
        }

    @property
    def changing(self) -> tuple[StateTensor, ...]:
        """Tensors that a call gives back; all of them, for a model without an encoder."""
        return tuple(one for one in self.state if one.present)

    @property
    def from_source(self) -> tuple[StateTensor, ...]:
        """Tensors that the encoder makes: all but the source's mask and what starts empty."""
        return tuple(one for one in self.state if one.past_axis is None and one.past.name != SOURCE_MASK)

    @property
    def shares_sources(self) -> bool:
        """Whether rows that hold one source and stand together hold it once; see `together`."""
        return any(SOURCES in one.past.shape for one in self.state)

    def sharing_sources(self) -> "Signature":
        """Give the signature of the same graph where they do."""

        def shared(one: StateTensor) -> StateTensor:
            shape = tuple(SOURCES if axis == BATCH else axis for axis in one.past.shape)
            return one if one.present else replace(one, past=replace(one.past, shape=shape))

        return replace(self, state=tuple(map(shared, self.state)))

    @property
    def has_source_mask(self) -> bool:
        """Whether rows with sources of unequal length may share a batch."""
        return any(one.past.name == SOURCE_MASK for one in self.state)

    @property
    def grows(self) -> bool:
        """Whether any tensor of the state grows with the text."""
        return any(one.past_axis is not None for one in self.state)

    @property
    def rewinds(self) -> bool:
        """Whether a row can forget its last tokens: whether all that changes grows with the text."""
        return bool(self.changing) and all(one.past_axis is not None for one in self.changing)

    def forget(self, state: ArrayState, lengths: IntArray) -> tuple[IntArray, IntArray, int]:
        """Work out how each row of a growing state comes to hold its first tokens only.

        Args:
            state: State before; not changed.
            lengths: `(batch,)` int64 tokens to keep of each row.

        Returns:
            The lengths, the mask, and how many slots of the past are left: those behind are of no use
            to any row. Slots of single rows that are forgotten stay, hidden by the mask.

        Raises:
            UnsupportedError: The state has no memory of how it came to be.
            ShapeError: The lengths do not fit the state, or would be unequal without a mask to hide that.
        """
        if not self.rewinds:
            raise UnsupportedError(
                "this model's state is no cache of tokens; it cannot forget the last of them"
            )
        kept = check_rewind(lengths, state.lengths)
        mask = state.mask * (state.mask.cumsum(axis=1) <= kept[:, None])
        used = np.flatnonzero(mask.any(axis=0))
        slots = int(used[-1]) + 1 if used.size else 0
        if not self.has_mask and (kept != slots).any():
            raise ShapeError(f"rows cannot keep {kept.tolist()} tokens: without a mask they must stay equal")
        return kept, mask[:, :slots], slots

    def rewind(self, state: ArrayState, lengths: IntArray) -> ArrayState:
        """Let each row of a state of NumPy arrays forget all but its first tokens; errors as for `forget`."""
        kept, mask, slots = self.forget(state, lengths)
        tensors = {
            one.past.name: state.tensors[one.past.name][
                (slice(None),) * (one.past_axis or 0) + (slice(slots),)
            ]
            for one in self.changing
        }
        return replace(state, tensors=state.tensors | tensors, mask=mask, lengths=kept)

    def pads(self, states: Sequence[ArrayState]) -> list[int]:
        """Say how many slots each state's past lacks to share a batch with the longest.

        Raises:
            ShapeError: They differ, and there is no mask that could hide padding.
        """
        longest = max(one.mask.shape[1] for one in states)
        pads = [longest - one.mask.shape[1] for one in states]
        if any(pads) and not self.has_mask and self.grows:
            raise ShapeError("rows of unequal length cannot share a growing state without an attention mask")
        for one in self.state:
            sources = {
                state.tensors[one.past.name].shape[one.source_axis] for state in states if one.source_axis
            }
            if len(sources) > 1 and not self.has_source_mask:
                raise ShapeError(
                    f"rows with sources of {sorted(sources)} positions cannot share a state without a mask for them"
                )
        return pads

    def join(self, states: Sequence[ArrayState]) -> ArrayState:
        """Put the rows of several states of NumPy arrays into one, padding shorter pasts at the left."""
        pads = self.pads(states)
        tensors = {}
        for one in self.state:
            parts = [state.tensors[one.past.name] for state in states]
            if one.past_axis is not None:
                parts = [_pad_left(part, one.past_axis, pad) for part, pad in zip(parts, pads, strict=True)]
            elif one.source_axis is not None:
                longest = max(part.shape[one.source_axis] for part in parts)
                parts = [_pad_right(part, one.source_axis, longest) for part in parts]
            tensors[one.past.name] = np.concatenate(parts, axis=one.batch_axis)
        mask = np.concatenate([_pad_left(one.mask, 1, pad) for one, pad in zip(states, pads, strict=True)])
        lengths = np.concatenate([one.lengths for one in states])
        sources = joined_sources(states)
        joined = ArrayState(tensors, mask, lengths, states[0].padding_side, sources)
        if sources is None or not self.shares_sources:
            return joined
        standing, stored = [], 0
        for state in states:
            number = self._rows_a_source(state)
            standing.append(stored + np.arange(len(state.lengths)) // number)
            stored += len(state.lengths) // number
        places = np.concatenate(standing)
        return self._holding(joined, places, sources[np.unique(places, return_index=True)[1]], _taking)


def joined_sources(states: Sequence[ArrayState]) -> IntArray | None:
    """Give the numbers of the sources of several states' rows, if all have them."""
    numbers = [one.sources for one in states if one.sources is not None]
    return np.concatenate(numbers) if len(numbers) == len(states) else None


def _pad_left(array: AnyArray, axis: int, pad: int) -> AnyArray:
    if not pad:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (pad, 0)
    return np.pad(array, widths)


def _pad_right(array: AnyArray, axis: int, length: int) -> AnyArray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return np.pad(array, widths)


def _state_tensor(spec: TensorSpec, outputs: Mapping[str, TensorSpec]) -> StateTensor:
    one = StateTensor.of(spec)
    if one.present and one.present not in outputs:
        raise CorruptArtifactError(f"the graph takes {spec.name!r} but does not return {one.present!r}")
    return one
