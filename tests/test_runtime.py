"""One set of methods on every engine: right values, same tokens, and errors that say what to do."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from lmopt.contracts import Engine, EngineReport
from lmopt.errors import (
    ClosedError,
    ContextLengthError,
    DeviceError,
    DtypeError,
    EmptyPromptError,
    InputError,
    LmoptError,
    ShapeError,
    TemplateError,
    TokenIdError,
    TokenizerError,
    UnknownPluginError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.evaluation import TOLERANCES
from lmopt.generation import Generation, GenerationConfig, Limits, PrefixReport
from lmopt.model import Model
from lmopt.runtime import Runtime
from lmopt.testing.models import CONTEXT_LENGTH, VOCAB_SIZE, tiny_llama, tiny_lstm

BACKENDS = ("torch", "onnxruntime")
TEXT = "w5 w17 w40 w41"
ROW = [5, 17, 40, 41]
ROWS = [[7, 9, 11], [20, 3, 4, 5, 6, 60, 70, 80, 90], ROW]
LIMITS = TOLERANCES["float32"]


def word_tokenizer(chat: bool = True) -> transformers.PreTrainedTokenizerFast:
    words = {f"w{n}": n for n in range(3, VOCAB_SIZE)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    if chat:
        wrapped.chat_template = (
            "{{ bos_token }}{% for one in messages %} {{ one.content }}{% endfor %}"
            "{% if add_generation_prompt %} w50{% endif %}"
        )
    return wrapped


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_module(tiny_llama(), word_tokenizer())


@pytest.fixture(scope="module")
def runtimes(model: Model) -> Iterator[dict[str, Runtime]]:
    """One runtime an engine; ONNX Runtime gets its artefact out of the session's cache."""
    found = {name: Runtime(model, backend=name) for name in BACKENDS}
    yield found
    for one in found.values():
        one.close()


@pytest.fixture(params=BACKENDS)
def runtime(request: pytest.FixtureRequest, runtimes: dict[str, Runtime]) -> Runtime:
    return runtimes[request.param]


