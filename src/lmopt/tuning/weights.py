"""The shapes of a model's weights, read from the headers of its files: nothing is loaded."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lmopt.compression.cast import Cast
from lmopt.compression.mixed import Mixed
from lmopt.compression.overrides import Part
from lmopt.compression.round_to_nearest import Quantize
from lmopt.compression.step import Step
from lmopt.errors import ArtifactNotFoundError, UnsupportedError
from lmopt.safefiles import check_gguf, check_safetensors, check_shard_index, read_json
from lmopt.safefiles.safetensors import DTYPE_BITS

_EMBEDDINGS: Final = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "token_embd")
_HEADS: Final = ("lm_head", "embed_out", "output")
_POSITIONS: Final = ("wpe", "embed_positions", "position_embd", "position_embeddings")
_INDEX: Final = "model.safetensors.index.json"
# Names of GGUF's types by their numbers, from ggml's `enum ggml_type`.
_GGUF_TYPES: Final[Mapping[int, str]] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 28: "F64", 30: "BF16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that a quantizer can take.

    Attributes:
        path: Module that holds it.
        part: `"linear"`, `"embedding"` or `"head"`.
        rows: Outputs.
        columns: Inputs.
    """

    path: str
    part: Part
    rows: int
    columns: int

    @property
    def values(self) -> int:
        """Numbers that it holds."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What can be known of a model from its headers.

    Attributes:
        matrices: Weights that quantizers take, a tied one once.
        other_values: Numbers of all other weights: norms, biases, positions.
        stored_bytes: Bytes of all weights as they are stored.
        quantized: Whether the stored weights are quantized, so that `matrices` may lack some.
        stored_as: Types of the stored weights.
        layers: Blocks with a key-value cache; 0 where that is not known, or the state does not grow.
        cache_values: Numbers that the cache holds for each token in all layers, 0 where not known.
        context_length: Most positions; `None` where not known.
        vocab_size: Rows of the embedding.
        architecture: Name of the architecture.
    """

    matrices: tuple[Matrix, ...]
    other_values: int
    stored_bytes: int
    quantized: bool
    stored_as: tuple[str, ...]
    layers: int
    cache_values: int
    context_length: int | None
    vocab_size: int
    architecture: str

    @property
    def parameters(self) -> int:
        """Numbers of all weights."""
        return sum(one.values for one in self.matrices) + self.other_values

    def bytes_after(self, steps: Sequence[Step]) -> int | None:
        """Say how many bytes the weights take after a recipe.

        Args:
            steps: Quantizers and casts; the last that says something of a weight counts.

        Returns:
            Bytes in lmopt's layout; `None` for a step whose result cannot be known beforehand.
        """
        quantizer: Quantize | None = None
        width = 4
        for step in steps:
            if isinstance(step, Mixed):
                return None
            if isinstance(step, Quantize):
                quantizer = None if getattr(step, "fold_only", False) else step
            elif isinstance(step, Cast):
                width = 2
            else:
                return None
        total = width * self.other_values
        for one in self.matrices:
            form = None if quantizer is None else quantizer.form(one.path, one.part)
            total += width * one.values if form is None else form.nbytes(one.rows, one.columns)
        return total

    def read_per_token(self, steps: Sequence[Step]) -> int | None:
        """Bytes of weights that a decoded token has to read: all, but of an untied embedding one row."""
        whole = self.bytes_after(steps)
        if whole is None or not any(one.part == "head" for one in self.matrices):
            return whole
        spared = [one for one in self.matrices if one.part == "embedding"]
        alone = ModelShape(tuple(spared), 0, 0, False, (), 0, 0, None, 0, "")
        return whole - (alone.bytes_after(steps) or 0)


