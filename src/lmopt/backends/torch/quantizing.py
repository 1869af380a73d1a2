"""Find the weights of a module that can be quantized, and put others in their place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lmopt.backends.torch.language_model import is_transformers
from lmopt.backends.torch.quantized import Quantized, QuantizedEmbedding, QuantizedLinear, quantized_parts
from lmopt.compression.layout import QuantizedArray
from lmopt.errors import InputError, UnsupportedOptionError
from lmopt.types import FloatArray

METHOD: Final = "lmopt"
"""`quant_method` in `config.json`, by which a folder says that lmopt wrote its quantized parts."""
VERSION: Final = 1
"""Version of what is said of them."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that can be quantized.

    Attributes:
        path: Module that holds it.
        part: `"linear"`, `"embedding"` or `"head"`.
        tied: Path of the module that holds the same weight and comes first, `None` for the first.
    """

    path: str
    part: Literal["linear", "embedding", "head"]
    tied: str | None = None


def find_weights(module: nn.Module, vocab_size: int) -> list[Weight]:
    """List linears, the token embedding and the head, in the module's order.

    Args:
        module: A transformers model or a module of one's own.
        vocab_size: Width of the logits; in a module of one's own, a linear with as many outputs is the head.
    """
    embedding = head = None
    if is_transformers(module):
        # Any: nn.Module's attributes are tensors or modules to a type checker.
        model: Any = module
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: list[Weight] = []
    first: dict[int, str] = {}
    for path, part in module.named_modules():
        kind: Literal["linear", "embedding", "head"]
        if is_embedding(part):
            if not _is_table(part, embedding, vocab_size):
                continue
            kind = "embedding"
        elif type(part) is nn.Linear or is_conv1d(part):
            is_head = part is head or (head is None and matrix_of(part).shape[0] == vocab_size)
            kind = "head" if is_head else "linear"
        else:
            continue
        holder: Any = part
        found.append(Weight(path, kind, first.get(holder.weight.data_ptr())))
        first.setdefault(holder.weight.data_ptr(), path)
    return found


def _is_table(part: Any, embedding: Any, vocab_size: int) -> bool:
    """Say whether an embedding is that of the tokens, or has its weight: those of an encoder and a decoder may."""
    if embedding is None:
        return bool(part.num_embeddings == vocab_size)
    shared = isinstance(embedding, nn.Embedding) and part.weight.data_ptr() == embedding.weight.data_ptr()
    return part is embedding or shared


def replace_weights(
    module: nn.Module,
    weights: list[Weight],
    quantize: Callable[[Weight, FloatArray], QuantizedArray | None],
) -> nn.Module:
    """Put quantized parts in place of some of a module's.

    Args:
        module: The module; it is changed.
        weights: From `find_weights`.
        quantize: Gives the quantized weight, `(out, in)`, or `None` to leave it. Asked once for weights
            that are tied.

    Returns:
        The module.

    Raises:
        InputError: A weight is not finite.
    """
    for weight in weights:
        if weight.tied is None:
            array = quantize(weight, finite_values(module, weight.path))
            if array is not None:
                put(module, weight.path, array)
        elif isinstance(first := module.get_submodule(weight.tied), Quantized):
            tie(module, weight.path, first)
    return module.eval()


def stored_bytes(module: nn.Module) -> int:
    """Bytes that a module's weights take in a file, shared ones once."""
    seen: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    for part in quantized_parts(module).values():
        for floats in (part.scales, part.offsets):
            if floats is not None and halves(floats):
                seen[floats.data_ptr()] = 2 * floats.numel()
    return sum(seen.values())


def halves(numbers: Tensor) -> bool:
    """Say whether half precision holds float32 numbers exactly; scales and offsets are then stored so."""
    return torch.equal(numbers, numbers.half().float())


def describe(module: nn.Module) -> dict[str, Any]:
    """Say which parts of a module are quantized and how: the `quantization_config` of `config.json`.

    Returns:
        `{"quant_method": "lmopt", "version": 1, "parts": {path: {...}}}`; empty without such parts.
    """
    first: dict[int, str] = {}
    parts: dict[str, dict[str, Any]] = {}
    for path, part in quantized_parts(module).items():
        grid = part.grid
        entry: dict[str, Any] = {
            "kind": "embedding" if isinstance(part, QuantizedEmbedding) else "linear",
            "rows": grid.rows, "columns": grid.columns, "bits": grid.bits, "group_size": grid.group_size,
            "zero": grid.zero,
        }  # fmt: skip
        if isinstance(part, QuantizedLinear) and part.activations is not None:
            entry["activations"] = part.activations
        key = part.codes.data_ptr()
        if key in first:
            entry["tied_to"] = first[key]
        first.setdefault(key, path)
        parts[path] = entry
    return {"quant_method": METHOD, "version": VERSION, "parts": parts} if parts else {}


