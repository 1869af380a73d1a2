"""The ways of running a model that the parity gate compares, each with its known places of error.

A **row** is a fixed list of token ids of which the reference knows the logits. Every case feeds rows
to an engine in its own way (at once, token by token, in uneven pieces, in padded batches, reordered)
and yields what came back together with where it belongs, so that one pass of the reference over each
row judges all cases.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple, Self

import numpy as np

from lmopt.contracts import Engine, PaddingSide, State, SupportsEncoder
from lmopt.errors import EngineError, InputError, TokenIdError, UnsupportedError
from lmopt.generation.sources import begin, pack
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts, SourceFacts

# Tokens that a row reads after its prompt: 1 to _MOST_CHUNK at once, then _SINGLES one by one.
_MOST_CHUNK: Final = 5
_SINGLES: Final = 6
_LEAST_CONTEXT: Final = 4
_BATCH_LOGIT_BYTES: Final = 48 * 2**20
# Sizes of the pieces of the case "several"; uneven, and 1 among them.
_PIECES: Final = (5, 1, 7, 3, 16, 2)
# Lengths of drawn sources.
_SOURCES: Final = (11, 1, 37, 6, 19)


class Seen(NamedTuple):
    """Logits that an engine gave, and the place that they belong to.

    Attributes:
        row: Number of the row.
        start: Position in the row of the token after which the first logits were taken.
        logits: `(tokens, vocab)` float32.
    """

    row: int
    start: int
    logits: FloatArray


@dataclass(frozen=True, slots=True)
class Row:
    """One row of token ids and how it is split.

    Attributes:
        number: Index by which `Seen` refers to it.
        ids: `(tokens,)` int64.
        prompt: Tokens read first.
        chunk: Tokens read at once after the prompt; the remaining ones follow one by one.
        source: What the encoder reads before them; `None` for models without one.
    """

    number: int
    ids: IntArray
    prompt: int
    chunk: int
    source: AnyArray | None = None


def make_rows(
    facts: ModelFacts,
    prompts: Sequence[Sequence[int]] | None,
    lengths: Sequence[int],
    seed: int,
    sources: Sequence[AnyArray] | None = None,
) -> list[Row]:
    """Cut rows of the given prompt lengths, plus what they read afterwards.

    Args:
        facts: Vocabulary size and context length; no row exceeds the context, and where a length
            is cut down to fit, that row fills the context to its last position.
        prompts: Rows of token ids to take the ids from, each row from the start of a prompt;
            `None` draws random ids away from both ends of the vocabulary, where special tokens lie.
        lengths: Prompt lengths.
        seed: Seed of the random ids.
        sources: For encoder-decoders: sources of the rows, taken in turn; `None` makes some of unequal lengths.

    Raises:
        UnsupportedError: The context is too short to check a cache.
        InputError: The prompts hold no token, or a length is below 1.
        TokenIdError: A prompt holds an id outside the vocabulary.
    """
    context = facts.context_length
    if context is not None and context < _LEAST_CONTEXT:
        raise UnsupportedError(
            f"the parity gate needs a context of at least {_LEAST_CONTEXT} tokens to check cached decoding; "
            f"this model has {context}."
        )
    if not lengths or min(lengths) < 1:
        raise InputError(f"lengths must be positive prompt lengths, given: {list(lengths)}")
    singles = _SINGLES if context is None else max(1, min(_SINGLES, context // 4))
    most_chunk = _MOST_CHUNK if context is None else max(1, min(_MOST_CHUNK, context // 8))
    material, starts = _material(facts, prompts, seed)
    rows: dict[int, Row] = {}
    for length in lengths:
        number = len(rows)
        chunk = 1 + (2 * number) % most_chunk
        prompt = length if context is None else min(length, context - chunk - singles)
        if prompt in rows:
            continue
        total = prompt + chunk + singles
        # A stride that no prompt is likely to repeat at keeps the rows different from each other.
        start = starts[number % len(starts)] + 7 * (number // len(starts))
        ids = material.take(np.arange(start, start + total), mode="wrap")
        source = None
        if facts.source is not None:
            ids[0] = facts.source.start_token_id
            source = sources[number % len(sources)] if sources else make_source(facts.source, number, seed)
        rows[prompt] = Row(number, ids, prompt, chunk, source)
    return list(rows.values())


def make_source(facts: SourceFacts, number: int, seed: int) -> AnyArray:
    """Draw a source: ids away from both ends of the vocabulary, or features of the size of log-mel ones.

    Args:
        facts: What the encoder reads.
        number: Number of the source; neighbours differ in length where they may.
        seed: Seed of the random numbers.
    """
    random = np.random.default_rng((seed, number))
    length = _SOURCES[number % len(_SOURCES)]
    if facts.length is not None:
        length = facts.length if facts.fixed else min(length, facts.length)
    if facts.kind == "ids":
        margin = facts.size // 8
        return random.integers(margin, facts.size - margin, length)
    return random.normal(0.0, 0.5, (facts.size, length)).astype(np.float32).clip(-1.0, 1.5)


def _material(
    facts: ModelFacts, prompts: Sequence[Sequence[int]] | None, seed: int
) -> tuple[IntArray, list[int]]:
    """One long row of ids, and where prompts start in it."""
    vocab = facts.vocab_size
    if prompts is None:
        margin = vocab // 8
        return np.random.default_rng(seed).integers(margin, vocab - margin, 4096), [31 * i for i in range(64)]
    material = np.array([token for prompt in prompts for token in prompt], dtype=np.int64)
    if not material.size:
        raise InputError("the prompts for the parity gate hold no token; pass prompts=None for random ids.")
    if material.min() < 0 or material.max() >= vocab:
        raise TokenIdError(
            f"the prompts hold token ids {material.min()} .. {material.max()}; the model knows "
            f"0 .. {vocab - 1}. Is this the model's own tokenizer?"
        )
    ends = np.cumsum([len(prompt) for prompt in prompts])
    return material, sorted({0, *(int(end) for end in ends[:-1])})


class Feed:
    """Reads rows in step with an engine's state, and says where each of its logits belongs.

    Args:
        engine: Engine that takes rows of unequal lengths.
        rows: Rows of the batch, in order.
        side: Side of the padding.
        capacity: Most tokens that a row will hold.
    """

    def __init__(
        self, engine: Engine, rows: Sequence[Row], *, side: PaddingSide = "right", capacity: int = 0
    ) -> None:
        self.engine = engine
        self.rows = list(rows)
        self.capacity = capacity or max(len(row.ids) for row in rows)
        self.done = [0] * len(rows)
        sources = [row.source for row in rows]
        self.state: State = begin(engine, sources, capacity=self.capacity, padding_side=side)

    def read(self, counts: Iterable[int], *, last_only: bool = False) -> list[Seen]:
        """Read the next `counts[b]` tokens of each row `b` in one call."""
        lengths = np.fromiter(counts, np.int64)
        width = int(lengths.max())
        # Padding is made of ordinary tokens: whatever lies there must have no effect.
        ids = np.stack([np.resize(row.ids[::-1], width) for row in self.rows])
        for place, (row, start, count) in enumerate(zip(self.rows, self.done, lengths, strict=True)):
            ids[place, :count] = row.ids[start : start + count]
        logits, self.state = self.engine.forward(ids, lengths, self.state, last_only=last_only)
        expected = (len(self.rows), 1 if last_only else width, self.engine.facts.vocab_size)
        check_logits(logits, expected)
        seen = []
        for place, (row, count) in enumerate(zip(self.rows, lengths, strict=True)):
            start = self.done[place]
            self.done[place] = start + int(count)
            if last_only:
                seen.append(Seen(row.number, self.done[place] - 1, logits[place]))
            else:
                seen.append(Seen(row.number, start, logits[place, :count]))
        return seen

    def finish(self) -> Iterator[Seen]:
        """Read what is left, a token a row and call, rows that end early leaving the batch."""
        while True:
            keep = [place for place, row in enumerate(self.rows) if self.done[place] < len(row.ids)]
            if not keep:
                return
            if len(keep) < len(self.rows):
                self.select(keep)
            yield from self.read([1] * len(self.rows))

    def select(self, places: Sequence[int]) -> None:
        """Keep, reorder or repeat rows."""
        self.state = self.engine.select(self.state, np.array(places, dtype=np.int64))
        self.rows = [self.rows[place] for place in places]
        self.done = [self.done[place] for place in places]

    def join(self, other: Self) -> None:
        """Put the rows of another feed behind these."""
        self.state = self.engine.join([self.state, other.state])
        self.rows += other.rows
        self.done += other.done


def check_logits(logits: FloatArray, expected: tuple[int, ...]) -> None:
    """Refuse logits of a shape that the contract does not allow.

    Raises:
        EngineError: The shape differs.
    """
    if logits.shape != expected:
        raise EngineError(
            f"logits of shape {logits.shape} came back where the contract asks for {expected} "
            "(batch, sequence, vocab_size); see lmopt.contracts.Engine.forward."
        )


def prefill(engine: Engine, rows: Sequence[Row]) -> Iterator[Seen]:
    """Each prompt alone in one call; its lengths were not seen at export."""
    for row in rows:
        yield from Feed(engine, [row]).read([row.prompt])


def decode(engine: Engine, rows: Sequence[Row]) -> Iterator[Seen]:
    """A prompt, then one token at a time from the cache."""
    shorter, longest = rows[0], rows[-1]
    for row, start in ((shorter, max(1, shorter.prompt // 6)), (longest, longest.prompt)):
        feed = Feed(engine, [row])
        yield from feed.read([start], last_only=True)
        yield from feed.finish()


def several(engine: Engine, rows: Sequence[Row]) -> Iterator[Seen]:
    """Several tokens at once from the cache, in uneven pieces."""
    for row in rows:
        feed = Feed(engine, [row])
        turn = 0
        while feed.done[0] < len(row.ids):
            piece = min(_PIECES[turn % len(_PIECES)], len(row.ids) - feed.done[0])
            yield from feed.read([piece])
            turn += 1


def _batch(engine: Engine, rows: Sequence[Row], side: PaddingSide) -> Iterator[Seen]:
    feed = Feed(engine, rows, side=side)
    yield from feed.read(row.prompt for row in rows)
    yield from feed.read(row.chunk for row in rows)
    yield from feed.finish()


def batch_right(engine: Engine, rows: Sequence[Row]) -> Iterator[Seen]:
    """Rows of unequal length in one batch, padded on the right: prompts, uneven pieces, single tokens."""
    return _batch(engine, rows, "right")


def batch_left(engine: Engine, rows: Sequence[Row]) -> Iterator[Seen]:
    """The same, padded on the left."""
    return _batch(engine, rows, "left")


def select_join(engine: Engine, rows: Sequence[Row]) -> Iterator[Seen]:
    """Rows are reordered, repeated, dropped, and put into one batch with others."""
    capacity = max(len(row.ids) for row in rows)
    feed = Feed(engine, rows, side="left", capacity=capacity)
    yield from feed.read([row.prompt for row in rows], last_only=True)
    last = len(rows) - 1
    feed.select([last, 0, 0])
    yield from feed.read([row.chunk for row in feed.rows])
    other = Feed(engine, rows[1:] or rows, side="left", capacity=capacity)
    yield from other.read([row.prompt for row in other.rows], last_only=True)
    feed.join(other)
    yield from feed.finish()


def sources(engine: Engine, rows: Sequence[Row]) -> Iterator[Seen]:
    """Rows in step with each other after sources of unequal length, reordered and repeated as beams are."""
    steps = min(_SINGLES, *(len(row.ids) for row in rows))
    feed = Feed(engine, rows)
    yield from feed.read([1] * len(rows), last_only=True)
    last = len(rows) - 1
    feed.select([last, *range(last), 0, last])
    for _ in range(1, steps):
        yield from feed.read([1] * len(feed.rows))


def encoded(engine: Engine, rows: Sequence[Row]) -> Iterator[tuple[int, Mapping[str, AnyArray]]]:
    """What the engine holds of each row's source: read alone, then in one batch with the others.

    Yields:
        Numbers of rows, and arrays by name, `(...)` without the batch's axis, cut to the row's own source.
    """
    assert isinstance(engine, SupportsEncoder)
    groups = [[row] for row in rows]
    lengths = {row.source.shape[-1] for row in rows if row.source is not None}
    if engine.ragged_sources or len(lengths) == 1:
        groups.append(list(rows))
    for group in groups:
        shown = engine.encoded(engine.encode(*pack([row.source for row in group if row.source is not None])))
        for place, row in enumerate(group):
            yield row.number, {name: array[place] for name, array in shown.items()}


def _all(rows: Sequence[Row], vocab_size: int) -> list[Row]:
    return list(rows)


def _last_two(rows: Sequence[Row], vocab_size: int) -> list[Row]:
    return list(rows[-2:])


def _affordable(rows: Sequence[Row], vocab_size: int) -> list[Row]:
    """Leave out the longest rows while a batch's padded logits would take more memory than it is worth."""
    kept = sorted(rows, key=lambda row: row.prompt)
    while len(kept) > 2 and len(kept) * kept[-1].prompt * vocab_size * 4 > _BATCH_LOGIT_BYTES:
        kept.pop()
    return kept


