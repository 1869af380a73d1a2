"""Run a model on any engine by one set of methods."""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias, overload

import numpy as np

from lmopt.applications import Applications
from lmopt.artifact import Artifact
from lmopt.contracts import Engine, EngineReport
from lmopt.errors import (
    ContextLengthError,
    InputError,
    ShapeError,
    TokenizerError,
    UnsupportedOptionError,
)
from lmopt.evaluation import Perplexity, perplexity
from lmopt.generation import Generation, GenerationConfig, Token, generate, score, stream
from lmopt.generation.batching import Arrivals, steps
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.generation.fusion import Fusion
from lmopt.generation.guarded import GuardedEngine
from lmopt.generation.interruption import Cancels, Interruption
from lmopt.generation.prefixes import PrefixReport, PrefixStore
from lmopt.generation.prompts import Prompt, as_prompts, check_ids, decoder_prompts
from lmopt.generation.rows import Cancel, Row, prepare
from lmopt.generation.sources import begin, check_source
from lmopt.generation.streamers import Streamer, told
from lmopt.generation.workspace import Limits, Workspace
from lmopt.model import Model
from lmopt.opening import open_source
from lmopt.tokenizer import Tokenizer
from lmopt.types import FloatArray, IntArray, ModelFacts

Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RuntimeReport:
    """What was asked of a runtime and what it does.

    Attributes:
        requested: `backend`, `device`, `dtype`, `threads` and options as the caller gave them.
        actual: What the engine found out after loading.
        source: Name of the model or folder.
        facts: Facts of the model.
        limits: How much a request does at once.
        prefixes: What the kept prefixes hold and were good for.
    """

    requested: Mapping[str, Any]
    actual: EngineReport
    source: str
    facts: ModelFacts
    limits: Limits
    prefixes: PrefixReport


