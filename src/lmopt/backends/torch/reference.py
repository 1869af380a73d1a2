"""The honest oracle of the parity gate: the module as its author wrote it, one row, no cache."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lmopt.backends.torch.attention import own_attention
from lmopt.backends.torch.cache_name import cache_name, cache_of
from lmopt.backends.torch.language_model import device_of, is_transformers
from lmopt.backends.torch.pages import give_back
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.errors import EngineError
from lmopt.types import FloatArray, IntArray

# transformers' argument for the positions whose logits are wanted.
_KEEP: Final = "logits_to_keep"
# Uneven, so that every size class of a matrix product's kernels is met.
_PIECES: Final = (5, 1, 7, 16, 3, 24, 2)


class FullForward:
    """Logits of a module by one full forward pass of one row.

    Nothing of lmopt's own attention, masks, cache or padding is on this path, so that an error in
    them cannot hide on both sides of a comparison.

    Args:
        module: A transformers model or a module that meets `LanguageModel`.
        lean: Whether to hold no weights longer than they are read: what is mapped from files is given back
            after each row, and dequantized weights are computed anew for each.
    """

    def __init__(self, module: nn.Module, *, lean: bool = False) -> None:
        # Any: nn.Module's attributes are tensors or modules to a type checker.
        self._module: Any = module
        self._device = device_of(module)
        self._lean = lean
        self._cache_name = cache_name(module) if is_transformers(module) else ""

    def __call__(self, ids: IntArray) -> FloatArray:
        """Read `(sequence,)` ids at once; return `(sequence, vocab_size)` float32 logits."""
        with ExitStack() as after, torch.inference_mode():
            if self._lean:
                after.callback(self.give_back)
                for part in quantized_parts(self._module).values():
                    after.callback(part.register_forward_hook(_forget).remove)
            logits, _ = self._run(self._row(ids), None)
            return _numpy(logits[0])

    def pieces(self, ids: IntArray, size: int) -> Iterator[FloatArray]:
        """Read `(sequence,)` ids at once, but give the logits some positions at a time.

        The logits of a large vocabulary take more memory than a small model. Where a transformers model can
        make them of some positions only, its blocks run once and its own last steps for each piece.

        Args:
            ids: As for a call.
            size: Positions of a piece.

        Yields:
            `(size, vocab_size)` float32 logits; the last piece may be shorter.
        """
        places = range(0, len(ids), size)
        body = getattr(self._module, "base_model", None) if self._cache_name else None
        if body in (None, self._module) or _KEEP not in inspect.signature(self._module.forward).parameters:
            logits = self(ids)
            yield from (logits[start : start + size] for start in places)
            return
        row = self._row(ids)
        with ExitStack() as after, torch.inference_mode(), own_attention():
            if self._lean:
                after.callback(self.give_back)
                for part in quantized_parts(body).values():
                    after.callback(part.register_forward_hook(_forget).remove)
            read = self._guarded(row, lambda: body(input_ids=row, use_cache=False))
        for start in places:
            kept = torch.arange(start, min(start + size, len(ids)), device=self._device)
            with torch.inference_mode(), own_attention(), _giving(body, read):
                given = self._guarded(row, lambda kept=kept: self._module(input_ids=row, **{_KEEP: kept}))  # type: ignore[misc]
            yield _numpy(given.logits[0])
        if self._lean:
            for part in quantized_parts(self._module).values():
                part.forget()

    def rounding(self, ids: IntArray) -> FloatArray | None:
        """Measure what the order of operations alone does to the logits.

        The row is read a second time in pieces, by the module's own cache: the same function in
        exact arithmetic.

        Returns:
            `(sequence,)` float32, the largest difference at each position; `None` for a module
            without a state.
        """
        row = self._row(ids)
        state: Any = None
        parts: list[Tensor] = []
        place = turn = 0
        with torch.inference_mode():
            whole, _ = self._run(row, None)
            while place < row.shape[1]:
                piece = row[:, place : place + _PIECES[turn % len(_PIECES)]]
                logits, state = self._run(piece, state)
                if state is None:
                    return None
                parts.append(logits[0])
                place += piece.shape[1]
                turn += 1
            return _numpy((torch.cat(parts).float() - whole[0].float()).abs().amax(-1))

    def give_back(self) -> int:
        """Give back memory that is not in use until the next call; see `lmopt.backends.torch.pages`."""
        return give_back(self._module)

    def _row(self, ids: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids, np.int64))[None].to(self._device)

    def _run(self, row: Tensor, state: Any) -> tuple[Tensor, Any]:
        result: tuple[Tensor, Any] = self._guarded(row, lambda: self._call(row, state))
        return result

    def _guarded(self, row: Tensor, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise EngineError(
                f"{type(self._module).__name__} itself fails on a row of {row.shape[1]} tokens "
                f"({type(error).__name__}: {error}). If it has a longest row, say so: "
                "lmopt.Model.from_module(module, context_length=...)"
            ) from error

    def _call(self, row: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self._cache_name:
            with own_attention():
                result = self._module(input_ids=row, use_cache=True, **{self._cache_name: state})
            return result.logits, cache_of(result)
        result = self._module(row) if state is None else self._module(row, state)
        return result if isinstance(result, tuple) else (result, None)


@contextmanager
def _giving(body: nn.Module, result: Any) -> Iterator[None]:
    """Let a module give a result that it has computed before, instead of computing."""
    # On the object, where it hides the class's own.
    body.forward = lambda *args, **kwargs: result
    try:
        yield
    finally:
        del body.forward


def _forget(part: Any, args: Any, result: Any) -> None:
    part.forget()


def _numpy(tensor: Tensor) -> FloatArray:
    values: FloatArray = tensor.float().cpu().numpy()
    return values