def set_part(module: nn.Module, path: str, part: nn.Module) -> None:
    """Put a part in the place of another."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, part)


def substitute(old: nn.Module, array: QuantizedArray, activations: int | None = None) -> Quantized:
    """Make the quantized part that takes the place of a linear or an embedding.

    Args:
        old: The linear or embedding.
        array: The weight.
        activations: Bits that a linear rounds what it reads to, `None` for not at all.

    Raises:
        UnsupportedOptionError: The old part is of another kind or size.
    """
    if not is_embedding(old) and type(old) is not nn.Linear and not is_conv1d(old):
        raise UnsupportedOptionError(
            f"a {type(old).__name__} cannot be quantized; linears and embeddings can"
        )
    expected = tuple(matrix_of(old).shape)
    if expected != (array.grid.rows, array.grid.columns):
        raise UnsupportedOptionError(
            f"the quantized weight is {array.grid.rows} x {array.grid.columns}, the part takes {expected}"
        )
    # Any: nn.Module's attributes are tensors or modules to a type checker.
    part: Any = old
    if isinstance(old, nn.Embedding):
        factor = getattr(old, "embed_scale", None)
        return QuantizedEmbedding(
            array, part.weight.dtype, part.padding_idx, 1.0 if factor is None else factor
        )
    return QuantizedLinear(array, part.bias, activations=activations)


def matrix_of(part: Any) -> Tensor:
    """Give the weight of a linear or an embedding as `(out, in)`."""
    weight: Tensor = part.weight
    return weight.t() if is_conv1d(part) else weight


def set_matrix(part: Any, matrix: Tensor) -> None:
    """Give a linear or an embedding another weight, `(out, in)`, in a parameter of its own."""
    made = matrix.t().contiguous() if is_conv1d(part) else matrix
    part.weight = nn.Parameter(made, requires_grad=part.weight.requires_grad)


def values_of(part: Any) -> FloatArray:
    """Give the weight of a linear or an embedding as `(out, in)` float32 in NumPy."""
    matrix: FloatArray = matrix_of(part).detach().float().cpu().numpy()
    return np.ascontiguousarray(matrix)


def finite_values(module: nn.Module, path: str) -> FloatArray:
    """Give the weight of the part at `path`; see `values_of`.

    Raises:
        InputError: It holds NaN or infinity.
    """
    matrix = values_of(module.get_submodule(path))
    if not np.isfinite(matrix).all():
        raise InputError(f"{path} holds NaN or infinity: the model is damaged already")
    return matrix


def put(
    module: nn.Module, path: str, changed: QuantizedArray | FloatArray, activations: int | None = None
) -> nn.Module:
    """Put a changed weight, `(out, in)`, in its place; give the part that holds it now.

    `activations` is as for `substitute`.
    """
    part: Any = module.get_submodule(path)
    if not isinstance(changed, QuantizedArray):
        set_matrix(part, torch.from_numpy(changed).to(part.weight.device, part.weight.dtype))
        return part  # type: ignore[no-any-return]
    new = substitute(part, changed, activations).to(part.weight.device)
    set_part(module, path, new)
    return new


def tie(module: nn.Module, path: str, first: nn.Module, activations: int | None = None) -> None:
    """Give the part at `path` the very weight of another; `activations` is as for `substitute`."""
    part: Any = module.get_submodule(path)
    if isinstance(first, Quantized):
        new = substitute(part, first.array(), activations).to(part.weight.device)
        set_part(module, path, new.share(first))
    else:
        part.weight = first.weight


def is_embedding(part: nn.Module) -> bool:
    """Say whether a part looks rows up, and does no more with them than multiply them by a number."""
    scaled = isinstance(part, nn.Embedding) and type(part).__name__.endswith("ScaledWordEmbedding")
    return type(part) is nn.Embedding or (scaled and type(part).__module__.startswith("transformers."))


def is_conv1d(part: nn.Module) -> bool:
    """Say whether a part is GPT-2's linear, which stores its weight the other way round."""
    return type(part).__name__ == "Conv1D" and type(part).__module__ == "transformers.pytorch_utils"
