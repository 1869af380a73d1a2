"""The honest oracle of the parity gate: the module as its author wrote it, one row, no cache."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmopt.backends.torch.attention import own_attention
from lmopt.backends.torch.cache_name import cache_name, cache_of
from lmopt.backends.torch.encoder_decoder import as_read
from lmopt.backends.torch.language_model import device_of, is_transformers
from lmopt.backends.torch.pages import give_back
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.errors import EngineError
from lmopt.types import AnyArray, FloatArray, IntArray, SourceFacts

# transformers' argument for the positions whose logits are wanted.
_KEEP: Final = "logits_to_keep"
# Uneven, so that every size class of a matrix product's kernels is met.
_PIECES: Final = (5, 1, 7, 16, 3, 24, 2)
# Ways in which the last bits of a source are changed: one alone may end where it began.
_SOURCES: Final = 4


class FullForward:
    """Logits of a module by one full forward pass of one row.

    Nothing of lmopt's own attention, masks, cache or padding is on this path, so that an error in
    them cannot hide on both sides of a comparison.

    Args:
        module: A transformers model or a module that meets `LanguageModel`.
        lean: Whether to hold no weights longer than they are read: what is mapped from files is given back
            after each row, and dequantized weights are computed anew for each.
        source: What the encoder of an encoder-decoder reads; `None` for models without one.
    """

    def __init__(self, module: nn.Module, *, lean: bool = False, source: SourceFacts | None = None) -> None:
        # Any: nn.Module's attributes are tensors or modules to a type checker.
        self._module: Any = module
        self._device = device_of(module)
        self._lean = lean
        self._source = source
        self._cache_name = cache_name(module) if is_transformers(module) else ""

    def __call__(self, ids: IntArray, source: AnyArray | None = None) -> FloatArray:
        """Read `(sequence,)` ids at once, after a source; return `(sequence, vocab_size)` float32 logits."""
        with ExitStack() as after, torch.inference_mode():
            if self._lean:
                after.callback(self.give_back)
                for part in quantized_parts(self._module).values():
                    after.callback(part.register_forward_hook(_forget).remove)
            logits, _ = self._run(self._row(ids), None, source)
            return _numpy(logits[0])

    def encoded(self, source: AnyArray) -> dict[str, AnyArray]:
        """Read a source; give what the decoder holds of it, by the names of the exported graphs."""
        start = self._row(np.zeros(1, np.int64))
        with torch.inference_mode():
            if self._cache_name:
                _, (cache, _) = self._run(start, None, source)
                layers = enumerate(cache.cross_attention_cache.layers)
                return {
                    f"past_key_values.{place}.encoder.{kind}": _numpy(leaf)
                    for place, layer in layers
                    for kind, leaf in (("key", layer.keys), ("value", layer.values))
                }
            leaves = pytree.tree_leaves(self._module.encode(self._inputs(source)))
            return {f"source_state.{place}": _numpy(leaf) for place, leaf in enumerate(leaves)}

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

    def rounding(self, ids: IntArray, source: AnyArray | None = None) -> FloatArray | None:
        """Measure what the order of operations alone does to the logits.

        The row is read a second time in pieces, by the module's own cache: the same function in
        exact arithmetic. An encoder has no pieces: after a source of real numbers the row is read again with other
        last bits of the source, which is the least that another order does to them, and the largest difference counts.

        Returns:
            `(sequence,)` float32, the largest difference at each position; `None` for a module
            without a state.
        """
        row = self._row(ids)
        state: Any = None
        largest: list[Tensor] = []
        place = turn = 0
        with torch.inference_mode():
            whole, _ = self._run(row, None, source)
            while place < row.shape[1]:
                piece = row[:, place : place + _PIECES[turn % len(_PIECES)]]
                logits, state = self._run(piece, state, source)
                if state is None:
                    return None
                # Compared at once: the logits of a row are in memory once, not once a step of the comparison.
                expected = whole[0, place : place + piece.shape[1]]
                largest.append((logits[0].float() - expected.float()).abs().amax(-1))
                place += piece.shape[1]
                turn += 1
            found = torch.cat(largest)
            for changed in self._with_other_last_bits(source):
                logits, _ = self._run(row, None, changed)
                found = torch.maximum(found, (logits[0].float() - whole[0].float()).abs().amax(-1))
            return _numpy(found)

    def _with_other_last_bits(self, source: AnyArray | None) -> Iterator[AnyArray]:
        if source is None or not np.issubdtype(source.dtype, np.floating):
            return
        eps = torch.finfo(next(self._module.parameters()).dtype).eps
        for seed in range(_SOURCES):
            signs = np.random.default_rng(seed).integers(-1, 2, source.shape)
            yield (source * (1 + eps * signs)).astype(source.dtype)

    def give_back(self) -> int:
        """Give back memory that is not in use until the next call; see `lmopt.backends.torch.pages`."""
        return give_back(self._module)

    def _row(self, ids: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids, np.int64))[None].to(self._device)

    def _run(self, row: Tensor, state: Any, source: AnyArray | None = None) -> tuple[Tensor, Any]:
        def call() -> tuple[Tensor, Any]:
            if self._source is None:
                return self._call(row, state)
            return self._call_after(row, state, source)

        result: tuple[Tensor, Any] = self._guarded(row, call)
        return result

    def _inputs(self, source: AnyArray | None) -> Tensor:
        return as_read(self._module, torch.from_numpy(np.ascontiguousarray(source))[None])

    def _call_after(self, row: Tensor, state: Any, source: AnyArray | None) -> tuple[Tensor, Any]:
        """Read ids after a source, or after those of which `state` came."""
        if not self._cache_name:
            result = self._module(row, self._module.encode(self._inputs(source)) if state is None else state)
            return result[0], result[1]
        with own_attention():
            if state is None:
                inputs = {self._module.main_input_name: self._inputs(source)}
                result = self._module(**inputs, decoder_input_ids=row, use_cache=True)
            else:
                cache, hidden = state
                result = self._module(
                    encoder_outputs=(hidden,),
                    decoder_input_ids=row,
                    use_cache=True,
                    **{self._cache_name: cache},
                )
        return result.logits, (cache_of(result), result.encoder_last_hidden_state)

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
