"""Array aliases, dtype names and tensor descriptions shared by every room."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float32]
AnyArray: TypeAlias = NDArray[Any]

# One spelling per axis, the field's own, used in ONNX files and manifests alike.
BATCH: Final = "batch_size"
SEQUENCE: Final = "sequence_length"
PAST: Final = "past_sequence_length"
TOTAL: Final = "total_sequence_length"
SOURCE: Final = "encoder_sequence_length"
SOURCES: Final = "source_batch_size"
TOKENS: Final = "source_tokens"
"""Tokens of all sources one after the other, no padding. Names of an encoder's values that have it end in it."""

DTYPE_BYTES: Final[dict[str, int]] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape of one input or output.

    Attributes:
        name: Name in the graph, such as `past_key_values.0.key`.
        dtype: NumPy-style name: `"float32"`, `"int64"`, `"bfloat16"`.
        shape: One entry an axis: a size, or the name of a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What an encoder-decoder model reads before it writes.

    Attributes:
        kind: `"ids"`: token ids; `"features"`: rows of numbers, such as a log-mel spectrogram.
        start_token_id: First token of what the decoder reads, where the caller gives none.
        size: Ids: how many there are, so that valid ones are `0 .. size - 1`. Features: values at each position.
        length: Most positions of a source; `None` where there is no limit.
        fixed: Whether a source must have exactly `length` positions (Whisper's 30 s).
    """

    kind: Literal["ids", "features"]
    start_token_id: int
    size: int
    length: int | None = None
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What every layer above an engine must know of the model that it runs.

    Attributes:
        vocab_size: Size of the last axis of the logits; valid ids are `0 .. vocab_size - 1`.
        context_length: Most positions the model was built for; `None` where it has no limit.
        parameters: Number of distinct weights, 0 where unknown.
        architecture: Class name of the model, for people; nothing may branch on it.
        source: What its encoder reads; `None` for a model without one.
    """

    vocab_size: int
    context_length: int | None = None
    parameters: int = 0
    architecture: str = ""
    source: SourceFacts | None = None

    @classmethod
    def from_dict(cls, stated: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            TypeError: A field is unknown or missing.
        """
        source = stated.get("source")
        return cls(**{**stated, "source": None if source is None else SourceFacts(**source)})
