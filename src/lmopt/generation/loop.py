"""The decoding loop: greedy and sampled, for any engine and any batch."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias

import numpy as np

from lmopt.contracts import Engine
from lmopt.generation.beam import beam_search
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.generation.config import GenerationConfig
from lmopt.generation.processors import Processor, build_processors
from lmopt.generation.results import Generation, Token
from lmopt.generation.rows import Cancel, Row, prepare
from lmopt.generation.sampling import check_best, draw, greedy, narrow
from lmopt.generation.stopping import Detokenizer
from lmopt.types import FloatArray, IntArray

OnToken: TypeAlias = Callable[[Token], object]


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int] | IntArray],
    config: GenerationConfig | None = None,
    *,
    tokenizer: Detokenizer | None = None,
    cancel: Cancel | None = None,
    on_token: OnToken | None = None,
) -> list[list[Generation]]:
    """Generate from token ids, all prompts in one batch.

    A row's result depends on its prompt, its seed and the config only: not on the other rows, their
    number, order or lengths (as far as the engine keeps its own promise of that).

    Args:
        engine: Any engine.
        prompts: Token ids, of any lengths; an empty one starts from `bos_token_id`.
        config: Options; `GenerationConfig()` where `None`.
        tokenizer: For text and stop strings; without it `Generation.text` is `None`.
        cancel: Looked at before each token; what is there by then is returned, with the
            `finish_reason` `"cancelled"` for rows that were not done.
        on_token: Called with each `Token` as soon as it is chosen; with beams, where no token is
            sure before the end, once with each token of the best sequences at the end.

    Returns:
        For each prompt, its `num_return_sequences` results; those of beams best first.

    Raises:
        UnsupportedOptionError: Options that contradict the request, or leave no token to choose.
        ContextLengthError: Prompt and new tokens exceed the model's context, or `max_length`.
        EmptyPromptError: A prompt is empty and there is no `bos_token_id`.
        TokenIdError: An id is outside the vocabulary.
        TokenizerError: Stop strings without a tokenizer.
        EngineError: The engine returned NaN.
    """
    config = config or GenerationConfig()
    rows = prepare(engine, prompts, config, tokenizer)
    if not rows:
        return []
    results: list[list[Generation]] = [[] for _ in prompts]
    if config.num_beams > 1:
        for number, found in enumerate(beam_search(engine, rows, config, tokenizer, cancel)):
            results[number] = found
            for sequence, generation in enumerate(found):
                last = len(generation.token_ids) - 1
                for place, token in enumerate(generation.token_ids if on_token else ()):
                    reason = generation.finish_reason if place == last else None
                    on_token(Token(number, sequence, token, reason))  # type: ignore[misc]
        return results
    with contextlib.closing(steps(engine, rows, config, cancel)) as running:
        for active in running:
            if on_token is not None:
                for row in active:
                    on_token(row.token())
    for row in rows:
        results[row.prompt].append(row.result(config, None if tokenizer is None else row.text(tokenizer)))
    return results


def steps(
    engine: Engine, rows: list[Row], config: GenerationConfig, cancel: Cancel | None = None
) -> Generator[list[Row]]:
    """Give each unfinished row its next token, step by step, until all are finished.

    Args:
        engine: Any engine.
        rows: From `prepare`; changed in place.
        config: Options.
        cancel: Looked at before each step.

    Yields:
        The rows that have just been given a token.
    """
    engine = for_unequal_rows(engine)
    processors = build_processors(config, engine.facts.vocab_size)
    active = rows
    if _cancelled(cancel, active):
        return
    # Sequences of one prompt share its reading.
    firsts = [row for row in rows if row.sequence == 0]
    lengths = np.array([row.history.length for row in firsts])
    input_ids = np.zeros((len(firsts), lengths.max()), np.int64)
    for line, row in zip(input_ids, firsts, strict=True):
        line[: row.history.length] = row.history.seen
    state = engine.begin(len(firsts), capacity=max(row.history.max_length for row in rows))
    logits, state = engine.forward(input_ids, lengths, state, last_only=True)
    if len(firsts) < len(rows):
        repeats = np.array([row.prompt for row in rows])
        logits, state = logits[repeats], engine.select(state, repeats)
    while True:
        last = logits[:, -1]
        for row, token in zip(active, choose(last, active, config, processors), strict=True):
            row.accept(token)
        yield active
        kept = [number for number, row in enumerate(active) if row.finish_reason is None]
        if not kept:
            return
        if len(kept) < len(active):
            active = [active[number] for number in kept]
            state = engine.select(state, np.array(kept))
        if _cancelled(cancel, active):
            return
        next_ids = np.array([[row.history.buffer[row.history.length - 1]] for row in active])
        logits, state = engine.forward(next_ids, np.ones(len(active), np.int64), state, last_only=True)


def choose(
    logits: FloatArray, rows: list[Row], config: GenerationConfig, processors: Sequence[Processor]
) -> list[int]:
    """Choose the next token of each row and note log-probabilities.

    Args:
        logits: `(rows, vocab_size)` raw logits.
        rows: The rows.
        config: Options.
        processors: From `build_processors`.
    """
    if not processors and not config.do_sample:
        tokens = greedy(logits)
    else:
        tokens = [_choose_one(line, row, config, processors) for line, row in zip(logits, rows, strict=True)]
    if config.wants_logprobs:
        for line, row, token in zip(logits, rows, tokens, strict=True):
            row.record(line, token, config.top_logprobs)
    return tokens


def _choose_one(
    logits: FloatArray, row: Row, config: GenerationConfig, processors: Sequence[Processor]
) -> int:
    # A row is processed alone: its arithmetic, rounding included, is then the same in any batch.
    check_best(float(logits.max()))
    scores = logits
    if processors:
        scores = logits.copy()
        for processor in processors:
            processor(scores, row.history)
        check_best(float(scores.max()))
    return draw(narrow(scores, config), row.uniform()) if config.do_sample else int(scores.argmax())


def _cancelled(cancel: Cancel | None, rows: list[Row]) -> bool:
    if cancel is None or not cancel.is_set():
        return False
    for row in rows:
        row.finish_reason = "cancelled"
    return True
