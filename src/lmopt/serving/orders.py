"""From the body of a request to what is to be done."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lmopt.errors import LmoptError
from lmopt.generation.config import GenerationConfig
from lmopt.generation.processors import Processor
from lmopt.generation.rows import Row
from lmopt.serving.body import Body, refuse
from lmopt.serving.conversation import read_messages
from lmopt.serving.limits import ServeLimits
from lmopt.serving.penalties import penalties
from lmopt.serving.refusals import RefusedError, refusal

if TYPE_CHECKING:
    from lmopt.runtime import Runtime
    from lmopt.tokenizer import Tokenizer

COMPLETION_TOKENS: Final = 16
"""New tokens of a completion that does not say how many: OpenAI's default."""

_MOST_STOPS: Final = 16
_MOST_TOP: Final = 20
_MOST_SEED: Final = 2**63 - 1
# What a request means that says nothing, as far as the model's own generation_config.json says nothing either.
_DEFAULTS: Final = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a request asks for.

    Attributes:
        prompts: Ids of each prompt.
        texts: Text of each prompt, for `echo`.
        n: Choices of each prompt.
        config: Options of its rows; with `n` above 1 and sampling, of `n` sequences a prompt.
        processors: What changes its scores beyond the options.
        new_tokens: Whether anything is to be generated at all.
        logprobs: Whether log-probabilities go into the answer.
        top: How many of the likeliest tokens go with them.
        echo: Whether the prompt is repeated in front of the answer.
        stream: Whether the answer comes in pieces.
        include_usage: Whether a stream ends with the counts of tokens.
    """

    prompts: list[list[int]]
    texts: list[str] = field(default_factory=list)
    n: int
    config: GenerationConfig
    processors: tuple[Processor, ...]
    new_tokens: bool = True
    logprobs: bool
    top: int
    echo: bool = False
    stream: bool
    include_usage: bool

    @property
    def rows(self) -> int:
        """Rows that it takes."""
        return len(self.prompts) * self.n

    def make_rows(self, runtime: "Runtime") -> list[Row]:
        """Make its rows, those of a prompt next to each other.

        Raises:
            InputError: A prompt is too long, empty, or not of this vocabulary.
        """
        # Without sampling the sequences of a prompt are equal, and each is a prompt of its own.
        copies = 1 if self.config.num_return_sequences > 1 else self.n
        rows = runtime.rows([ids for ids in self.prompts for _ in range(copies)], self.config)
        for row in rows:
            row.processors = (*row.processors, *self.processors)
        return rows


def read_completion(body: Body, runtime: "Runtime", limits: ServeLimits) -> Order:
    """Read the body of `POST /v1/completions`, without its `model`.

    Raises:
        RefusedError: A field is missing, unknown, or cannot be honoured; it is named.
    """
    tokenizer = _tokenizer(runtime)
    n, sampling = _sampling(body)
    echo = body.flag("echo")
    most = body.integer("max_tokens", 0 if echo else 1, limits.max_tokens)
    top = body.integer("logprobs", 0, _MOST_TOP)
    body.only("best_of", [n], f"each choice is drawn once; n is {n}")
    body.only("suffix", [""], "models here continue texts, they do not fill gaps")
    prompt = body.any("prompt")
    how = _common(body, runtime.facts.vocab_size)
    stream, include_usage = _stream(body)
    body.finish()
    if prompt is None:
        refuse(
            "prompt", "is missing: give a string, a list of strings, a list of token ids, or a list of those"
        )
    prompts, texts = _prompts(prompt, tokenizer, echo)
    if echo and stream and top is not None:
        # The log-probabilities of a prompt take a pass of their own, after which nothing is left to stream for.
        refuse("stream", "with echo and logprobs is not supported: ask for the answer in one piece")
    new_tokens = COMPLETION_TOKENS if most is None else most
    return Order(
        prompts=prompts,
        texts=texts,
        n=n,
        config=_config(
            runtime,
            sampling,
            new_tokens=max(1, new_tokens),
            n=n,
            logprobs=_logprobs(top is not None, top),
        ),
        processors=how,
        new_tokens=new_tokens > 0,
        logprobs=top is not None,
        top=top or 0,
        echo=echo,
        stream=stream,
        include_usage=include_usage,
    )


def read_chat(body: Body, runtime: "Runtime", limits: ServeLimits) -> Order:
    """Read the body of `POST /v1/chat/completions`, without its `model`.

    Raises:
        RefusedError: A field is missing, unknown, or cannot be honoured; it is named.
    """
    tokenizer = _tokenizer(runtime)
    n, sampling = _sampling(body)
    newer = body.integer("max_completion_tokens", 1, limits.max_tokens)
    older = body.integer("max_tokens", 1, limits.max_tokens)
    logprobs, top = body.flag("logprobs"), body.integer("top_logprobs", 0, _MOST_TOP)
    if top is not None and not logprobs:
        refuse("top_logprobs", "needs logprobs to be true")
    for name in ("tools", "functions"):
        body.only(name, [[]], "the server does not read calls of functions out of an answer")
    body.only("tool_choice", ["none", "auto"], "there are no tools")
    body.only("function_call", ["none", "auto"], "there are no functions")
    body.ignore("parallel_tool_calls")
    body.only("response_format", [{"type": "text"}], "answers are not forced into a form")
    body.only("modalities", [["text"]], "the model writes text")
    for name in ("audio", "prediction", "web_search_options", "moderation"):
        body.only(name, [], "the model reads and writes text, by itself")
    body.only(
        "reasoning_effort", ["none"], "the model's template decides how it thinks: see chat_template_kwargs"
    )
    body.only("verbosity", ["medium"], "ask for it in the messages")
    variables = body.any("chat_template_kwargs")
    messages = body.any("messages")
    how = _common(body, runtime.facts.vocab_size)
    stream, include_usage = _stream(body)
    body.finish()
    ids = read_messages(messages, variables, tokenizer)
    most = newer if newer is not None else older
    if most is None:
        context = runtime.facts.context_length
        most = min(limits.max_tokens, limits.max_tokens if context is None else max(1, context - len(ids)))
    return Order(
        prompts=[ids],
        n=n,
        config=_config(runtime, sampling, new_tokens=most, n=n, logprobs=_logprobs(logprobs, top)),
        processors=how,
        logprobs=logprobs,
        top=top or 0,
        stream=stream,
        include_usage=include_usage,
    )


def _tokenizer(runtime: "Runtime") -> "Tokenizer":
    assert runtime.tokenizer is not None  # seen to when the server was made
    return runtime.tokenizer


def _sampling(body: Body) -> tuple[int, dict[str, Any]]:
    """Read `n` and what decides how tokens are drawn, as fields of `GenerationConfig`."""
    found: dict[str, Any] = {
        "temperature": body.number("temperature", 0, 2),
        "top_p": body.number("top_p", 0, 1),
        "top_k": body.integer("top_k", 0),
        "min_p": body.number("min_p", 0, 1),
        "repetition_penalty": body.number("repetition_penalty", 1e-3, 100),
        "seed": body.integer("seed", -_MOST_SEED - 1, _MOST_SEED),
        "stop_strings": body.texts("stop", _MOST_STOPS) or None,
    }
    found = {name: value for name, value in found.items() if value is not None}
    found["do_sample"] = found.get("temperature") != 0
    if not found["do_sample"]:
        del found["temperature"]
    if "seed" in found:
        found["seed"] %= 2**64
    if body.flag("ignore_eos"):
        found["eos_token_id"] = None
    return body.integer("n", 1) or 1, found


def _common(body: Body, vocab_size: int) -> tuple[Processor, ...]:
    """Read penalties and biases, and take the fields that mean nothing here."""
    frequency = body.number("frequency_penalty", -2, 2) or 0.0
    presence = body.number("presence_penalty", -2, 2) or 0.0
    bias = body.any("logit_bias") or {}
    if not isinstance(bias, dict):
        refuse("logit_bias", "must be an object of token ids and numbers")
    numbers: dict[int, float] = {}
    for name, value in bias.items():
        known = name.isdecimal() and len(name) < 10 and int(name) < vocab_size
        if not known or not _is_number(value) or not -100 <= value <= 100:
            refuse(
                "logit_bias",
                f"holds {name[:20]!r}: expected token ids below {vocab_size}, and numbers from -100 to 100",
            )
        numbers[int(name)] = float(value)
    body.ignore("user", "metadata", "safety_identifier", "prompt_cache_key")
    body.only("store", [False], "nothing is stored")
    body.only("service_tier", ["auto", "default"], "there is one")
    return penalties(frequency, presence, numbers)


def _stream(body: Body) -> tuple[bool, bool]:
    stream, options = body.flag("stream"), body.any("stream_options")
    if options is None:
        return stream, False
    if not stream:
        refuse("stream_options", "needs stream to be true")
    if not isinstance(options, dict):
        refuse("stream_options", "must be an object")
    inside = Body(options)
    include_usage = inside.flag("include_usage")
    inside.only("include_obfuscation", [False], "pieces are as long as their text")
    try:
        inside.finish()
    except RefusedError as error:
        raise RefusedError(str(error), code=error.code, param=f"stream_options.{error.param}") from None
    return stream, include_usage


def _prompts(prompt: Any, tokenizer: "Tokenizer", echo: bool) -> tuple[list[list[int]], list[str]]:
    """Read one prompt or several, as texts or ids."""
    flat = isinstance(prompt, str) or (
        isinstance(prompt, list) and all(_is_id(one) for one in prompt) and prompt
    )
    several = [prompt] if flat else prompt
    if not isinstance(several, list) or not several:
        refuse("prompt", "must be a string, a list of strings, a list of token ids, or a list of those")
    ids: list[list[int]] = []
    texts: list[str] = []
    for number, one in enumerate(several):
        where = "prompt" if flat else f"prompt[{number}]"
        if isinstance(one, str):
            try:
                ids.append(tokenizer.encode(one))
            except LmoptError as error:
                raise refusal(error, where) from error
            texts.append(one)
        elif isinstance(one, list) and all(_is_id(token) for token in one):
            ids.append(one)
            texts.append(tokenizer.decode(one, skip_special_tokens=False) if echo else "")
        else:
            refuse(where, "must be a string or a list of token ids")
    return ids, texts


def _config(
    runtime: "Runtime", sampling: dict[str, Any], *, new_tokens: int, n: int, logprobs: bool | int
) -> GenerationConfig:
    together = n > 1 and sampling["do_sample"]
    fixed = {
        "max_new_tokens": new_tokens,
        "num_return_sequences": n if together else 1,
        "num_beams": 1,
        "logprobs": logprobs,
    }
    try:
        return GenerationConfig.from_options(
            {**_DEFAULTS, **runtime.generation_defaults}, **{**sampling, **fixed}
        )
    except LmoptError as error:
        raise refusal(error) from error


def _logprobs(wanted: bool, top: int | None) -> bool | int:
    return (top or True) if wanted else False


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
