"""What an encoder-decoder is measured on: sources, and what its decoder writes or should write after them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from lmopt.contracts import EngineRequest
from lmopt.errors import InputError
from lmopt.gate import GATE_TEXTS
from lmopt.generation import GenerationConfig, generate
from lmopt.generation.sources import check_source
from lmopt.model import Model
from lmopt.registry import backends
from lmopt.types import AnyArray, FloatArray, IntArray

# Made-up sources where there are none: enough to see that something is broken.
_MADE_UP: Final = 4
_POSITIONS: Final = 48
_WRITTEN: Final = 48


def pairs(
    model: Model, sources: Sequence[Any] | None, texts: Sequence[str] | None
) -> tuple[list[AnyArray], list[IntArray]]:
    """Give sources, and for each a row of the decoder.

    Args:
        model: An encoder-decoder.
        sources: What its encoder reads, each a text, ids or features; built-in texts, or seeded random numbers, where
            `None`.
        texts: What is right after each source. Where `None`, the model's own greedy texts: a compressed model is then
            judged by how it would go on writing them.

    Raises:
        InputError: There are texts without sources, or not as many.
        TokenizerError: Texts, and no tokenizer.
    """
    facts = model.facts.source
    assert facts is not None
    if texts is not None and (sources is None or len(sources) != len(texts)):
        raise InputError(
            f"{len(texts)} texts and {'no' if sources is None else len(sources)} sources: an encoder-decoder is "
            "measured on pairs. Give compress(model, sources=[...], texts=[...]) as many of each, or sources alone"
        )
    if sources is None:
        sources = _made_up(model)
    encode = None if model.tokenizer is None else model.tokenizer.encode
    if encode is None and any(isinstance(one, str) for one in [*sources, *(texts or ())]):
        raise InputError(
            "the model has no tokenizer, so texts cannot be read; give ids or features, and no texts"
        )
    read = []
    for number, one in enumerate(sources):
        ids: Any = encode(one) if encode is not None and isinstance(one, str) else one
        checked = check_source(ids, model.facts, f"source {number}")
        assert checked is not None
        read.append(checked)
    start, limit = facts.start_token_id, model.facts.context_length
    if texts is None:
        return read, _written(model, read)
    assert encode is not None
    rows = [ids if ids[:1] == [start] else [start, *ids] for ids in map(encode, texts)]
    return read, [np.array(row[:limit], np.int64) for row in rows]


def after(
    forward: Callable[[IntArray, AnyArray], FloatArray], sources: Sequence[AnyArray]
) -> Callable[[IntArray, int], Iterator[FloatArray]]:
    """Let a forward pass read rows after their sources: the first row after the first source, and so on."""
    waiting = iter(sources)

    def pieces(ids: IntArray, size: int) -> Iterator[FloatArray]:
        logits = forward(ids, next(waiting))
        yield from (logits[place : place + size] for place in range(0, len(ids), size))

    return pieces


def _made_up(model: Model) -> Sequence[Any]:
    facts = model.facts.source
    assert facts is not None
    positions = (facts.length if facts.fixed else None) or min(_POSITIONS, facts.length or _POSITIONS)
    random = np.random.default_rng(0)
    if facts.kind == "features":
        return [random.normal(size=(facts.size, positions)).astype(np.float32) for _ in range(_MADE_UP)]
    if model.tokenizer is None:
        return [random.integers(0, facts.size, positions) for _ in range(_MADE_UP)]
    return [model.tokenizer.encode(text)[: facts.length] for text in GATE_TEXTS]


def _written(model: Model, sources: Sequence[AnyArray]) -> list[IntArray]:
    """Let the model write after each source."""
    facts = model.facts.source
    assert facts is not None
    room = min(_WRITTEN, (model.facts.context_length or _WRITTEN + 1) - 1)
    config = GenerationConfig.from_options(
        {"eos_token_id": model.generation_config.get("eos_token_id")}, max_new_tokens=room
    )
    engine = backends.load("torch")(EngineRequest(facts=model.facts, module=model.module))
    try:
        found = generate(engine, [[facts.start_token_id]] * len(sources), config, sources=list(sources))
    finally:
        engine.close()
    return [np.array([facts.start_token_id, *one[0].token_ids], np.int64) for one in found]