@pytest.fixture(scope="module", params=BACKENDS)
def recurrent(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A model without mask, context limit and tokenizer."""
    with Runtime(Model.from_module(tiny_lstm()), backend=request.param) as found:
        yield found


def author(model: Model, row: list[int]) -> np.ndarray:
    """Logits `(sequence, vocab)` of the module itself, without cache or batch."""
    with torch.no_grad():
        return model.module(torch.tensor([row])).logits[0].numpy()


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert LIMITS.atol is not None
    return bool(np.allclose(found, expected, atol=LIMITS.atol, rtol=LIMITS.rtol))


# Values -----------------------------------------------------------------------------------------


def test_logits_of_one_row_are_the_authors(runtime: Runtime, model: Model) -> None:
    expected = author(model, ROW)
    for given in (ROW, np.array(ROW), np.array(ROW, np.int32), TEXT):
        assert near(runtime.logits(given), expected)


def test_logits_of_unequal_rows_are_those_of_each_alone(runtime: Runtime, model: Model) -> None:
    found = runtime.logits(ROWS)
    assert isinstance(found, list)
    assert all(near(one, author(model, row)) for one, row in zip(found, ROWS, strict=True))
    both = runtime.logits(np.array([ROW, ROW[::-1]]))
    assert near(both[1], author(model, ROW[::-1]))


def test_scores_are_the_log_probabilities_of_each_token_but_the_first(runtime: Runtime, model: Model) -> None:
    found = runtime.score([*ROWS, TEXT])
    for one, row in zip(found, [*ROWS, ROW], strict=True):
        table = log_probabilities(author(model, row))
        assert near(one, table[np.arange(len(row) - 1), row[1:]])
    # A text is its ids; beside others torch's products may round otherwise (they do on CPUs with AMX).
    alone = runtime.score(TEXT)
    assert np.array_equal(alone, runtime.score(ROW))
    assert near(alone, found[-1])
    if runtime.backend != "torch":
        assert np.array_equal(alone, found[-1])


def test_perplexity_is_that_of_windows_read_alone(runtime: Runtime, model: Model) -> None:
    ids = np.random.default_rng(1).integers(3, VOCAB_SIZE, 70).tolist()
    losses = []
    for start in range(0, 60, 20):
        window = ids[start : start + 20]
        table = log_probabilities(author(model, window))
        losses += [-table[place, token] for place, token in enumerate(window[1:])]
    expected = np.exp(np.mean(losses))
    found = runtime.perplexity(ids, context=20, stride=20, tokens=60)
    assert found.tokens_scored == len(losses) == 57
    assert found.value == pytest.approx(expected, rel=1e-5)
    text = " ".join(f"w{token}" for token in ids)
    assert runtime.perplexity(text, context=20, stride=20, tokens=60).value == pytest.approx(found.value)


def test_both_engines_agree_on_everything(runtimes: dict[str, Runtime]) -> None:
    one, two = (runtimes[name] for name in BACKENDS)
    options = {"max_new_tokens": 24, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}, {"temperature": 0.9, "seed": 3}, {"repetition_penalty": 1.3}):
        ours, theirs = one.generate(ROWS, **options, **more), two.generate(ROWS, **options, **more)
        assert [x.token_ids for x in ours] == [x.token_ids for x in theirs], more
    assert list(one.stream(TEXT, **options)) == list(two.stream(TEXT, **options))


# Generation -------------------------------------------------------------------------------------


def hugging_face(model: Model, rows: list[list[int]], **options: Any) -> list[list[int]]:
    """What transformers' own `generate` continues each row with, in one left-padded batch."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    found = model.module.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    results = []
    for row in found[:, longest:].tolist():
        end = row.index(2) + 1 if 2 in row else len(row)
        results.append(row[:end])
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": 0.3, "early_stopping": True},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(runtime: Runtime, model: Model, options: dict[str, Any]) -> None:
    expected = hugging_face(model, ROWS, max_new_tokens=16, do_sample=False, **options)
    found = runtime.generate(ROWS, max_new_tokens=16, **options)
    assert [one.token_ids for one in found] == expected
    alone = [runtime.generate(row, max_new_tokens=16, **options).token_ids for row in ROWS]
    assert alone == expected


def test_one_prompt_gives_one_result_and_a_list_gives_a_list(runtime: Runtime) -> None:
    options = {"max_new_tokens": 5, "eos_token_id": None}
    one = runtime.generate(TEXT, **options)
    assert isinstance(one, Generation)
    assert len(one.token_ids) == 5
    assert one.text == " ".join(f"w{token}" for token in one.token_ids)
    assert (one.finish_reason, one.prompt_tokens) == ("length", 4)
    for given in ([TEXT], [ROW], np.array([ROW])):
        many = runtime.generate(given, **options)
        assert isinstance(many, list)
        assert [x.token_ids for x in many] == [one.token_ids]
    mixed = runtime.generate([TEXT, ROWS[0]], **options)
    assert mixed[0].token_ids == one.token_ids
    several = runtime.generate(TEXT, num_return_sequences=2, temperature=1.5, seed=1, **options)
    assert len(several) == 2
    assert several[0].token_ids != several[1].token_ids


def test_a_configuration_object_and_options_say_the_same(runtime: Runtime) -> None:
    config = GenerationConfig(max_new_tokens=6, do_sample=True, temperature=0.8, seed=4)
    expected = runtime.generate(TEXT, config).token_ids
    assert runtime.generate(TEXT, max_new_tokens=6, temperature=0.8, seed=4, eos_token_id=None).token_ids == (
        expected
    )
    assert len(runtime.generate(TEXT, config, max_new_tokens=3).token_ids) == 3


def test_a_seed_gives_the_same_row_alone_and_in_company(runtime: Runtime) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.2, "eos_token_id": None}
    together = runtime.generate(ROWS, seed=[11, 22, 33], **options)
    alone = [
        runtime.generate(row, seed=seed, **options) for row, seed in zip(ROWS, (11, 22, 33), strict=True)
    ]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_a_stream_is_the_text_and_can_be_left(runtime: Runtime) -> None:
    options = {"max_new_tokens": 10, "eos_token_id": None}
    whole = runtime.generate(TEXT, **options)
    pieces = list(runtime.stream(TEXT, **options))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 5
    stream = runtime.stream(TEXT, **options)
    first = next(stream)
    stream.close()
    assert whole.text is not None
    assert whole.text.startswith(first)