def read_shape(source: str | os.PathLike[str]) -> ModelShape:
    """Read the headers of a model on disk.

    Args:
        source: A Hugging Face folder with safetensors weights, a `.gguf` file, or an lmopt artefact that has weights.

    Raises:
        ArtifactNotFoundError: There is nothing of this kind.
        CorruptArtifactError: A file is damaged.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _of_gguf(path)
    if not path.is_dir():
        raise ArtifactNotFoundError(
            f"{os.fspath(source)} is neither a folder nor a file. Of a hub id, give the folder that it was fetched "
            "to: huggingface-cli download NAME --local-dir FOLDER"
        )
    files = check_shard_index(path / _INDEX) if (path / _INDEX).is_file() else ()
    if not files and (path / "model.safetensors").is_file():
        files = (path / "model.safetensors",)
    if not files:
        raise ArtifactNotFoundError(
            f"{path} holds no model.safetensors, so the sizes of its weights cannot be read without loading them"
        )
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    tensors = {}
    stored = 0
    kinds = set()
    for file in files:
        for name, one in check_safetensors(file).tensors.items():
            tensors[name] = one.shape
            stored += math.prod(one.shape) * DTYPE_BITS[one.dtype] // 8
            kinds.add(one.dtype.lower())
    text = config.get("text_config") or config
    return _shape(
        tensors,
        stored,
        quantized="quantization_config" in config,
        kinds=kinds,
        cache=_cache(text),
        context=_whole(text, "max_position_embeddings", "n_positions", "n_ctx") or None,
        architecture=str((config.get("architectures") or ["unknown"])[0]),
    )


def _of_gguf(path: Path) -> ModelShape:
    header = check_gguf(path)
    name = str(header.metadata.get("general.architecture", "unknown"))

    def number(key: str) -> int:
        value = header.metadata.get(f"{name}.{key}", 0)
        return value if type(value) is int else 0

    heads = number("attention.head_count")
    width = number("attention.key_length") or (number("embedding_length") // heads if heads else 0)
    layers = number("block_count")
    return _shape(
        # The contiguous axis comes first here.
        {key: one.shape[::-1] for key, one in header.tensors.items()},
        sum(one.bytes for one in header.tensors.values()),
        quantized=any(one.type not in (0, 1, 28, 30) for one in header.tensors.values()),
        kinds={f"GGUF {_GGUF_TYPES.get(one.type, one.type)}" for one in header.tensors.values()},
        cache=(layers, 2 * layers * (number("attention.head_count_kv") or heads) * width),
        context=number("context_length") or None,
        architecture=name,
    )


def _shape(
    tensors: Mapping[str, tuple[int, ...]],
    stored: int,
    *,
    quantized: bool,
    kinds: set[str],
    cache: tuple[int, int],
    context: int | None,
    architecture: str,
) -> ModelShape:
    matrices: list[Matrix] = []
    other = 0
    for name, shape in tensors.items():
        path, _, last = name.rpartition(".")
        part = _part(path) if len(shape) == 2 and last == "weight" else None
        if part is None:
            other += math.prod(shape)
        else:
            matrices.append(Matrix(path, part, shape[0], shape[1]))
    vocab = max((one.rows for one in matrices if one.part != "linear"), default=0)
    return ModelShape(
        tuple(matrices), other, stored, quantized, tuple(sorted(kinds)), *cache, context, vocab, architecture
    )


def _part(path: str) -> Part | None:
    last = path.rpartition(".")[2]
    if last in _POSITIONS:
        return None
    return "embedding" if last in _EMBEDDINGS else "head" if last in _HEADS else "linear"


def _cache(config: Mapping[str, Any]) -> tuple[int, int]:
    """Layers, and numbers a token in the cache of all of them."""
    layers = _whole(config, "num_hidden_layers", "n_layer")
    heads = _whole(config, "num_attention_heads", "n_head")
    hidden = _whole(config, "hidden_size", "n_embd")
    width = _whole(config, "head_dim") or (hidden // heads if heads else 0)
    return layers, 2 * layers * (_whole(config, "num_key_value_heads") or heads) * width


def _whole(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if type(value := config.get(name)) is int and value > 0:
            return value
    return 0


def require_weights(shape: ModelShape, source: str) -> None:
    """Refuse a model of which no weight was recognised.

    Raises:
        UnsupportedError: There is none.
    """
    if not shape.matrices:
        raise UnsupportedError(
            f"{source} holds no matrix by a name that lmopt knows, so nothing can be said of it"
        )
