"""Text while it is being generated, in pieces that never have to be taken back."""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

from lmopt.contracts import Engine
from lmopt.errors import TokenizerError, UnsupportedOptionError
from lmopt.generation.batching import steps
from lmopt.generation.config import GenerationConfig
from lmopt.generation.interruption import Interruption
from lmopt.generation.results import Generation
from lmopt.generation.rows import Cancel, Row, prepare
from lmopt.generation.stopping import REPLACEMENT, Detokenizer
from lmopt.generation.workspace import Workspace
from lmopt.types import IntArray

_CONTEXT = (
    4  # tokens that the next ones are decoded with: an incomplete character has at most 3 before its last
)
_WINDOW = 12  # tokens after which the context moves on


class IncrementalText:
    """Turns ids into text one by one, at a cost per token that does not grow with the text.

    Only text that later tokens cannot change is given out: not a character whose bytes are still
    incomplete, and not a run of byte tokens (`<0xE4>`), which decoders judge as a whole.

    Args:
        tokenizer: Turns ids into text.
    """

    def __init__(self, tokenizer: Detokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were given out
        self._kinds: dict[int, tuple[bool, bool]] = {}

    def push(self, token: int) -> str:
        """Add a token; return the text that has become certain, often one word, sometimes none."""
        special, byte = self._kinds.get(token) or self._kind(token)
        if special:
            return ""
        self._window.append(token)
        if byte:
            return ""
        text = self._decode(self._window).removesuffix(REPLACEMENT)
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        if len(self._window) > _WINDOW:
            self._window = self._window[-_CONTEXT:]
            self._given = len(self._decode(self._window).removesuffix(REPLACEMENT))
        return piece

    def finish(self) -> str:
        """Return what waits for tokens that will not come, incomplete characters included."""
        return self._decode(self._window)[self._given :]

    def _kind(self, token: int) -> tuple[bool, bool]:
        """Whether a token is special, and whether it is a byte token."""
        entry = self._tokenizer.id_to_token(token) or ""
        special = (
            self._decode([token]) == "" and self._tokenizer.decode([token], skip_special_tokens=False) != ""
        )
        self._kinds[token] = special, len(entry) == 6 and entry.startswith("<0x")
        return self._kinds[token]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class RowText:
    """The text of a row while it grows; a piece that may be the beginning of a stop string waits.

    Args:
        row: From `prepare`.
        tokenizer: Turns ids into text.

    Attributes:
        text: What was given out.
    """

    def __init__(self, row: Row, tokenizer: Detokenizer) -> None:
        self.text = ""
        self._row = row
        self._tokenizer = tokenizer
        self._certain = IncrementalText(tokenizer)
        self._waiting = ""

    def push(self) -> str:
        """Take the row's newest token in; return the text that can be given out."""
        row = self._row
        self._waiting += self._certain.push(row.history.newest)
        if not self._waiting or row.finish_reason is not None:
            return ""
        held = row.stops.tail(row.history.seen) if row.stops else 0
        ready = self._waiting[: max(0, len(self._waiting) - held)]
        self._waiting = self._waiting[len(ready) :]
        self.text += ready
        return ready

    def finish(self) -> str:
        """Return what is left once the row has ended."""
        row = self._row
        final = row.text(self._tokenizer)
        if final.startswith(self.text):
            rest = final[len(self.text) :]
        else:
            # A decoder that rewrites what came before (some clean-up rules do) cannot be followed: what was
            # shown counts, and the text goes on from there.
            rest = self._waiting + self._certain.finish()
            if row.stops and row.finish_reason == "stop_string":
                rest = rest[: max(0, len(rest) - row.stops.tail(row.history.seen))]
        self.text += rest
        return rest


def stream(
    engine: Engine,
    prompt: Sequence[int] | IntArray,
    config: GenerationConfig | None = None,
    *,
    source: Any = None,
    tokenizer: Detokenizer,
    cancel: Cancel | None = None,
    workspace: Workspace | None = None,
) -> Generator[str, None, Generation]:
    """Generate from one prompt and yield the text while it grows.

    The pieces, put together, are the text of the `Generation` that the generator returns
    (`result = yield from stream(...)`, or `StopIteration.value`). A piece that may be the beginning of
    a stop string waits until that is known. Closing the generator ends the work at once.

    Args:
        engine: Any engine.
        prompt: Token ids.
        config: Options; `GenerationConfig()` where `None`.
        source: What the encoder reads; `None` for models without one.
        tokenizer: Turns ids into text.
        cancel: Something with `is_set()`, such as a `threading.Event`, looked at before each call of the
            engine.
        workspace: Limits, and what requests share.

    Raises:
        UnsupportedOptionError: Beams or several sequences, which have no text before the end.
        InputError: As `generate` does.
    """
    config = config or GenerationConfig()
    if config.num_beams > 1 or config.num_return_sequences > 1:
        raise UnsupportedOptionError(
            f"a stream has one sequence; given num_beams={config.num_beams}, "
            f"num_return_sequences={config.num_return_sequences}. Call generate instead."
        )
    if tokenizer is None:
        raise TokenizerError("a stream of text needs a tokenizer. Pass one, or call generate for token ids.")
    (row,) = prepare(engine, [prompt], config, tokenizer, [source])
    running = steps(engine, [row], workspace or Workspace(), Interruption(cancel, [row]))
    return _pieces(running, row, tokenizer)


def _pieces(
    running: Generator[list[Row]], row: Row, tokenizer: Detokenizer
) -> Generator[str, None, Generation]:
    text = RowText(row, tokenizer)
    with contextlib.closing(running):
        for _ in running:
            if row.error is not None:
                break
            if piece := text.push():
                yield piece
    if row.error is not None:
        raise row.error
    if rest := text.finish():
        yield rest
    return row.result(text.text)
