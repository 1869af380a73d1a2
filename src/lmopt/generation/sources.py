"""What encoder-decoder models read before they write: checked, put side by side, and made into states."""

from collections.abc import Sequence

import numpy as np

from lmopt.contracts import Engine, PaddingSide, State
from lmopt.errors import ContextLengthError, DtypeError, ShapeError, UnsupportedError
from lmopt.generation.cohorts import CohortEngine, encode_in_parts
from lmopt.generation.prompts import check_ids
from lmopt.types import AnyArray, IntArray, ModelFacts


def check_source(source: object, facts: ModelFacts, what: str) -> AnyArray | None:
    """Turn a source into `(source,)` int64 ids or `(size, source)` float32 features.

    Args:
        source: As the caller gave it; `None` for models without an encoder.
        facts: Facts of the model.
        what: What it is called in a message: `"source 3"`.

    Raises:
        UnsupportedError: The model needs a source and there is none, or the other way round.
        ShapeError: It has another shape than the model's encoder takes, or is empty.
        DtypeError: It is neither ids nor numbers, as the model wants.
        TokenIdError: An id is outside the encoder's vocabulary.
        ContextLengthError: It is longer than the encoder can take.
    """
    wanted = facts.source
    if wanted is None:
        if source is not None:
            raise UnsupportedError(
                f"{what} was given to a model without an encoder ({facts.architecture or 'unknown class'}); give it "
                "prompts alone"
            )
        return None
    if source is None:
        raise UnsupportedError(
            f"{what} is missing: this is an encoder-decoder, which reads {wanted.kind} before it writes. "
            "Runtime.generate takes them in the place of the prompt; lmopt.generation.generate as sources=[...]"
        )
    if wanted.kind == "ids":
        array: AnyArray = check_ids(source, wanted.size, what)  # type: ignore[arg-type]
        if not array.size:
            raise ShapeError(f"{what} is empty; an encoder reads at least one token")
    else:
        array = np.asarray(source)
        if array.dtype.kind != "f":
            raise DtypeError(f"{what} has dtype {array.dtype}; expected features in float32")
        array = array.astype(np.float32, copy=False)
        if array.ndim != 2 or array.shape[0] != wanted.size or not array.shape[1]:
            raise ShapeError(f"{what} has shape {array.shape}; expected features ({wanted.size}, positions)")
    length = array.shape[-1]
    if wanted.length is not None and length > wanted.length:
        raise ContextLengthError(
            f"{what} has {length} positions; the encoder takes {wanted.length}. Split it."
        )
    if wanted.fixed and length != wanted.length:
        raise ShapeError(f"{what} has {length} positions; the encoder takes exactly {wanted.length}. Pad it.")
    return array


def begin(
    engine: Engine,
    sources: Sequence[AnyArray | None],
    *,
    capacity: int | None = None,
    padding_side: PaddingSide = "right",
) -> State:
    """Make the state of rows that have read nothing, or nothing but their sources.

    Args:
        engine: Engine that takes rows of unequal length.
        sources: Source of each row, from `check_source`.
        capacity: As for `lmopt.contracts.Engine.begin`.
        padding_side: As for `lmopt.contracts.Engine.begin`.
    """
    given = [one for one in sources if one is not None]
    if not given:
        return engine.begin(len(sources), capacity=capacity, padding_side=padding_side)
    inputs, lengths = pack(given)
    if isinstance(engine, CohortEngine):
        return engine.encode(inputs, lengths, capacity=capacity, padding_side=padding_side)
    return encode_in_parts(engine, inputs, lengths, capacity=capacity, padding_side=padding_side)


def pack(sources: Sequence[AnyArray]) -> tuple[AnyArray, IntArray]:
    """Lay sources side by side, as `lmopt.contracts.SupportsEncoder.encode` takes them; give their lengths, too."""
    lengths = np.array([one.shape[-1] for one in sources])
    inputs = np.zeros((len(sources), *sources[0].shape[:-1], lengths.max()), sources[0].dtype)
    for line, one in zip(inputs, sources, strict=True):
        line[..., : one.shape[-1]] = one
    return inputs, lengths
