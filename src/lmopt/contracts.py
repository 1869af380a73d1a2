"""The Protocols that a plug-in author implements. This is the only page they must read.

An **engine** is one loaded model on one device. It computes logits and remembers what each row has
read so far in a **state** that only it understands: a key-value cache, an LSTM's `(h, c)`, a
buffer on a GPU. Everything else (sampling, beams, stop strings, streaming, scoring, parity) lives
once in lmopt, on top of the five methods below, so that every engine gets all of it.

Rules that the conformance kit (`lmopt.testing`) proves:

1. Only NumPy arrays, numbers, strings and paths cross this boundary.
2. `forward` **consumes** the state it is given: the caller must not use that object again. An
   engine may thus update buffers in place. `select` and `join` also consume their arguments.
3. A row's result does not depend on its neighbours, on padding, or on how its tokens were split
   over calls (up to rounding).
4. Arrays that an engine returns belong to the caller: a later call must not change them.
5. `forward` may be called from several threads at once, with different states.
6. What cannot be honoured raises a `lmopt.errors` error; nothing is quietly replaced.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# Before Python 3.12 `isinstance` of the standard library's takes 30 times as long, and each call of an engine asks it.
from typing_extensions import Protocol, runtime_checkable

from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts

PaddingSide = Literal["left", "right"]


class State(Protocol):
    """What an engine remembers of a batch of rows."""

    @property
    def lengths(self) -> IntArray:
        """`(batch,)` int64, tokens that each row has read so far."""
        ...


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What was asked of an engine and what it really does.

    Attributes:
        backend: Name of the backend.
        device: Device that computes, as found out after loading.
        dtype: Compute type of the weights and activations.
        threads: Threads inside one operator; 0 where the notion does not apply.
        versions: Distribution name to version of what the engine stands on.
        details: Anything else worth showing: execution providers, node placement, cache kind.
    """

    backend: str
    device: str
    dtype: str
    threads: int
    versions: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Engine(Protocol):
    """One loaded model on one device."""

    @property
    def facts(self) -> ModelFacts:
        """Vocabulary size, context length and the like."""
        ...

    @property
    def ragged(self) -> bool:
        """Whether `forward` takes rows of unequal `lengths` in one call.

        Where it is `False` (a recurrent model without a mask, say), lmopt groups rows by length
        and calls `forward` once a group; `join` is then only called on rows of equal length, or
        for models whose state does not grow.
        """
        ...

    def begin(self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right") -> State:
        """Make the empty state of `batch` rows.

        Args:
            batch: Number of rows, at least 1.
            capacity: Most tokens that a row will ever hold, for engines that allocate ahead.
            padding_side: Where the engine lays the padding of unequal rows. Results must not
                depend on it; an engine without padding ignores it.
        """
        ...

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: State, *, last_only: bool = False
    ) -> tuple[FloatArray, State]:
        """Read new tokens and return the logits after each of them.

        Args:
            input_ids: `(batch, sequence)` int64. Row `b` holds `lengths[b]` new tokens from its
                start; what follows is padding and has no effect.
            lengths: `(batch,)` int64, `1 .. sequence` each; all equal where `ragged` is `False`.
            state: From `begin`, `forward`, `select` or `join`; consumed.
            last_only: Return only the logits after each row's last new token.

        Returns:
            Logits, float32, `(batch, sequence, vocab_size)` aligned with `input_ids` (undefined at
            padding), or `(batch, 1, vocab_size)` with `last_only`; and the state that follows.
        """
        ...

    def select(self, state: State, rows: IntArray) -> State:
        """Keep, drop, reorder or repeat rows.

        Args:
            state: Consumed.
            rows: `(new_batch,)` int64 row numbers of `state`, repeats allowed.
        """
        ...

    def join(self, states: Sequence[State]) -> State:
        """Put the rows of several states, in order, into one batch; all are consumed."""
        ...

    def report(self) -> EngineReport:
        """Say what the engine really does."""
        ...

    def close(self) -> None:
        """Release memory; calling it twice is harmless."""
        ...


@runtime_checkable
class SupportsEncoder(Protocol):
    """An engine that can run encoder-decoder models: those whose `facts.source` is not `None`.

    An encoder-decoder is a decoder whose state does not begin empty. `encode` takes the place of `begin`, and
    everything after it is as for any other model: each row carries what the encoder made of its source, through
    `forward`, `select` and `join`. What depends on the source alone, such as the keys and values of
    cross-attention, is computed here, once, and never again.
    """

    @property
    def ragged_sources(self) -> bool:
        """Whether rows with sources of unequal length may share a state.

        Where it is `False`, all rows of one `encode`, and of states that are joined, have sources of equal length.
        """
        ...

    def encode(
        self,
        inputs: AnyArray,
        lengths: IntArray,
        *,
        capacity: int | None = None,
        padding_side: PaddingSide = "right",
    ) -> State:
        """Read the sources of some rows, and make the state from which their decoders begin.

        Args:
            inputs: `(batch, source)` int64 ids, or `(batch, size, source)` float32 features, as `facts.source`
                says. Row `b` has `lengths[b]` positions from its start; what follows is padding and has no effect.
            lengths: `(batch,)` int64, `1 .. source` each.
            capacity: Most tokens that the decoder will hold of a row, as for `begin`.
            padding_side: As for `begin`; it concerns the decoder's tokens.

        Returns:
            A state whose `lengths` are 0: the decoder has read nothing yet.
        """
        ...

    def encoded(self, state: State) -> Mapping[str, AnyArray]:
        """Show what rows hold of their sources, by the names of the exported graphs, for comparing engines.

        Args:
            state: Stays valid and unchanged.
        """
        ...