class Runtime(Applications):
    """A model, loaded in an engine and ready to predict.

    Methods may be called from several threads at once, each with its own rows: requests of different
    threads do not share a batch, unless they are handed to one `run`, as `lmopt.serving` does. Use it
    as a context manager, or call `close`, to release the engine's memory; what is running in other
    threads then ends with `ClosedError`.

    Args:
        source: A folder, file or hub id that `Model.from_pretrained` takes, an artefact (folder or
            `Artifact`), or a `Model`. An engine that needs an exported artefact gets one: it is
            exported and verified once, and kept in lmopt's cache.
        backend: Name of the engine: `"torch"`, `"onnxruntime"`, or a plug-in's. `None` takes
            `"torch"` for a model, and for an artefact the backend that verified it.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`. What is not there is an error, never a fallback.
        dtype: Compute type, or `"auto"`: the model's own.
        threads: Threads inside one operator; `None` follows the process's CPU quota.
        tokenizer: In place of the model's own.
        trust: Whether code and pickles that come with `source` may run.
        progress: Called with the stage's name, steps done and their total, where an export is needed.
        max_num_seqs: Most rows of a request that are decoded at once; further prompts enter as rows
            leave. This and the next two are `lmopt.generation.Limits`.
        max_num_batched_tokens: Most prompt tokens read between two tokens of the running rows; longer
            prompts are read in parts.
        max_cache_tokens: Most tokens for which room in the cache is reserved at once.
        prefix_cache_tokens: Most tokens whose states are kept after a request, so that a prompt that
            begins like an earlier one (a growing chat, a system prompt that many share) is read from
            where it differs. 0, the default, keeps nothing: then a request makes the same calls,
            with the same rounding, whatever came before it. For engines whose state can be rewound.
        **options: Options of the backend.

    Raises:
        UnknownPluginError: No backend has this name.
        NotInstalledError: The backend's modules are missing; the message has the pip line.
        UnsupportedError: The backend cannot run this source, device or dtype.
        DeviceError: The device is not there.
        ParityError: The export that the backend needs failed its gate.
        UnsupportedOptionError: A limit is not possible, or prefixes are to be kept by an engine that cannot.

    Example:
        >>> with Runtime("out/", backend="onnxruntime") as rt:  # doctest: +SKIP
        ...     print(rt.generate("The capital of France is", max_new_tokens=8))
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Model | Artifact,
        *,
        backend: str | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        tokenizer: Tokenizer | None = None,
        trust: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
        max_num_seqs: int = Limits.max_num_seqs,
        max_num_batched_tokens: int = Limits.max_num_batched_tokens,
        max_cache_tokens: int = Limits.max_cache_tokens,
        prefix_cache_tokens: int = 0,
        **options: Any,
    ) -> None:
        limits = Limits(max_num_seqs, max_num_batched_tokens, max_cache_tokens)
        prefixes = PrefixStore(prefix_cache_tokens)
        opened = open_source(
            source,
            backend=backend,
            device=device,
            dtype=dtype,
            threads=threads,
            trust=trust,
            options=options,
            progress=progress,
        )
        self._engine = GuardedEngine(opened.engine, opened.name)
        self._workspace = Workspace(limits, prefixes)
        if prefix_cache_tokens and not prefixes.serves(self._engine):
            self.close()
            raise UnsupportedOptionError(
                f"prefix_cache_tokens={prefix_cache_tokens}: backend {opened.backend!r} cannot rewind the "
                f"state of this model ({opened.name}), so nothing can be kept. Leave it out."
            )
        self.backend = opened.backend
        self.facts = opened.facts
        self.tokenizer = tokenizer or opened.tokenizer
        self._defaults = opened.generation_config
        self._source = opened.name
        self._requested = {
            "backend": backend, "device": device, "dtype": dtype, "threads": threads, **options,
        }  # fmt: skip

    @property
    def engine(self) -> Engine:
        """The engine itself, for measuring and comparing.

        Raises:
            ClosedError: The runtime is closed.
        """
        return self._engine.inner

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """What the model's `generation_config.json` says; empty where there is none."""
        return dict(self._defaults or {})

    @overload
    def generate(self, prompt: str, config: GenerationConfig | None = None, **options: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[Any] | IntArray, config: GenerationConfig | None = None, **options: Any
    ) -> Any: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        decoder_input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        cancel: Cancels = None,
        on_token: Callable[[Token], object] | None = None,
        streamer: Streamer | None = None,
        fusion: Fusion | None = None,
        **options: Any,
    ) -> Any:
        """Continue one prompt, or many in one batch.

        Prompts enter the batch as others leave it, within the limits of the runtime. An error of one row
        alone ends that row with the `finish_reason` `"error"` and `Generation.error`; it is raised where
        no row has a result, so always with one prompt. See `lmopt.generation.generate`.

        Args:
            prompt: A text, a row of token ids, or a list of either, of any lengths. For an encoder-decoder, what
                its encoder reads: one of these, or features `(size, positions)` float32, or a list of such.
            decoder_input_ids: For an encoder-decoder: what its decoder has been said to write, such as tokens
                that name a language or a task; one row of ids for all prompts, or a list with one each. `None`
                takes the model's start token.
            config: Options as an object, or a list with one a prompt; `None` takes the model's
                `generation_config.json`.
            cancel: Anything with `is_set()`, such as a `threading.Event`; looked at before each call of
                the engine. A list has one (or `None`) a prompt.
            on_token: Called with each token as soon as it is chosen.
            streamer: transformers' `TextStreamer`, `TextIteratorStreamer`, or what has their `put` and `end`:
                is given the ids of the prompt, then each new token. For one prompt with one sequence.
            fusion: A language model of the same vocabulary that has a say in each token.
            **options: Fields of `GenerationConfig`, by transformers' names; each wins over `config`.

        Returns:
            A `Generation` for one prompt, a list of them for a list of prompts. With
            `num_return_sequences` above 1, each prompt gives a list.

        Raises:
            UnsupportedOptionError: Unknown or unsupported option, or a value out of range.
            ContextLengthError: Prompt and new tokens do not fit into the context.
            EmptyPromptError: Nothing to start from.
            TokenIdError: An id is outside the vocabulary.
            ClosedError: The runtime is closed.
        """
        engine = self._engine.opened()
        settings: GenerationConfig | list[GenerationConfig]
        if config is None or isinstance(config, GenerationConfig):
            settings = self._config(config, options)
            several = settings.num_return_sequences > 1
        else:
            settings = [self._config(one, options) for one in config]
            several = any(one.num_return_sequences > 1 for one in settings)
        prompts, many = as_prompts(prompt, features=self._reads_features)
        rows: list[Any] = [self._ids(one) for one in prompts]
        sources: list[Any] | None = None
        if self.facts.source is not None:
            sources, rows = rows, decoder_prompts(decoder_input_ids, len(rows), self.facts.source)
        elif decoder_input_ids is not None:
            raise UnsupportedOptionError(
                "decoder_input_ids are for encoder-decoder models; this one has no encoder"
            )
        with told(streamer, rows, settings, on_token) as tell:
            found = generate(
                engine,
                rows,
                settings,
                sources=sources,
                tokenizer=self.tokenizer,
                cancel=cancel,
                on_token=tell,
                workspace=self._workspace,
                fusion=fusion,
            )
        results = found if several else [one[0] for one in found]
        return results if many else results[0]

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        decoder_input_ids: Sequence[int] | None = None,
        cancel: Cancel | None = None,
        **options: Any,
    ) -> Generator[str, None, Generation]:
        """Continue one prompt and yield the text while it grows.

        Leaving the loop, or closing the generator, stops generation.

        Args:
            prompt: As for `generate`.
            config: As for `generate`.
            decoder_input_ids: As for `generate`.
            cancel: As for `generate`.
            **options: As for `generate`.

        Raises:
            TokenizerError: The model has no tokenizer.
        """
        engine, settings = self._engine.opened(), self._config(config, options)
        ids: Any = self._ids(prompt)
        source: Any = None
        if self.facts.source is not None:
            source, (ids,) = ids, decoder_prompts(decoder_input_ids, 1, self.facts.source)
        elif decoder_input_ids is not None:
            raise UnsupportedOptionError(
                "decoder_input_ids are for encoder-decoder models; this one has no encoder"
            )
        return stream(
            engine,
            ids,
            settings,
            source=source,
            tokenizer=self._need_tokenizer(),
            cancel=cancel,
            workspace=self._workspace,
        )

    def rows(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[Row]:
        """Check prompts and make rows of them for `run`, `num_return_sequences` a prompt.

        Args:
            prompts: Token ids of each.
            config: Options of all of them.

        Raises:
            InputError: A prompt is malformed, empty or too long.
            UnsupportedOptionError: Beams are asked for, which have a batch of their own.
        """
        if config.num_beams > 1:
            raise UnsupportedOptionError(f"num_beams={config.num_beams}: call generate for beam search.")
        return prepare(self._engine.opened(), prompts, config, self.tokenizer)

    def run(self, arrivals: Arrivals) -> Generator[list[Row]]:
        """Run rows of many requests in one batch, which they enter and leave at any time.

        The way of a server: one thread runs this, others hand it rows. See `lmopt.generation.batching.steps`.

        Args:
            arrivals: Asked before each call of the engine for rows that have come, from `rows`.

        Yields:
            The rows that have just been given a token.

        Raises:
            EngineError: The engine failed, and nothing that was inside can go on.
        """
        return steps(self._engine.opened(), [], self._workspace, Interruption(None, ()), arrivals)

    def chat(
        self, messages: Sequence[Message], config: GenerationConfig | None = None, **options: Any
    ) -> Generation:
        """Answer a conversation by the model's chat template.

        Args:
            messages: `{"role": "user", "content": ...}` and the like, in order.
            config: As for `generate`.
            **options: As for `generate`.

        Raises:
            TemplateError: The model has no chat template, or it fails on these messages.
        """
        return self.generate(self.chat_ids(messages), config, **options)  # type: ignore[no-any-return]

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Turn a conversation into the ids that the model reads before its answer."""
        tokenizer = self._need_tokenizer()
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        # The template writes special tokens itself.
        return tokenizer.encode(text, add_special_tokens=False)

    def logits(self, ids: Prompt | Sequence[Prompt], *, sources: Any = None) -> FloatArray | list[FloatArray]:
        """Compute the logits after each token.

        Args:
            ids: A text, a row of ids or an int64 array `(sequence,)`; or a list of them.
            sources: For an encoder-decoder: what its encoder reads, one for one row, a list for a list.

        Returns:
            `(sequence, vocab_size)` float32 for one row, a list of such arrays for a list.

        Raises:
            ContextLengthError: A row is longer than the model's context.
            ShapeError: A row holds no token.
            TokenIdError: An id is outside the vocabulary.
        """
        engine = for_unequal_rows(self._engine.opened())
        prompts, many = as_prompts(ids)
        rows = [check_ids(self._ids(one), self.facts.vocab_size, f"row {n}") for n, one in enumerate(prompts)]
        if any(row.size == 0 for row in rows):
            raise ShapeError("a row holds no token; logits follow tokens")
        lengths = np.array([row.size for row in rows])
        limit = self.facts.context_length
        if limit is not None and lengths.max() > limit:
            raise ContextLengthError(
                f"a row has {lengths.max()} tokens; the model's context has {limit}. Split it."
            )
        batch = np.zeros((len(rows), lengths.max()), np.int64)
        for line, row in zip(batch, rows, strict=True):
            line[: row.size] = row
        given = self._sources(sources, many, len(rows)) or [None] * len(rows)
        read = [check_source(one, self.facts, f"source {number}") for number, one in enumerate(given)]
        found, _ = engine.forward(batch, lengths, begin(engine, read, capacity=int(lengths.max())))
        results = [found[place, : row.size] for place, row in enumerate(rows)]
        return results if many else results[0]

    def score(
        self, texts: Prompt | Sequence[Prompt], *, sources: Any = None
    ) -> FloatArray | list[FloatArray]:
        """Compute the log-probability of each token of given texts, but the first of each.

        Args:
            texts: A text, a row of ids, or a list of either.
            sources: For an encoder-decoder: what its encoder reads before them, one for one text, a list for a list.

        Returns:
            `(tokens - 1,)` float32 for one text, a list of such arrays for a list.
        """
        engine = self._engine.opened()
        prompts, many = as_prompts(texts)
        given = self._sources(sources, many, len(prompts))
        found = score(engine, [self._ids(one) for one in prompts], sources=given)
        return found if many else found[0]

    def perplexity(
        self,
        text: Prompt,
        *,
        context: int = 512,
        stride: int = 512,
        tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Perplexity:
        """Measure how well the model predicts a text; see `lmopt.evaluation.perplexity`.

        Args:
            text: The whole text, or its ids; no special tokens are added.
            context: Tokens in a window.
            stride: Tokens from one window to the next.
            tokens: Use only so many tokens from the start.
            progress: Called with windows done and their total.
        """
        engine = self._engine.opened()
        ids = (
            self._need_tokenizer().encode(text, add_special_tokens=False)
            if isinstance(text, str)
            else list(text)
        )
        limit = self.facts.context_length or context
        context = min(context, limit)
        return perplexity(
            engine, ids[:tokens], context=context, stride=min(stride, context), progress=progress
        )

    def report(self) -> RuntimeReport:
        """Say what was asked for and what the engine does."""
        return RuntimeReport(
            self._requested,
            self._engine.report(),
            self._source,
            self.facts,
            self._workspace.limits,
            self._workspace.prefixes.report(),
        )

    def close(self) -> None:
        """Release the engine and what was kept; calling it twice is harmless.

        A call that is inside the engine at this moment, in another thread, still finishes; the engine is
        released after it.
        """
        self._workspace.prefixes.clear()
        self._engine.close()

    def __enter__(self) -> Self:
        """Give the runtime itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _config(self, config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
        if config is not None:
            return config.with_options(**options) if options else config
        return GenerationConfig.from_options(self._defaults, **options)

    def _ids(self, prompt: Prompt) -> Sequence[int] | IntArray:
        if isinstance(prompt, str):
            return self._need_tokenizer().encode(prompt)
        return prompt

    @property
    def _reads_features(self) -> bool:
        return self.facts.source is not None and self.facts.source.kind == "features"

    def _sources(self, sources: Any, many: bool, count: int) -> list[Any] | None:
        """Bring the sources of `count` rows into a list; `None` where none are given."""
        if sources is None:
            return None
        found, several = as_prompts(sources, features=self._reads_features)
        if several != many or len(found) != count:
            raise InputError(
                f"{len(found)} sources were given for {count} texts. Give one for one text, a list for a list."
            )
        return [self._ids(one) for one in found]

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self._source} has no tokenizer: give token ids instead of text, or "
                "lmopt.Runtime(..., tokenizer=lmopt.Tokenizer.from_folder(folder))"
            )
        return self.tokenizer
