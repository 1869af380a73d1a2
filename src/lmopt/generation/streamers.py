"""Objects that transformers' `generate` takes as `streamer`, fed in the same way."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lmopt.errors import UnsupportedOptionError
from lmopt.generation.config import GenerationConfig
from lmopt.generation.results import Token
from lmopt.types import IntArray


class Streamer(Protocol):
    """What `transformers.generation.streamers.BaseStreamer` asks for."""

    def put(self, value: Any) -> object:
        """Take ids in: those of the prompt, `(1, tokens)`, then each new token, `(1,)`."""
        ...

    def end(self) -> object:
        """Note that no more will come."""
        ...


@contextlib.contextmanager
def told(
    streamer: Streamer | None,
    prompts: Sequence[Sequence[int] | IntArray],
    config: GenerationConfig | Sequence[GenerationConfig],
    on_token: Callable[[Token], object] | None,
) -> Iterator[Callable[[Token], object] | None]:
    """Feed a streamer while a request runs.

    `end` is called in any case, also where the request fails, so that nobody waits for more.

    Args:
        streamer: Gets NumPy arrays where transformers hands over tensors; `None` for none.
        prompts: The prompts of the request as ids.
        config: Its options.
        on_token: Another callback for the tokens.

    Yields:
        A callback for the tokens that serves both.

    Raises:
        UnsupportedOptionError: There is not one prompt with one sequence, the only thing that a streamer can show.
    """
    if streamer is None:
        yield on_token
        return
    configs = [config] if isinstance(config, GenerationConfig) else config
    if len(prompts) != 1 or any(one.num_beams > 1 or one.num_return_sequences > 1 for one in configs):
        raise UnsupportedOptionError(
            f"a streamer shows one sequence; given {len(prompts)} prompts, num_beams={configs[0].num_beams}, "
            f"num_return_sequences={configs[0].num_return_sequences}. Leave streamer out, or use on_token."
        )

    def both(token: Token) -> None:
        streamer.put(np.array([token.token_id], np.int64))
        if on_token is not None:
            on_token(token)

    try:
        streamer.put(np.asarray(prompts[0], np.int64)[None])
        yield both
    finally:
        streamer.end()