def test_tokens_are_told_as_they_come(runtime: Runtime) -> None:
    told = []
    found = runtime.generate(ROWS, max_new_tokens=4, eos_token_id=None, on_token=told.append)
    for place, one in enumerate(found):
        assert [token.token_id for token in told if token.prompt == place] == one.token_ids
    assert [token.prompt for token in told[:3]] == [0, 1, 2]


def test_chat_reads_what_the_template_writes(runtime: Runtime) -> None:
    messages = [{"role": "user", "content": "w10 w11"}, {"role": "user", "content": "w12"}]
    assert runtime.chat_ids(messages) == [1, 10, 11, 12, 50]
    expected = runtime.generate([1, 10, 11, 12, 50], max_new_tokens=5).token_ids
    assert runtime.chat(messages, max_new_tokens=5).token_ids == expected


def test_a_model_without_mask_takes_unequal_rows_too(recurrent: Runtime) -> None:
    options = {"max_new_tokens": 8}
    together = recurrent.generate(ROWS, **options)
    assert [one.token_ids for one in together] == [
        recurrent.generate(row, **options).token_ids for row in ROWS
    ]
    assert together[0].text is None
    ids = list(ROWS[1])
    for token in together[1].token_ids:
        assert int(np.argmax(recurrent.logits(ids)[-1])) == token
        ids.append(token)
    beams = recurrent.generate(ROWS, num_beams=2, **options)
    assert [one.token_ids for one in beams] == [
        recurrent.generate(row, num_beams=2, **options).token_ids for row in ROWS
    ]


def test_the_models_own_defaults_hold_until_the_caller_says_otherwise() -> None:
    model = Model.from_module(tiny_lstm(), generation_config={"max_new_tokens": 3, "eos_token_id": 2})
    with Runtime(model, backend="torch") as runtime:
        assert len(runtime.generate(ROW, eos_token_id=None).token_ids) == 3
        assert len(runtime.generate(ROW, eos_token_id=None, max_new_tokens=5).token_ids) == 5


# Threads ----------------------------------------------------------------------------------------


