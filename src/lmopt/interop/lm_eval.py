"""Let EleutherAI's lm-evaluation-harness run its tasks on any lmopt engine.

`LmoptLM` follows the harness's own `HFLM` to the letter (release 0.4.13: what is put in front of an empty
context, how a context is cut that is too long, where a stop string may begin), so that the figures of an
engine compare with those that others have published for the same model.

The harness has no entry points for models: `python -m lmopt.interop.harness` is its own command line with
`--model lmopt` known to it.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from lmopt.errors import (
    ContextLengthError,
    InputError,
    NotInstalledError,
    TemplateError,
    TokenizerError,
    UnsupportedOptionError,
)
from lmopt.evaluation.continuations import ContinuationScore, score_continuations
from lmopt.generation import Token
from lmopt.generation.stopping import StopStrings
from lmopt.registry import pip_line
from lmopt.runtime import Runtime
from lmopt.tokenizer import Tokenizer

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as _error:
    _extra = pip_line('"lmopt[eval]"')
    raise NotInstalledError(f"lm-evaluation-harness is not installed in this Python: {_extra}") from _error

_logger = logging.getLogger(__name__)

Tell = Callable[[str, int, int], None]
_Pair = tuple[Any, list[int], list[int]]

# What the harness takes for models that state no length.
_DEFAULT_LENGTH: Final = 2048
_HARNESS_DEVICE: Final = "cuda:0"
_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "


@register_model("lmopt")
class LmoptLM(TemplateLM):  # type: ignore[misc]
    """A language model of the harness that runs on an lmopt engine.

    Args:
        path: What `lmopt.Runtime` opens: a folder, hub id, GGUF file or artefact. Leave it out with `runtime`.
        runtime: An open runtime in place of `path` and the engine's options; it stays the caller's to close.
        pretrained: The same as `path`, by the name that the harness's own models use.
        backend: Engine, as for `lmopt.Runtime`; so are `device`, `dtype`, `threads` and `trust`.
        device: As for `lmopt.Runtime`.
        dtype: As for `lmopt.Runtime`.
        threads: As for `lmopt.Runtime`.
        trust: As for `lmopt.Runtime`.
        batch_size: Most rows in one call of the engine; `"auto"` takes 8. It changes speed, and nothing else.
        max_batch_size: Taken for the harness's sake, and not needed.
        max_length: Most tokens of context; default: the model's own, and 2048 where it has no limit.
        max_gen_toks: Most new tokens where a task does not say.
        add_bos_token: Whether texts begin with the special tokens that the tokenizer puts around a text;
            default: as the tokenizer does by itself.
        prefix_token_id: Stands before a text without a context; default: BOS, or else EOS.
        progress: Called with the kind of request, the requests done and their total.
        **options: Options of the runtime and of the backend.

    Raises:
        InputError: Both `path` and `runtime`, or neither, are given.
        TokenizerError: The model has no tokenizer, or it has neither BOS nor EOS.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        runtime: Runtime | None = None,
        pretrained: str | None = None,
        backend: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        threads: int | None = None,
        trust: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        progress: Tell | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        given = [one for one in (path, pretrained, runtime) if one is not None]
        if len(given) != 1:
            raise InputError(
                f"LmoptLM takes one of path and runtime, given {len(given)}; on the command line: "
                "--model lmopt --model_args path=FOLDER,backend=onnxruntime"
            )
        if runtime is None:
            engine = {"backend": backend, "device": device or "cpu", "dtype": dtype, "threads": threads}
            runtime = Runtime(str(given[0]), trust=trust, **engine, **options)  # type: ignore[arg-type]
        elif options:
            raise UnsupportedOptionError(f"LmoptLM takes no {', '.join(sorted(options))} beside a runtime.")
        if runtime.tokenizer is None:
            raise TokenizerError(
                "tasks are texts, but the model has no tokenizer: Runtime(..., tokenizer=...)"
            )
        self.runtime = runtime
        self.tokenizer: Tokenizer = runtime.tokenizer
        self.batch_size = _rows(batch_size)
        self.max_length = max_length or runtime.facts.context_length or _DEFAULT_LENGTH
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        self._prefix = prefix_token_id
        self._progress = progress

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LmoptLM":
        """Make a model of `--model_args`, which win over options of the harness's own.

        Its `--device` is `cuda:0` where nobody has said anything, and means a GPU if there is one. lmopt takes a
        device at its word, so that value is left out: say `--model_args device=cuda:0`.
        """
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if given.get("device") == _HARNESS_DEVICE:
            del given["device"]
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "LmoptLM":
        """Make a model of `--model_args`, as the harness reads them."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    # Tokens -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text.

        Raises:
            TokenizerError: The tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise TokenizerError("the tokenizer has no EOS token; give LmoptLM(prefix_token_id=...).")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that stands before a text without a context."""
        if self._prefix is not None:
            return self._prefix
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches of requests."""
        return self.runtime.report().source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Turn text into ids; special tokens are added as the tokenizer does, but no second BOS."""
        if add_special_tokens is None:
            begins = string.startswith(
                self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            )
            add_special_tokens = False if begins else self.add_bos_token
        return self.tokenizer.encode(string, True if add_special_tokens is None else add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation by the model's template; without a generation prompt, its last message stays open.

        A template that refuses the system role is given the conversation without it, as `HFLM` does.
        """
        try:
            return self._chat(chat_history, add_generation_prompt)
        except TemplateError:
            rest = [one for one in chat_history if one["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            _logger.warning("the chat template refuses these messages; the system message is left out")
            return self._chat(rest, add_generation_prompt)

    def _chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self.tokenizer.apply_chat_template(messages)
        # transformers' way to leave a message open (`continue_final_message`): mark its end, cut there.
        *before, last = messages
        marked = [*before, {**last, "content": last["content"] + _TAG}]
        text = self.tokenizer.apply_chat_template(marked, add_generation_prompt=False)
        text, tag, rest = text.rpartition(_TAG.strip())
        if not tag:
            raise TemplateError(
                "the chat template drops the end of the last message, which is to be continued."
            )
        return text if rest.startswith(" ") else text.rstrip()

    # Requests -----------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations; see `lm_eval.api.model.LM.loglikelihood`.

        Raises:
            InputError: A continuation has no token of its own.
            ContextLengthError: A continuation alone is longer than the model's context.
        """
        for number, request in enumerate(requests):
            if not request.args[1]:
                raise InputError(f"request {number} of {request.task_name!r} has an empty continuation.")
        # The progress bar of the base class shows its tokenizing, which takes no time.
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(
        self, requests: Sequence[_Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for number, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise InputError(
                    f"continuation {number}, {texts[1]!r:.60}, has no token of its own: it melts into the last "
                    "token of its context. Let it begin with the space, and the context end without."
                )
            pairs.append(self._fitted(context, continuation))
        found = self._scores("loglikelihood", pairs)
        answers = [(one.total, one.greedy) for one in found]
        for (texts, _context, _continuation), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, window by window; see `lm_eval.api.model.LM.loglikelihood_rolling`."""
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [utils.make_disjoint_window(window) for window in windows]
            pairs += own
            counts.append(len(own))
        found = iter(self._scores("loglikelihood_rolling", pairs))
        totals = [sum(next(found).total for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until a stop string; see `lm_eval.api.model.LM.generate_until`.

        A stop string counts in what was generated only, as in the harness; transformers and lmopt by
        themselves also find one that begins in the prompt.

        Raises:
            ContextLengthError: The new tokens leave no room for a prompt.
            UnsupportedOptionError: An option that `lmopt.GenerationConfig` does not know.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        done = 0
        for numbers in groups.values():
            contexts = [requests[number].args[0] for number in numbers]
            for number, text in zip(
                numbers,
                self._generate(contexts, requests[numbers[0]].args[1], done, len(requests)),
                strict=True,
            ):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
            done += len(numbers)
        return texts

    def _generate(self, contexts: Sequence[str], given: dict[str, Any], done: int, total: int) -> list[str]:
        """Continue contexts that share their options."""
        options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = [one for one in handle_stop_sequences(options.pop("until"), eos=end) if one]
        new_tokens = options.pop("max_gen_toks")
        room = self.max_length - new_tokens
        if room < 1:
            raise ContextLengthError(
                f"{new_tokens} new tokens leave no room for a prompt in a context of {self.max_length}; "
                "lower max_gen_toks."
            )
        if options.pop("max_length", None) is not None or options.get("num_return_sequences", 1) != 1:
            raise UnsupportedOptionError(
                "use max_gen_toks in place of max_length, and no num_return_sequences."
            )
        if not options["do_sample"]:
            options.pop("temperature", None)
        prompts = [self.tok_encode(text) for text in contexts]
        if cut := sum(len(ids) > room for ids in prompts):
            _logger.warning("%d prompts are longer than %d tokens and are cut from the left", cut, room)
        stops = _Stops(until, self.tokenizer, len(prompts))

        def told(token: Token) -> None:
            stops(token)
            if token.finish_reason is not None or stops.done[token.prompt].is_set():
                self._tell("generate_until", done + stops.ended(token.prompt), total)

        found = self.runtime.generate(
            [ids[-room:] for ids in prompts],
            max_new_tokens=new_tokens,
            cancel=stops.done,
            on_token=told,
            **options,
        )
        for one in found:
            if one.error is not None:
                raise one.error
        return [postprocess_generated_text(one.text, until, None) for one in found]

    # ---------------------------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """What ran, for the harness's results: engine, device, type, versions."""
        report = self.runtime.report()
        return {
            "model_num_parameters": report.facts.parameters,
            "model_dtype": report.actual.dtype,
            "model_source": report.source,
            "lmopt_backend": report.actual.backend,
            "lmopt_device": report.actual.device,
            "lmopt_versions": dict(report.actual.versions),
        }

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cut a context from the left; the last token of the continuation is predicted and never read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ContextLengthError(
                f"a continuation has {len(continuation)} tokens; the model's context has {self.max_length}."
            )
        if len(context) > room:
            _logger.warning("a context of %d tokens is cut to %d from the left", len(context), room)
        return context[-room:], continuation

    def _scores(self, kind: str, pairs: Iterable[tuple[list[int], list[int]]]) -> list[ContinuationScore]:
        return score_continuations(
            self.runtime.engine,
            list(pairs),
            batch_size=self.batch_size,
            progress=lambda done, total: self._tell(kind, done, total),
        )

    def _tell(self, kind: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(kind, done, total)


class _Stops:
    """Ends rows whose new tokens complete a stop string.

    Attributes:
        done: One a prompt, set as soon as it has.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer, prompts: int) -> None:
        self.done = [threading.Event() for _ in range(prompts)]
        self._stops = StopStrings(strings, tokenizer)
        self._seen: list[list[int]] = [[] for _ in range(prompts)]
        self._ended: set[int] = set()

    def __call__(self, token: Token) -> None:
        seen = self._seen[token.prompt]
        seen.append(token.token_id)
        if self._stops.matches(np.array(seen, np.int64)):
            self.done[token.prompt].set()

    def ended(self, prompt: int) -> int:
        """Note that a prompt is done, and count those that are."""
        self._ended.add(prompt)
        return len(self._ended)


def _rows(batch_size: int | str | None) -> int:
    if batch_size is None or str(batch_size).startswith("auto"):
        return 8
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1:
        raise UnsupportedOptionError(
            f"batch_size={batch_size!r} is not possible; expected 1 or more, or 'auto'."
        )
    return rows