@runtime_checkable
class SupportsTaps(Protocol):
    """An engine that can show values inside the model, for finding where two engines part."""

    def tap_names(self) -> Sequence[str]:
        """Names of the values that can be shown, in the order in which they are computed."""
        ...

    def taps(
        self, input_ids: IntArray, names: Sequence[str], source: AnyArray | None = None
    ) -> Mapping[str, AnyArray]:
        """Run ids from an empty state and return the named values.

        Args:
            input_ids: `(1, sequence)` int64.
            names: Of `tap_names()`.
            source: What the encoder of an encoder-decoder reads before them, `(1, source)` ids or
                `(1, size, source)` features; given only to engines that run such models.
        """
        ...


@runtime_checkable
class SupportsRewind(Protocol):
    """An engine whose rows can forget their last tokens and be copied.

    A key-value cache can; a recurrent state, which has no memory of how it came to be, cannot.
    Prompt lookup (drafts that are rejected) and prefix reuse (a beginning that several prompts share)
    stand on it.
    """

    @property
    def rewinds(self) -> bool:
        """Whether the loaded model's state can: a backend may run models of both kinds."""
        ...

    def rewind(self, state: State, lengths: IntArray) -> State:
        """Let each row forget all but its first tokens.

        Args:
            state: Consumed.
            lengths: `(batch,)` int64 tokens to keep of each row, `0 .. state.lengths`.
        """
        ...

    def copy(self, state: State, *, capacity: int | None = None) -> State:
        """Make an independent copy; `state` is *not* consumed.

        Args:
            state: Stays valid and unchanged.
            capacity: As for `begin`; `None` keeps that of `state`.
        """
        ...


@runtime_checkable
class SupportsBest(Protocol):
    """An engine that finds a row's largest logits by itself and hands out only those.

    The likeliest token is one logit of a vocabulary, and `top_k` sampling needs `k` of them: a device need not
    bring the rest to the host. Everything that needs more calls `forward`.
    """

    @property
    def most_best(self) -> int:
        """Most logits of a row that it can be asked for; 0 where the loaded model gives none."""
        ...

    def forward_best(
        self, input_ids: IntArray, state: State, count: int
    ) -> tuple[Sequence[FloatArray], Sequence[IntArray | None], State]:
        """Read one new token a row and return the largest logits after it.

        Args:
            input_ids: `(batch, 1)` int64.
            state: Consumed.
            count: How many are wanted of each row, `1 .. most_best`.

        Returns:
            For each row, logits as `forward` gives them, float32, and their ids, ascending: at least all that are
            not below the `count`-th largest. Those left out are below it by more than a division of all by one
            number could round away (2**-22 of it). Where less than the whole line would not do, because of
            ties or NaN, it is the whole line, and its ids are `None`. And the state that follows.
        """
        ...


class ArtifactView(Protocol):
    """The part of `lmopt.artifact.Artifact` that an engine needs."""

    @property
    def path(self) -> Path:
        """Folder of the artefact."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Parsed `lmopt.json`."""
        ...

    def file(self, name: str) -> Path:
        """Path of a file of the artefact, verified against its hash and contained in the folder."""
        ...


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a runtime asks a backend to open.

    Attributes:
        artifact: Verified artefact, for backends that read files; else `None`.
        module: Live `torch.nn.Module`, for backends that declare the format `"module"`.
        facts: Facts of the model.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        dtype: Compute type or `"auto"`: the artefact's own.
        threads: Threads inside one operator; `None` leaves the choice to the engine, which should
            follow the process's CPU quota.
        options: Options of the backend by name. An unknown one must raise
            `UnsupportedOptionError`.
    """

    facts: ModelFacts
    artifact: ArtifactView | None = None
    module: Any | None = None
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class EngineFactory(Protocol):
    """What `BackendSpec.engine` names."""

    def __call__(self, request: EngineRequest) -> Engine:
        """Open an engine, or raise a `lmopt.errors` error that says why not."""
        ...


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What `lmopt.Exporter` asks an exporter plug-in to write.

    Attributes:
        module: Live `torch.nn.Module` in evaluation mode.
        folder: Empty staging folder; the exporter writes its files here and nowhere else.
        facts: Facts of the model.
        target: Dialect, one of `ExporterSpec.targets`.
        options: Options of the exporter by name. An unknown one must raise
            `UnsupportedOptionError`.
        config: The model's `config.json` as a dictionary, empty for custom modules.
        rows: Some short texts as `(tokens,)` int64 ids, for formats that need to see the model read; empty for a
            model without a tokenizer.
    """

    module: Any
    folder: Path
    facts: ModelFacts
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[IntArray] = ()


class ExportFunction(Protocol):
    """What `ExporterSpec.export` names."""

    def __call__(self, request: ExportRequest) -> Mapping[str, Any]:
        """Write the model; return what the manifest should record about the format."""
        ...
