"""Run a model on any engine by one set of methods."""

import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias, overload

import numpy as np

from lmopt.artifact import Artifact
from lmopt.contracts import Engine, EngineReport
from lmopt.errors import ClosedError, ContextLengthError, DtypeError, InputError, ShapeError, TokenizerError
from lmopt.evaluation import Perplexity, perplexity
from lmopt.generation import Generation, GenerationConfig, Token, generate, score, stream
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.generation.rows import Cancel, check_ids
from lmopt.model import Model
from lmopt.opening import open_source
from lmopt.tokenizer import Tokenizer
from lmopt.types import FloatArray, IntArray, ModelFacts

Prompt: TypeAlias = str | Sequence[int] | IntArray
Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RuntimeReport:
    """What was asked of a runtime and what it does.

    Attributes:
        requested: `backend`, `device`, `dtype`, `threads` and options as the caller gave them.
        actual: What the engine found out after loading.
        source: Name of the model or folder.
        facts: Facts of the model.
    """

    requested: Mapping[str, Any]
    actual: EngineReport
    source: str
    facts: ModelFacts


class Runtime:
    """A model, loaded in an engine and ready to predict.

    Methods may be called from several threads at once. Use it as a context manager, or call
    `close`, to release the engine's memory.

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
        **options: Options of the backend.

    Raises:
        UnknownPluginError: No backend has this name.
        NotInstalledError: The backend's modules are missing; the message has the pip line.
        UnsupportedError: The backend cannot run this source, device or dtype.
        DeviceError: The device is not there.
        ParityError: The export that the backend needs failed its gate.

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
        **options: Any,
    ) -> None:
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
        self._engine: Engine | None = opened.engine
        self.backend = opened.backend
        self.facts = opened.facts
        self.tokenizer = tokenizer or opened.tokenizer
        self._defaults = opened.generation_config
        self._source = opened.name
        self._requested = {
            "backend": backend, "device": device, "dtype": dtype, "threads": threads, **options,
        }  # fmt: skip
        self._closing = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine itself, for measuring and comparing.

        Raises:
            ClosedError: The runtime is closed.
        """
        if self._engine is None:
            raise ClosedError(f"this runtime of {self._source} is closed; open a new lmopt.Runtime")
        return self._engine

    @overload
    def generate(self, prompt: str, config: GenerationConfig | None = None, **options: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[Any] | IntArray, config: GenerationConfig | None = None, **options: Any
    ) -> Any: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        config: GenerationConfig | None = None,
        *,
        cancel: Cancel | None = None,
        on_token: Callable[[Token], object] | None = None,
        **options: Any,
    ) -> Any:
        """Continue one prompt, or many in one batch.

        Args:
            prompt: A text, a row of token ids, or a list of either, of any lengths.
            config: Options as an object; `None` takes the model's `generation_config.json`.
            cancel: Anything with `is_set()`, such as a `threading.Event`; looked at before each
                token.
            on_token: Called with each token as soon as it is chosen.
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
        engine = self.engine
        settings = self._config(config, options)
        prompts, many = _rows(prompt)
        ids = [self._ids(one) for one in prompts]
        found = generate(engine, ids, settings, tokenizer=self.tokenizer, cancel=cancel, on_token=on_token)
        results = found if settings.num_return_sequences > 1 else [one[0] for one in found]
        return results if many else results[0]

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        cancel: Cancel | None = None,
        **options: Any,
    ) -> Generator[str, None, Generation]:
        """Continue one prompt and yield the text while it grows.

        Leaving the loop, or closing the generator, stops generation.

        Args:
            prompt: As for `generate`.
            config: As for `generate`.
            cancel: As for `generate`.
            **options: As for `generate`.

        Raises:
            TokenizerError: The model has no tokenizer.
        """
        engine, settings, ids = self.engine, self._config(config, options), self._ids(prompt)
        return stream(engine, ids, settings, tokenizer=self._need_tokenizer(), cancel=cancel)

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

    def logits(self, ids: Prompt | Sequence[Prompt]) -> FloatArray | list[FloatArray]:
        """Compute the logits after each token.

        Args:
            ids: A text, a row of ids or an int64 array `(sequence,)`; or a list of them.

        Returns:
            `(sequence, vocab_size)` float32 for one row, a list of such arrays for a list.

        Raises:
            ContextLengthError: A row is longer than the model's context.
            ShapeError: A row holds no token.
            TokenIdError: An id is outside the vocabulary.
        """
        engine = for_unequal_rows(self.engine)
        prompts, many = _rows(ids)
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
        found, _ = engine.forward(batch, lengths, engine.begin(len(rows), capacity=int(lengths.max())))
        results = [found[place, : row.size] for place, row in enumerate(rows)]
        return results if many else results[0]

    def score(self, texts: Prompt | Sequence[Prompt]) -> FloatArray | list[FloatArray]:
        """Compute the log-probability of each token of given texts, but the first of each.

        Args:
            texts: A text, a row of ids, or a list of either.

        Returns:
            `(tokens - 1,)` float32 for one text, a list of such arrays for a list.
        """
        engine = self.engine
        prompts, many = _rows(texts)
        found = score(engine, [self._ids(one) for one in prompts])
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
        engine = self.engine
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
        return RuntimeReport(self._requested, self.engine.report(), self._source, self.facts)

    def close(self) -> None:
        """Release the engine; calling it twice is harmless."""
        with self._closing:
            if self._engine is not None:
                self._engine.close()
                self._engine = None

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

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self._source} has no tokenizer: give token ids instead of text, or "
                "lmopt.Runtime(..., tokenizer=lmopt.Tokenizer.from_folder(folder))"
            )
        return self.tokenizer


def _rows(prompt: Any) -> tuple[list[Prompt], bool]:
    """Tell one prompt from many.

    Raises:
        DtypeError: It is neither text nor ids.
        ShapeError: An array has more than two axes.
        InputError: A list mixes ids and prompts.
    """
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, np.ndarray):
        if prompt.dtype.kind not in "iu":
            raise DtypeError(f"ids have dtype {prompt.dtype}; expected whole numbers (int64)")
        if prompt.ndim not in (1, 2):
            raise ShapeError(f"ids have shape {prompt.shape}; expected (sequence,) or (batch, sequence)")
        if prompt.ndim == 2 and not len(prompt):
            raise ShapeError("ids hold no row; expected (batch, sequence), batch at least 1")
        return (list(prompt), True) if prompt.ndim == 2 else ([prompt], False)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise DtypeError(f"a prompt is a text or a row of token ids, not {type(prompt).__name__}")
    if strange := [one for one in prompt if isinstance(one, float | bool | np.floating)]:
        raise DtypeError(f"a prompt holds {strange[0]!r}; expected token ids, which are whole numbers")
    numbers = [isinstance(one, int | np.integer) for one in prompt]
    if all(numbers):
        return [list(prompt)], False
    if any(numbers):
        raise InputError("a list of prompts holds texts or rows of ids, not single ids among them")
    return list(prompt), True
