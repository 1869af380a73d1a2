"""Generation from token ids, for any engine and any number of prompts."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lmopt.contracts import Engine
from lmopt.errors import UnsupportedOptionError
from lmopt.generation.batching import steps
from lmopt.generation.beam import beam_search
from lmopt.generation.config import GenerationConfig
from lmopt.generation.fusion import Fusion
from lmopt.generation.interruption import Cancels, Interruption
from lmopt.generation.results import Generation, Token
from lmopt.generation.rows import Row, decoding_failed, prepare
from lmopt.generation.stopping import Detokenizer
from lmopt.generation.workspace import Workspace
from lmopt.types import IntArray

_logger = logging.getLogger(__name__)

OnToken: TypeAlias = Callable[[Token], object]


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int] | IntArray],
    config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    *,
    sources: Sequence[Any] | None = None,
    tokenizer: Detokenizer | None = None,
    cancel: Cancels = None,
    on_token: OnToken | None = None,
    workspace: Workspace | None = None,
    fusion: Fusion | None = None,
) -> list[list[Generation]]:
    """Generate from token ids, all prompts in one batch as far as the limits allow.

    Prompts enter the batch as soon as finished ones leave it. A row's result depends on its prompt, its
    seed and its config only: not on the other rows, their number, order or lengths (as far as the engine
    keeps its own promise of that).

    An error of one row (NaN in its logits, no token left to choose, a tokenizer that fails on its text)
    ends that row: its `finish_reason` is `"error"`, its `error` says why, and a warning is logged. Only
    where no row has a result the first error is raised, so that of a single prompt always is. What is wrong
    with the request is raised before any work, and a call that fails in the engine ends the request.

    Args:
        engine: Any engine.
        prompts: Token ids, of any lengths; an empty one starts from `bos_token_id`. For an encoder-decoder,
            what its decoder has been said to write; an empty one starts from its start token.
        config: Options, or a list with those of each prompt; `GenerationConfig()` where `None`.
        sources: What the encoder reads, one a prompt: `(source,)` ids or `(size, source)` features. `None` for
            models without an encoder.
        tokenizer: For text and stop strings; without it `Generation.text` is `None`.
        cancel: Looked at before each call of the engine, one for the request or a list with one (or
            `None`) a prompt; what is there by then is returned, with the `finish_reason` `"cancelled"`
            for rows that were not done.
        on_token: Called with each `Token` as soon as it is chosen; with beams, where no token is
            sure before the end, once with each token of the best sequences at the end.
        workspace: Limits, and what requests share.
        fusion: A language model of the same vocabulary that has a say in each token; greedy or with beams.

    Returns:
        For each prompt, in their order, its `num_return_sequences` results; those of beams best first.

    Raises:
        UnsupportedOptionError: Options that contradict the request, or leave no token to choose.
        ContextLengthError: Prompt and new tokens exceed the model's context, or `max_length`.
        EmptyPromptError: A prompt is empty and there is no `bos_token_id`.
        TokenIdError: An id is outside the vocabulary.
        TokenizerError: Stop strings without a tokenizer.
        EngineError: The engine returned NaN, or failed.
        VocabularyMismatchError: `fusion` has another vocabulary.
    """
    config = config or GenerationConfig()
    rows = prepare(engine, prompts, config, tokenizer, sources)
    if not rows:
        return []
    interruption = Interruption(cancel, rows)
    workspace = workspace or Workspace()
    if fusion is not None and any(row.config.do_sample for row in rows):
        raise UnsupportedOptionError("fusion with sampling is not implemented. Pass do_sample=False.")
    if fusion is not None and any(row.config.return_timestamps for row in rows):
        raise UnsupportedOptionError(
            "fusion with return_timestamps=True: a language model knows no times. Let it choose among whole texts "
            "instead: transcribe(..., method='rescore')"
        )
    if fusion is not None or any(row.config.num_beams > 1 for row in rows):
        if any(row.config != rows[0].config for row in rows):
            raise UnsupportedOptionError(
                "prompts with num_beams > 1, or with fusion, must all have the same config; given different ones. "
                "Call generate once for each of them."
            )
        found = beam_search(engine, rows, rows[0].config, tokenizer, interruption, fusion)
        if on_token is not None:
            _tell(found, on_token)
        return found
    with contextlib.closing(steps(engine, rows, workspace, interruption)) as running:
        for active in running:
            if on_token is not None:
                for row in active:
                    on_token(row.token())
    results: list[list[Generation]] = [[] for _ in prompts]
    for row in rows:
        text = None if tokenizer is None else _text(row, tokenizer)
        results[row.prompt].append(row.result(text))
    _report_errors(rows)
    return results


def _text(row: Row, tokenizer: Detokenizer) -> str | None:
    try:
        return row.text(tokenizer)
    except Exception as error:
        row.fail(row.error or decoding_failed(error))
        return None


def _report_errors(rows: Sequence[Row]) -> None:
    """Raise where nothing came out, else warn of what is missing."""
    failed = [row for row in rows if row.error is not None]
    if not failed:
        return
    first = failed[0].error
    assert first is not None
    if len(failed) == len(rows):
        raise first
    # Not its message: that may hold text of the prompt.
    _logger.warning(
        "%d of %d sequences ended with an error, see Generation.error; the first, of prompt %d, is a %s",
        len(failed), len(rows), failed[0].prompt, type(first).__name__,
    )  # fmt: skip


def _tell(found: Sequence[Sequence[Generation]], on_token: OnToken) -> None:
    """Hand out the tokens of finished beams."""
    for number, generations in enumerate(found):
        for sequence, generation in enumerate(generations):
            last = len(generation.token_ids) - 1
            for place, token in enumerate(generation.token_ids):
                reason = generation.finish_reason if place == last else None
                on_token(Token(number, sequence, token, reason))
