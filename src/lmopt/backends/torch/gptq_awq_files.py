"""Read weights in the formats of GPTQ and AWQ.

A linear of N outputs and K inputs is, in GPTQ's format,

- `qweight`, int32 `(K * bits / 32, N)`: codes packed along K,
- `qzeros`, int32 `(groups, N * bits / 32)`: zero points packed along N; in the format's first version one less,
- `scales`, `(groups, N)`,
- `g_idx`, int32 `(K,)`: group of each column, which act-order quantization mixes up;

and in AWQ's ("gemm") `qweight` is int32 `(K, N / 8)`: 4-bit codes packed along N, eight of a word in the
order `_AWQ_ORDER`, as are `qzeros`.

Sources: AutoGPTQ's `QuantLinear.pack` (auto_gptq/nn_modules/qlinear/qlinear_cuda.py of
https://github.com/AutoGPTQ/AutoGPTQ) and AutoAWQ's `WQLinear_GEMM.from_linear` (awq/modules/linear/gemm.py of
https://github.com/casper-hansen/AutoAWQ).
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from lmopt.backends.torch.bitstreams import (
    from_stream,
    pack_stream,
    read_scales,
    read_words,
    unpack_stream,
    whole_row,
    words,
)
from lmopt.compression.layout import Codes, QuantizedArray
from lmopt.errors import CorruptArtifactError, UnsupportedError

_GPTQ_BITS: Final = (4, 8, 3, 2)
_AWQ_BITS: Final = 4
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)

Reader = Callable[[Mapping[str, Tensor], int, int, str], QuantizedArray]
"""Gives a weight of its stored tensors, rows, columns and name."""


def read_gptq(described: Mapping[str, Any], name: str) -> Reader:
    """Read a `quantization_config` of AutoGPTQ, GPTQModel or optimum.

    Args:
        described: The configuration.
        name: What is loaded, for messages.

    Returns:
        A function that reads one weight. It raises `CorruptArtifactError` and `UnsupportedError`, too.

    Raises:
        CorruptArtifactError: A size is malformed.
        UnsupportedError: The form is named.
    """
    bits, group_size = _sizes(described, name)
    version = described.get("checkpoint_format") or described.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2") or described.get("is_marlin_format"):
        raise _unsupported(name, "GPTQ", f"the checkpoint format {version!r}; 'gptq' and 'gptq_v2' are read")
    if described.get("pack_dtype", "int32") != "int32":
        raise _unsupported(name, "GPTQ", f"words of type {described['pack_dtype']!r}; int32 is read")
    if bits not in _GPTQ_BITS:
        raise _unsupported(name, "GPTQ", f"{bits} bits; 2, 3, 4 and 8 are read")
    if described.get("adapter"):
        raise _unsupported(name, "GPTQ", "an adapter beside its weights")
    meta = described.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    carries = any(
        str(one).startswith("gptqmodel") for one in (writers if isinstance(writers, list) else [writers])
    )
    mixed = bool(described.get("dynamic"))

    def read(given: Mapping[str, Tensor], rows: int, columns: int, where: str) -> QuantizedArray:
        qweight, qzeros, scale = (_given(given, one, where) for one in ("qweight", "qzeros", "scales"))
        # Parts may be of another width than the rest ("dynamic"), which their shape tells.
        own = next((one for one in (bits, *_GPTQ_BITS) if words(columns, one) == qweight.shape[0]), bits)
        own = own if mixed else bits
        stream = read_words(qweight.t(), (rows, words(columns, own)), f"qweight, transposed, of {where}")
        groups = scale.shape[0]
        size = _group_size(group_size, groups, columns, mixed, where)
        scales = read_scales(scale.t(), (rows, groups), f"scales, transposed, of {where}")
        stored = read_words(qzeros, (groups, words(rows, own)), f"qzeros of {where}")
        zeros = _gptq_zeros(
            stored, rows, own, first=version == "gptq", symmetric=described.get("sym") is True, carries=carries,
            where=where,
        )  # fmt: skip
        _check_order(given.get("g_idx"), columns, size, bool(described.get("desc_act")), where)
        return from_stream(stream, columns, own, size, scales, zeros.T, where)

    return read


def _gptq_zeros(
    stored: Codes, rows: int, bits: int, *, first: bool, symmetric: bool, carries: bool, where: str
) -> Codes:
    """Read zero points, `(groups, rows)`.

    The first version of the format stores them less one, so that zero becomes the largest code. For such a
    one, AutoGPTQ writes ones over its neighbours, its kernels read 0 or `2 ** bits`, and GPTQModel subtracts
    and adds whole words, where the one carries over.
    """
    zeros, top, middle = unpack_stream(stored, rows, bits), (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        # Then they are the middle, whichever version the file says it is: some say the wrong one
        # (https://github.com/vllm-project/vllm/pull/38966).
        if (zeros == middle).all():
            return zeros
        if (zeros == middle - 1).all():
            return zeros + np.uint8(1)
    if not first:
        return zeros
    if (zeros < top).all():
        return zeros + np.uint8(1)
    if carries and 32 % bits == 0:
        each = np.uint32(0xFFFFFFFF // top)
        return unpack_stream((stored.view("<u4") + each).view(np.uint8), rows, bits)
    raise UnsupportedError(
        f"{where} has zero points of 0, which the format 'gptq' cannot tell: programs that read it disagree about "
        "them. Quantize it again as 'gptq_v2' or symmetrically (sym=True)."
    )


def _check_order(order: Tensor | None, columns: int, group_size: int, mixed_up: bool, where: str) -> None:
    if order is None and not mixed_up:
        return
    if order is None or tuple(order.shape) != (columns,):
        raise CorruptArtifactError(
            f"g_idx of {where} is missing or not of shape {(columns,)}: get a fresh copy"
        )
    if not torch.equal(order.long(), torch.arange(columns) // group_size):
        raise UnsupportedError(
            f"the columns of {where} are grouped in another order than they are stored in (g_idx: GPTQ with "
            "desc_act=True), which lmopt's layout cannot hold. Quantize it again with desc_act=False (in GPTQModel, "
            "act_group_aware=True keeps its accuracy), or use the original float model."
        )


def read_awq(described: Mapping[str, Any], name: str) -> Reader:
    """Read a `quantization_config` of AutoAWQ.

    Args:
        described: The configuration.
        name: What is loaded, for messages.

    Returns:
        A function that reads one weight. It raises `CorruptArtifactError` and `UnsupportedError`, too.

    Raises:
        CorruptArtifactError: A size is malformed.
        UnsupportedError: The form is named.
    """
    bits, group_size = _sizes(described, name)
    version = described.get("version") or described.get("format") or "gemm"
    if bits != _AWQ_BITS:
        raise _unsupported(name, "AWQ", f"{bits} bits; {_AWQ_BITS} are read")
    if str(version).lower() != "gemm" or described.get("backend") == "llm-awq":
        raise _unsupported(name, "AWQ", f"the version {version!r} for other kernels; 'gemm' is read")

    def read(given: Mapping[str, Tensor], rows: int, columns: int, where: str) -> QuantizedArray:
        scale, width = _given(given, "scales", where), words(rows, bits)
        groups = scale.shape[0]
        size = _group_size(group_size, groups, columns, False, where)
        scales = read_scales(scale.t(), (rows, groups), f"scales, transposed, of {where}")
        codes = _in_order(
            read_words(_given(given, "qweight", where), (columns, width), f"qweight of {where}"), rows
        )
        zeros = None
        if "qzeros" in given or described.get("zero_point", True):
            zeros = _in_order(
                read_words(_given(given, "qzeros", where), (groups, width), f"qzeros of {where}"), rows
            ).T
        stream = pack_stream(np.ascontiguousarray(codes.T), bits)
        return from_stream(stream, columns, bits, size, scales, zeros, where)

    return read


def _in_order(stream: Codes, count: int) -> Codes:
    """Unpack rows of words whose eight codes are interleaved: `(rows, count)`."""
    codes = unpack_stream(stream, stream.shape[1] * 2, _AWQ_BITS).reshape(len(stream), -1, 8)
    return codes[:, :, np.argsort(_AWQ_ORDER)].reshape(len(stream), -1)[:, :count]


def _sizes(described: Mapping[str, Any], name: str) -> tuple[int, int]:
    bits, group_size = described.get("bits"), described.get("group_size", 128)
    if type(bits) is not int or type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise CorruptArtifactError(
            f"the quantization_config of {name} has bits {bits!r} and group_size {group_size!r}; expected whole "
            "numbers, group_size from 1 or -1 for one group a row"
        )
    return bits, group_size


def _given(given: Mapping[str, Tensor], one: str, where: str) -> Tensor:
    tensor = given.get(one)
    if tensor is None or tensor.dim() != 2:
        raise CorruptArtifactError(f"{where} has no {one}, or one that is no matrix: get a fresh copy")
    return tensor


def _group_size(stated: int, groups: int, columns: int, mixed: bool, where: str) -> int:
    size = columns if stated == -1 else stated
    if mixed and groups and columns % groups == 0 and -(-columns // size) != groups:
        size = columns // groups
    if -(-columns // size) != groups:
        raise CorruptArtifactError(
            f"scales of {where} have {groups} groups for {columns} columns; its configuration says groups of {stated}"
        )
    return whole_row(columns) if groups == 1 else size


def _unsupported(name: str, method: str, what: str) -> UnsupportedError:
    return UnsupportedError(f"{name} is quantized by {method} with {what}. Use the original float model.")