def test_eight_threads_get_what_one_gets(runtime: Runtime) -> None:
    def work(number: int) -> tuple[list[int], list[float]]:
        row = [3 + number, 40, 41 + number, *range(10, 10 + number)]
        tokens = runtime.generate(row, max_new_tokens=20, eos_token_id=None).token_ids
        return tokens, runtime.score(row).tolist()

    serial = [work(number) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == serial


# Life and report --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_runtime_says_so(model: Model, backend: str) -> None:
    with Runtime(model, backend=backend) as runtime:
        assert isinstance(runtime.engine, Engine)
    runtime.close()
    calls: list[Callable[[], object]] = [
        lambda: runtime.generate(ROW),
        lambda: runtime.stream(TEXT),
        lambda: runtime.chat([{"role": "user", "content": "w5"}]),
        lambda: runtime.logits(ROW),
        lambda: runtime.score(TEXT),
        lambda: runtime.perplexity(TEXT),
        runtime.report,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="open a new"):
            call()


def test_the_report_says_what_was_asked_and_what_is(model: Model, runtime: Runtime) -> None:
    report = runtime.report()
    assert report.requested == {
        "backend": runtime.backend,
        "device": "cpu",
        "dtype": "auto",
        "threads": None,
    }
    assert isinstance(report.actual, EngineReport)
    assert (report.actual.backend, report.actual.device, report.actual.dtype) == (
        runtime.backend,
        "cpu",
        "float32",
    )
    assert report.actual.threads >= 1
    assert report.actual.versions[runtime.backend]
    assert report.facts == model.facts


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thread_count_is_honoured(model: Model, backend: str) -> None:
    with Runtime(model, backend=backend, threads=1) as runtime:
        runtime.generate(ROW, max_new_tokens=2)
        assert runtime.report().actual.threads == 1


# Limits, kept prefixes, threads ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_change_no_token(model: Model, runtimes: dict[str, Runtime], backend: str) -> None:
    options = {"max_new_tokens": 12, "eos_token_id": None, "temperature": 0.9, "seed": 3}
    rows = [*ROWS, [30, 31], list(range(3, 33))]
    expected = [runtimes[backend].generate(row, **options) for row in rows]
    with Runtime(
        model, backend=backend, max_num_seqs=2, max_num_batched_tokens=8, max_cache_tokens=90
    ) as limited:
        assert limited.generate(rows, **options) == expected
        assert limited.report().limits == Limits(2, 8, 90)
    assert runtimes[backend].report().limits == Limits()
    with pytest.raises(UnsupportedOptionError, match="max_num_seqs=0"):
        Runtime(model, backend=backend, max_num_seqs=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefixes_are_kept_when_asked_for(model: Model, runtimes: dict[str, Runtime], backend: str) -> None:
    plain = runtimes[backend]
    system = list(range(3, 40))
    with Runtime(model, backend=backend, prefix_cache_tokens=300) as keeping:
        text = list(system)
        for turn in range(3):
            text += [50 + turn, 60]
            found = keeping.generate(text, max_new_tokens=8, eos_token_id=None)
            assert found == plain.generate(text, max_new_tokens=8, eos_token_id=None)
            text += found.token_ids
        prompts = [[*system, number] for number in (70, 71, 72)]
        expected = [plain.generate(one, max_new_tokens=8) for one in prompts]
        assert keeping.generate(prompts, max_new_tokens=8) == expected
        report = keeping.report().prefixes
        assert (report.hits, report.limit) == (5, 300)
        assert report.reused > 5 * len(system) - 1
        assert 0 < report.tokens <= 300
    assert plain.report().prefixes == PrefixReport(0)


def test_prefixes_of_a_recurrent_model_cannot_be_kept() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"prefix_cache_tokens=64.*cannot rewind"):
        Runtime(Model.from_module(tiny_lstm()), backend="torch", prefix_cache_tokens=64)


def test_prompt_lookup_gives_the_same_tokens(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a call of several tokens costs no more, drafts are always worth their risk.
    monkeypatch.setattr("lmopt.generation.costs.CallCosts.ratio", lambda self, rows, drafted: 1.0)
    rows = [ROW * 4, [20, 21, 22] * 5, [7]]
    for options in ({}, {"temperature": 0.8, "seed": 4}, {"repetition_penalty": 1.2}):
        options |= {"max_new_tokens": 40, "eos_token_id": None}
        found = runtime.generate(rows, prompt_lookup_num_tokens=5, **options)
        assert found == runtime.generate(rows, **options)
        assert sum(one.drafted for one in found) > 0


def test_options_may_differ_by_prompt(runtime: Runtime) -> None:
    configs = [GenerationConfig(max_new_tokens=count, eos_token_id=None) for count in (3, 6, 1)]
    found = runtime.generate(ROWS, configs, repetition_penalty=1.1)
    alone = [
        runtime.generate(row, one, repetition_penalty=1.1) for row, one in zip(ROWS, configs, strict=True)
    ]
    assert found == alone
    assert [len(one.token_ids) for one in found] == [3, 6, 1]


def test_a_runtime_closed_by_a_callback_ends_the_request(model: Model) -> None:
    with Runtime(model, backend="torch") as runtime, pytest.raises(ClosedError, match="open a new"):
        runtime.generate(ROW, max_new_tokens=9, on_token=lambda token: runtime.close())


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "error", "said"),
    [
        ([5, VOCAB_SIZE], TokenIdError, str(VOCAB_SIZE)),
        ([5, -1], TokenIdError, "-1"),
        ([3] * (CONTEXT_LENGTH + 1), ContextLengthError, str(CONTEXT_LENGTH)),
        (np.array([1.0, 2.0]), DtypeError, "float64"),
        (np.array([True, False]), DtypeError, "bool"),
        (np.zeros((1, 2, 3), np.int64), ShapeError, r"\(1, 2, 3\)"),
        (7, DtypeError, "int"),
        (b"w5", DtypeError, "bytes"),
        ([[5], 6], InputError, "mixes|among"),
        ([1.5, 2.5], InputError, "expected"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_malformed_prompt_is_named(
    runtime: Runtime, prompt: Any, error: type[LmoptError], said: str
) -> None:
    for call in (runtime.generate, runtime.logits, runtime.score):
        with pytest.raises(error, match=said):
            call(prompt)


def test_an_empty_prompt_starts_at_bos_or_is_refused(runtime: Runtime, recurrent: Runtime) -> None:
    assert (
        runtime.generate("", max_new_tokens=3).token_ids == runtime.generate([1], max_new_tokens=3).token_ids
    )
    for given in ([], [[5], []]):
        with pytest.raises(EmptyPromptError):
            recurrent.generate(given)
    with pytest.raises(ShapeError):
        runtime.logits([[5], []])


def test_new_tokens_must_fit_the_context(runtime: Runtime) -> None:
    with pytest.raises(ContextLengthError, match=str(CONTEXT_LENGTH)):
        runtime.generate(ROW, max_new_tokens=CONTEXT_LENGTH)
    whole = runtime.generate(ROW, max_new_tokens=CONTEXT_LENGTH - 4, eos_token_id=None)
    assert len(whole.token_ids) == CONTEXT_LENGTH - 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"temprature": 0.5}, "'temperature'"),
        ({"max_tokens": 5}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"num_beams": 2, "do_sample": True}, "beam"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(
    runtime: Runtime, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedOptionError, match=said):
        runtime.generate(ROW, **options)
    with pytest.raises(UnsupportedOptionError, match=said):
        runtime.stream(TEXT, **options)


def test_text_needs_a_tokenizer_and_chat_a_template(recurrent: Runtime) -> None:
    for call in (
        recurrent.generate,
        recurrent.score,
        recurrent.logits,
        recurrent.perplexity,
        recurrent.stream,
    ):
        with pytest.raises(TokenizerError, match="tokenizer="):
            call("w5 w6")
    plain = Model.from_module(tiny_lstm(), word_tokenizer(chat=False))
    with (
        Runtime(plain, backend="torch") as runtime,
        pytest.raises(TemplateError, match="template"),
    ):
        runtime.chat([{"role": "user", "content": "w5"}])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_option_of_a_backend_is_refused(model: Model, backend: str) -> None:
    with pytest.raises(UnsupportedOptionError, match="therads"):
        Runtime(model, backend=backend, therads=2)


def test_an_unknown_backend_names_the_near_one(model: Model) -> None:
    with pytest.raises(UnknownPluginError, match="Did you mean 'onnxruntime'"):
        Runtime(model, backend="onnxruntim")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gpu_that_is_not_there_is_an_error(model: Model, backend: str) -> None:
    for device in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=r"(?s)cuda.*(install|cpu)"):
            Runtime(model, backend=backend, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_or_dtype_that_an_engine_does_not_know_is_refused(model: Model, backend: str) -> None:
    with pytest.raises(UnsupportedError, match=r"quantum.*cpu|cpu.*quantum"):
        Runtime(model, backend=backend, device="quantum")
    with pytest.raises(UnsupportedError, match="int3"):
        Runtime(model, backend=backend, dtype="int3")


def test_another_dtype_than_the_models_is_honoured_or_refused(model: Model) -> None:
    with Runtime(model, backend="torch", dtype="float16") as runtime:
        assert runtime.report().actual.dtype == "float16"
        assert np.abs(runtime.logits(ROW) - author(model, ROW)).max() < 0.1
    # The caller's module stays as it is.
    assert next(model.module.parameters()).dtype == torch.float32
    with pytest.raises(UnsupportedError, match=r"float32.*float16.*dtype='float16'"):
        Runtime(model, backend="onnxruntime", dtype="float16")
