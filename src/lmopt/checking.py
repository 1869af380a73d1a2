"""Checks of what engines are called with, so that each of them refuses the same in the same words."""

import numpy as np

from lmopt.errors import DtypeError, ShapeError, TokenIdError, UnsupportedError
from lmopt.types import AnyArray, IntArray, SourceFacts


def check_rewind(lengths: IntArray, read: IntArray) -> IntArray:
    """Refuse to keep more of a row than it has read; give the lengths as int64.

    Args:
        lengths: `(batch,)` tokens to keep of each row.
        read: `(batch,)` tokens that the state has read.

    Raises:
        DtypeError: The lengths are not whole numbers.
        ShapeError: They do not fit the state.
    """
    kept = whole_numbers(lengths, "lengths")
    if kept.shape != read.shape or (kept < 0).any() or (kept > read).any():
        raise ShapeError(
            f"lengths are {kept.tolist()}; the rows have read {read.tolist()}, of which 0 or more stay"
        )
    return kept


def whole_numbers(values: object, what: str) -> IntArray:
    """Give values as int64, refusing fractions, truth values and text.

    Raises:
        DtypeError: The values are of another kind.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise DtypeError(f"{what} has dtype {array.dtype}; expected whole numbers (int64)")
    return array.astype(np.int64, copy=False)


def check_step(
    input_ids: IntArray, new: IntArray, read: IntArray, vocab_size: int, *, ragged: bool = True
) -> None:
    """Refuse input that does not fit before an engine sees it.

    Args:
        input_ids: `(batch, sequence)` ids.
        new: `(batch,)` new tokens in each row.
        read: `(batch,)` tokens that the state has read.
        vocab_size: Ids must lie in `0 .. vocab_size - 1`.
        ragged: Whether rows may be unequal.

    Raises:
        ShapeError: Axes or sizes do not fit.
        TokenIdError: An id that is not padding lies outside the vocabulary.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ShapeError(
            f"input_ids has shape {input_ids.shape}; expected (batch, sequence), both at least 1"
        )
    batch, width = input_ids.shape
    if new.shape != (batch,) or read.shape != (batch,):
        raise ShapeError(
            f"input_ids has {batch} rows, lengths has shape {new.shape}, the state has {len(read)} rows; "
            "all three must agree"
        )
    if width == 1 and new.tolist() == [1] * batch:
        # The step that is taken for every token, in a few microseconds instead of many.
        flat = input_ids[:, 0].tolist()
        if min(flat) >= 0 and max(flat) < vocab_size:
            return
    if new.min() < 1 or new.max() > width:
        raise ShapeError(f"lengths are {new.tolist()}; each must be between 1 and {width}")
    if not ragged and new.min() != width:
        raise ShapeError(f"lengths are {new.tolist()}; this model has no mask, so each must be {width}")
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        valid = np.arange(width)[None] < new[:, None]
        bad = input_ids[valid & ((input_ids < 0) | (input_ids >= vocab_size))]
        if bad.size:
            raise TokenIdError(f"token id {int(bad[0])} is outside the vocabulary 0..{vocab_size - 1}")


def check_sources(
    inputs: AnyArray, lengths: IntArray, source: SourceFacts | None, *, ragged: bool
) -> tuple[AnyArray, IntArray]:
    """Refuse sources that do not fit before an engine sees them.

    Args:
        inputs: As for `lmopt.contracts.SupportsEncoder.encode`.
        lengths: `(batch,)` positions of each row.
        source: What the model's encoder takes.
        ragged: Whether rows may be unequal.

    Returns:
        The inputs, int64 or float32, with zeros as padding, and their mask: `(batch, source)` int64.

    Raises:
        UnsupportedError: The model has no encoder.
        DtypeError: Ids are not whole numbers, or features are.
        ShapeError: Axes or sizes do not fit.
        TokenIdError: An id that is not padding lies outside the encoder's vocabulary.
    """
    if source is None:
        raise UnsupportedError("this model has no encoder; its rows begin with Engine.begin")
    inputs, lengths = np.asarray(inputs), whole_numbers(lengths, "lengths")
    axes = 2 if source.kind == "ids" else 3
    wrong_size = inputs.ndim == 3 and inputs.shape[1] != source.size
    if (
        inputs.ndim != axes
        or 0 in inputs.shape
        or lengths.shape != inputs.shape[:1]
        or (axes == 3 and wrong_size)
    ):
        wanted = "(batch, source)" if source.kind == "ids" else f"(batch, {source.size}, source)"
        raise ShapeError(
            f"inputs have shape {inputs.shape} and lengths {lengths.shape}; expected {wanted} and (batch,)"
        )
    width = inputs.shape[-1]
    if lengths.min() < 1 or lengths.max() > width or (source.fixed and (lengths != source.length).any()):
        span = f"exactly {source.length}" if source.fixed else f"between 1 and {width}"
        raise ShapeError(f"lengths are {lengths.tolist()}; each must be {span}")
    if not ragged and lengths.min() != width:
        raise ShapeError(f"lengths are {lengths.tolist()}; this encoder has no mask, so each must be {width}")
    mask = np.arange(width)[None] < lengths[:, None]
    if source.kind == "ids":
        inputs = np.where(mask, whole_numbers(inputs, "inputs"), 0)
        if inputs.min() < 0 or inputs.max() >= source.size:
            bad = inputs[(inputs < 0) | (inputs >= source.size)]
            raise TokenIdError(
                f"source id {int(bad[0])} is outside the encoder's vocabulary 0..{source.size - 1}"
            )
    else:
        if inputs.dtype.kind != "f":
            raise DtypeError(f"inputs have dtype {inputs.dtype}; expected features in float32")
        inputs = np.where(mask[:, None], inputs, 0).astype(np.float32, copy=False)
    return inputs, mask.astype(np.int64)


def state_begins_with_source() -> UnsupportedError:
    """Make the error for `begin` where `encode` is meant."""
    return UnsupportedError(
        "this is an encoder-decoder: its rows begin with a source, by encode(inputs, lengths). "
        "lmopt.generation.generate takes sources=[...]"
    )