def _shortest_four(rows: Sequence[Row], vocab_size: int) -> list[Row]:
    return sorted(rows, key=lambda row: row.prompt)[:4]


class Case(NamedTuple):
    """A way of running a model.

    Attributes:
        choose: Gives the rows that are run, of all rows and for the size of the vocabulary.
        run: Feeds these rows to an engine.
    """

    choose: Callable[[Sequence[Row], int], list[Row]]
    run: Callable[[Engine, Sequence[Row]], Iterator[Seen]]


CASES: Final[Mapping[str, Case]] = MappingProxyType(
    {
        "prefill": Case(_all, prefill),
        "decode": Case(_last_two, decode),
        "several": Case(_last_two, several),
        "batch-right": Case(_affordable, batch_right),
        "batch-left": Case(_affordable, batch_left),
        "select/join": Case(_shortest_four, select_join),
    }
)
_WITH_SOURCES: Final[Mapping[str, Case]] = MappingProxyType(
    {**CASES, "sources": Case(_shortest_four, sources)}
)


def cases_for(facts: ModelFacts) -> Mapping[str, Case]:
    """Give the cases of a model: `CASES`, and one more where an encoder reads sources."""
    return CASES if facts.source is None else _WITH_SOURCES


def greedy(engine: Engine, rows: Sequence[Row], new_tokens: int) -> tuple[list[IntArray], list[Seen]]:
    """Let the engine continue a batch of prompts by its own most likely tokens.

    Args:
        engine: Engine that takes rows of unequal lengths.
        rows: Rows; at most 24 tokens of each prompt are used.
        new_tokens: Tokens to generate a row, fewer where the context ends.

    Returns:
        The ids that the engine read, a row each, and the logits from the end of each prompt on.
    """
    context = engine.facts.context_length
    prompts = [row.ids[: min(row.prompt, 24)] for row in rows]
    longest = max(map(len, prompts))
    steps = new_tokens if context is None else max(1, min(new_tokens, context - longest))
    lengths = np.array([len(ids) for ids in prompts], dtype=np.int64)
    ids = np.stack([np.resize(prompt, longest) for prompt in prompts])
    state = begin(engine, [row.source for row in rows], capacity=longest + steps)
    read = [prompt.tolist() for prompt in prompts]
    # One array from the start: logits put together at the end would be in memory twice.
    said = np.empty((len(rows), steps, engine.facts.vocab_size), np.float32)
    for step in range(steps):
        logits, state = engine.forward(ids, lengths, state, last_only=True)
        check_logits(logits, (len(rows), 1, engine.facts.vocab_size))
        said[:, step] = logits[:, 0]
        ids, lengths = logits.argmax(axis=-1), np.ones(len(rows), dtype=np.int64)
        if step < steps - 1:
            for place, token in enumerate(ids[:, 0].tolist()):
                read[place].append(token)
    return (
        [np.array(row, dtype=np.int64) for row in read],
        [Seen(place, len(prompts[place]) - 1, said[place]) for place in range(len(rows))],
    )
