"""What users give as prompts, told apart and checked."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from lmopt.errors import DtypeError, InputError, ShapeError, TokenIdError
from lmopt.types import IntArray, SourceFacts

Prompt: TypeAlias = str | Sequence[int] | IntArray
"""A text, or a row of token ids."""


def as_prompts(prompt: Any, *, features: bool = False) -> tuple[list[Prompt], bool]:
    """Tell one prompt from many.

    Args:
        prompt: One, or a list or array of them.
        features: Whether they are features, `(size, positions)` float arrays, in the place of text.

    Raises:
        DtypeError: It is neither text nor ids.
        ShapeError: An array has more than two axes.
        InputError: A list mixes ids and prompts.
    """
    if features:
        if isinstance(prompt, np.ndarray):
            return (list(prompt), True) if prompt.ndim == 3 else ([prompt], False)
        if not isinstance(prompt, Sequence) or not all(isinstance(one, np.ndarray) for one in prompt):
            raise DtypeError(
                f"this model reads features: an array (size, positions) of float32, or a list of such, not "
                f"{type(prompt).__name__}. For sound: Runtime.transcribe"
            )
        return list(prompt), True
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, np.ndarray):
        if prompt.dtype.kind not in "iu":
            raise DtypeError(f"ids have dtype {prompt.dtype}; expected whole numbers (int64)")
        if prompt.ndim not in (1, 2):
            raise ShapeError(f"ids have shape {prompt.shape}; expected (sequence,) or (batch, sequence)")
        if prompt.ndim == 2 and not len(prompt):
            raise ShapeError("ids hold no row; expected (batch, sequence), batch at least 1")
        return (list(prompt), True) if prompt.ndim == 2 else ([prompt], False)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise DtypeError(f"a prompt is a text or a row of token ids, not {type(prompt).__name__}")
    if strange := [one for one in prompt if isinstance(one, float | bool | np.floating)]:
        raise DtypeError(f"a prompt holds {strange[0]!r}; expected token ids, which are whole numbers")
    numbers = [isinstance(one, int | np.integer) for one in prompt]
    if all(numbers):
        return [list(prompt)], False
    if any(numbers):
        raise InputError("a list of prompts holds texts or rows of ids, not single ids among them")
    return list(prompt), True


def decoder_prompts(given: Any, count: int, source: SourceFacts) -> list[Any]:
    """Bring what decoders have been said to write into `count` rows of ids; empty ones where nothing is given.

    Decoders of text begin with the model's start token: it is put in front where it is missing, as transformers
    does. A speech model's rows are taken as they are, since it may be given what was said before.

    Args:
        given: A row of ids for all, a list with one a source, or `None`.
        count: Number of sources.
        source: What the encoder reads.
    """
    if given is None:
        return [[] for _ in range(count)]
    rows: list[Any]
    rows, many = as_prompts(given)
    if source.kind == "ids":
        rows = [
            row if list(row[:1]) == [source.start_token_id] else [source.start_token_id, *row] for row in rows
        ]
    return rows if many else rows * count


def check_ids(ids: Sequence[int] | IntArray, vocab_size: int, what: str) -> IntArray:
    """Turn token ids into `(n,)` int64.

    Raises:
        DtypeError: They are not integers.
        ShapeError: They are not a flat list.
        TokenIdError: One is outside the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise ShapeError(f"{what} is not a flat list of token ids ({error}).") from error
    if array.dtype.kind == "U":
        raise DtypeError(f"{what} is a text; expected token ids. Encode it with the model's tokenizer first.")
    if array.ndim != 1:
        raise ShapeError(f"{what} has shape {array.shape}; expected a flat list of token ids.")
    if array.size and array.dtype.kind not in "iu":
        raise DtypeError(f"{what} holds {array.dtype}; expected integer token ids.")
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        wrong = int(array[(array < 0) | (array >= vocab_size)][0])
        raise TokenIdError(
            f"{what} holds id {wrong}; the model's vocabulary has ids 0 to {vocab_size - 1}. "
            f"Was it encoded with another model's tokenizer?"
        )
    return array.astype(np.int64)
