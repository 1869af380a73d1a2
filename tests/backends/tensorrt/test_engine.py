"""The engine's own logic on the fake GPU: what the conformance kit cannot see from outside."""

import threading

import numpy as np
import pytest

from lmopt.backends.tensorrt import cuda, graphs
from lmopt.backends.tensorrt.profiles import Profile
from lmopt.backends.tensorrt.state import slots_for
from lmopt.errors import (
    ArtifactNotFoundError,
    ClosedError,
    ContextLengthError,
    DeviceError,
    EngineError,
    InsufficientMemoryError,
    ShapeError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.testing import models


def read(engine, rows, state=None, **options):
    """Read rows of unequal length; give the logits of each, and the state."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    logits, state = engine.forward(ids, lengths, state or engine.begin(len(rows)), **options)
    return [one[:length] for one, length in zip(logits, lengths, strict=True)], state


def decode(one, row, count, state=None, seed=9):
    """Read a prompt and then tokens one by one; every logit is compared with eager PyTorch."""
    given, state = read(one.engine, [row], state)
    tail = np.random.default_rng(seed).integers(3, models.VOCAB_SIZE, count)
    whole = np.concatenate([row, tail])
    expected = one.subject.reference(whole)
    np.testing.assert_allclose(given[0], expected[: len(row)], rtol=1e-3, atol=1e-3)
    for place in range(len(row), len(whole)):
        given, state = read(one.engine, [whole[place : place + 1]], state, last_only=True)
        np.testing.assert_allclose(given[0][0], expected[place], rtol=1e-3, atol=1e-3, err_msg=str(place))
    return whole, state


def counts(engine):
    return engine.report().details["cuda_graphs"]


def test_decoding_grows_the_cache_and_replays_a_graph_for_each_size(opened, rows, gpu):
    one = opened()
    decode(one, *rows(9), 100)
    found = counts(one.engine)
    # 64 and 128 slots: each is seen once, run on a context of its own once, captured, and replayed from then on.
    assert found["captured"] == 2
    assert found["replayed"] == 100 - 2 * 2
    assert found["uncaptured"] == 2 * 2
    assert found["refused"] == ""
    assert gpu.runtime.calls["cudaGraphLaunch"] == found["replayed"]


def test_a_capacity_that_is_told_makes_one_size_of_it(opened, rows):
    one = opened()
    decode(one, *rows(9), 100, state=one.engine.begin(1, capacity=110))
    assert counts(one.engine)["captured"] == 1


def test_graphs_can_be_left_out(opened, rows, gpu):
    one = opened(cuda_graphs=False)
    decode(one, *rows(5), 12)
    assert counts(one.engine)["by"] == "nobody"
    assert "cudaGraphLaunch" not in gpu.runtime.calls


def test_a_recurrent_state_has_one_size_and_one_graph(opened, rows):
    one = opened("lstm")
    decode(one, *rows(5), 30)
    found = counts(one.engine)
    assert found["captured"] == 1
    assert found["replayed"] == 28


def test_what_cannot_be_captured_is_run_and_reported(opened, rows, gpu):
    gpu.trt.refuse.add("capture")
    one = opened()
    decode(one, *rows(5), 12)
    found = counts(one.engine)
    assert found["captured"] == found["replayed"] == 0
    assert "this cannot be captured" in found["refused"]
    assert not gpu.runtime.capturing
    gpu.trt.refuse.clear()
    gpu.runtime.fail["cudaGraphInstantiate"] = cuda.runtime.cudaError_t.cudaErrorStreamCaptureInvalidated
    other = opened()
    decode(other, *rows(5), 12)
    assert "cudaErrorStreamCaptureInvalidated" in counts(other.engine)["refused"]


def test_the_number_of_graphs_is_bounded(opened, rows, gpu, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST", 2)
    one = opened()
    states = [read(one.engine, rows(4, seed=n))[1] for n in range(4)]
    for step in range(4):
        for n, state in enumerate(states):
            _, states[n] = read(one.engine, rows(1, seed=10 + step), state)
    alive = [lane._graphs._replays for lane in one.engine._lanes]
    assert sum(map(len, alive)) == 2
    # Executables of graphs that were dropped were given back.
    assert len(gpu.runtime.graphs) <= 2


def test_rtx_captures_by_itself(opened, rows, gpu):
    class Strategy:
        WHOLE_GRAPH_CAPTURE = "whole"

    gpu.trt.CudaGraphStrategy = Strategy
    made = []
    gpu.trt.on_config = made.append
    one = opened()
    decode(one, *rows(5), 6)
    assert counts(one.engine) == {"by": "TensorRT"}
    assert made
    assert all(config.cuda_graph_strategy == "whole" for config in made)
    assert "cudaGraphLaunch" not in gpu.runtime.calls


def test_rows_and_tokens_beyond_the_profiles_are_read_in_parts(opened, rows):
    one = opened()
    texts = rows(37, 3, 20, 16, 1, 33, seed=3)  # 6 rows of a profile for 4, 37 tokens of one for 16
    for side in ("right", "left"):
        given, state = read(one.engine, texts, one.engine.begin(6, padding_side=side))
        for text, logits in zip(texts, given, strict=True):
            np.testing.assert_allclose(logits, one.subject.reference(text), rtol=1e-3, atol=1e-3)
        more = rows(2, 2, 1, 2, 2, 2, seed=4)
        given, _ = read(one.engine, more, state, last_only=True)
        for text, tail, logits in zip(texts, more, given, strict=True):
            expected = one.subject.reference(np.concatenate([text, tail]))[-1]
            np.testing.assert_allclose(logits[0], expected, rtol=1e-3, atol=1e-3)


def test_only_wanted_logits_come_to_the_host(opened, rows, gpu):
    opened_one = opened()
    sizes = []
    plain = gpu.runtime.cudaMemcpyAsync
    gpu.runtime.cudaMemcpyAsync = lambda to, source, size, *rest: (
        sizes.append(size) if any(0 <= to - at < one.size for at, one in gpu.runtime.host.items()) else None,
        plain(to, source, size, *rest),
    )[1]
    read(opened_one.engine, rows(16), last_only=True)
    assert not sizes  # one box of one line
    read(opened_one.engine, rows(16, 9), last_only=True)
    assert sizes == [models.VOCAB_SIZE * 4] * 2


def test_the_context_of_the_model_and_of_the_build_end_with_an_error(opened, rows, gpu):
    one = opened()
    with pytest.raises(ContextLengthError, match="the model's context is 128"):
        one.engine.begin(1, capacity=129)
    _, state = read(one.engine, rows(128))
    with pytest.raises(ContextLengthError, match="129 tokens"):
        read(one.engine, rows(1), state)
    gpu.profiles = (
        Profile("prefill", (1, 1, 4), (1, 8, 16), (0, 0, 32)),
        Profile("decode", (1, 1, 4), (1, 1, 1), (0, 32, 32)),
    )
    short = opened()
    with pytest.raises(ContextLengthError, match="max_past=39"):
        short.engine.begin(1, capacity=40)
    decode(short, *rows(30), 3)
    _, state = read(short.engine, rows(33))
    with pytest.raises(ContextLengthError, match="built for 33"):
        read(short.engine, rows(1), state)


def test_a_profile_that_takes_nothing_like_it_says_what_it_takes(opened, rows, gpu):
    gpu.profiles = (Profile("wide", (2, 2, 4), (4, 8, 16), (0, 0, 64)),)
    one = opened()
    with pytest.raises(UnsupportedError, match="wide"):
        read(one.engine, rows(8))


def test_memory_that_is_short_is_named_and_idle_memory_is_used_first(opened, rows, gpu):
    one = opened()
    read(one.engine, rows(9))
    gpu.runtime.capacity = gpu.runtime.used() + 4096
    with pytest.raises(InsufficientMemoryError, match=r"MiB of memory on cuda:0.*are free"):
        read(one.engine, rows(*[120] * 8))
    # Nothing is broken by that: once there is memory again, the engine goes on.
    gpu.runtime.capacity += 1 << 20
    decode(one, *rows(5), 3)


def test_memory_does_not_grow_with_the_number_of_runs(opened, rows, gpu):
    one = opened()
    used = []
    for n in range(30):
        _, state = read(one.engine, rows(4, 7, seed=n))
        state = one.engine.select(state, np.array([1, 0, 1]))
        state = one.engine.join([state, read(one.engine, rows(3))[1]])
        read(one.engine, rows(1, 1, 1, 1), one.engine.rewind(state, np.array([3, 2, 3, 1])))
        used.append(gpu.runtime.used())
    assert max(used[10:]) <= max(used[:10])
    one.engine.close()
    del state
    assert gpu.runtime.used() == 0
    assert not gpu.runtime.host
    assert not gpu.runtime.streams
    assert not gpu.runtime.graphs


def test_as_many_lanes_as_threads_and_no_more(opened, rows, gpu):
    one = opened()
    texts = rows(*[20] * 3, seed=2)
    expected = [one.subject.reference(text) for text in texts]
    wrong = []
    together = threading.Barrier(3)

    def work(text, full):
        for _ in range(3):
            together.wait(30)
            state = one.engine.begin(1)
            for place in range(0, 20, 4):
                given, state = read(one.engine, [text[place : place + 4]], state)
                if not np.allclose(given[0], full[place : place + 4], rtol=1e-3, atol=1e-3):
                    wrong.append(place)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(texts, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= len(gpu.runtime.streams) <= 3


def test_closing_while_a_call_is_inside(opened, rows, gpu):
    one = opened()
    state = one.engine.begin(1)
    plain = gpu.runtime.cudaStreamSynchronize
    closed = []

    def late(stream):
        if not closed:
            closed.append(True)
            one.engine.close()
        return plain(stream)

    gpu.runtime.cudaStreamSynchronize = late
    with pytest.raises(ClosedError):
        read(one.engine, rows(5), state)
    gpu.runtime.cudaStreamSynchronize = plain
    assert not gpu.runtime.streams
    with pytest.raises(ClosedError):
        one.engine.report()


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("run", "TensorRT failed on 1 rows of 5 tokens: the run was refused"),
        ("attention_mask", "does not take the shape"),
        ("context", "cannot make an execution context"),
        ("shape logits", r"would write 'logits' in the shape \(1, 5, 98\); expected \(1, 5, 97\)"),
    ],
)
def test_what_tensorrt_refuses_is_an_error_with_its_words(opened, rows, gpu, refused, words):
    one = opened()
    state = one.engine.begin(1)
    gpu.trt.refuse.add(refused)
    with pytest.raises(EngineError, match=words):
        read(one.engine, rows(5), state)
    gpu.trt.refuse.clear()
    decode(one, *rows(5), 2)


def test_a_plan_that_does_not_load_or_is_not_what_it_says(opened, gpu, monkeypatch):
    gpu.trt.refuse.add("host input_ids")
    with pytest.raises(EngineError, match="'input_ids' on the host"):
        opened()
    gpu.trt.refuse.clear()
    plain = gpu.trt.load

    def fewer(data):
        engine = plain(data)
        engine.num_optimization_profiles = 1
        return engine

    monkeypatch.setattr(gpu.trt, "load", fewer)
    with pytest.raises(EngineError, match="1 profiles; record"):
        opened()
    monkeypatch.setattr(gpu.trt, "load", lambda data: gpu.trt.log.lines.append("magic number") or None)
    with pytest.raises(EngineError, match=r"cannot load the plan.*magic number"):
        opened()


def test_a_failing_device_is_named(opened, rows, gpu):
    one = opened()
    state = one.engine.begin(1)
    gpu.runtime.fail["cudaStreamSynchronize"] = cuda.runtime.cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(DeviceError, match=r"cudaStreamSynchronize failed: cudaErrorIllegalAddress \(700\)"):
        read(one.engine, rows(5), state)


def test_rows_that_are_not_there_are_refused(opened, rows):
    one = opened()
    _, state = read(one.engine, rows(3, 4))
    for wrong in ([2], [-1], []):
        with pytest.raises(ShapeError, match="rows are"):
            one.engine.select(state, np.array(wrong, np.int64))


@pytest.mark.parametrize(
    "options", [{"cuda_graphs": 1}, {"engine": 5}, {"trust_engine": "yes"}, {"precision": "fp16"}]
)
def test_options_are_named(opened, options):
    with pytest.raises(UnsupportedOptionError, match=next(iter(options))):
        opened(**options)


def test_without_an_artefact_and_with_threads(opened, gpu, workshop):
    from lmopt.backends.tensorrt.engine import open_engine
    from lmopt.contracts import EngineRequest

    facts = workshop.subject("llama", "onnx", "float32").facts
    with pytest.raises(ArtifactNotFoundError, match="Exporter"):
        open_engine(EngineRequest(facts=facts, device="cuda"))
    with pytest.raises(UnsupportedOptionError, match="threads=2"):
        open_engine(EngineRequest(facts=facts, device="cuda", threads=2))


def test_another_device_or_dtype_is_refused(opened, workshop):
    from lmopt.backends.tensorrt.engine import open_engine
    from lmopt.contracts import EngineRequest

    subject = workshop.subject("llama", "onnx", "float32")
    with pytest.raises(DeviceError, match=r"cuda:1.*this machine has 1: cuda:0 \(Fake GPU\)"):
        open_engine(EngineRequest(facts=subject.facts, artifact=subject.artifact, device="cuda:1"))
    request = EngineRequest(facts=subject.facts, artifact=subject.artifact, device="cuda", dtype="float16")
    with pytest.raises(UnsupportedError, match="computes in float32; asked for float16"):
        open_engine(request)


@pytest.mark.parametrize("columns", ["all", "last", "unequal"])
def test_logits_in_bfloat16_come_to_the_host_as_they_are(opened, rows, gpu, columns):
    """ONNX Runtime computes in float32 here; what goes in and out of the engine is rounded to bfloat16."""
    gpu.dtype = "bfloat16"
    one = opened()
    assert one.engine.report().dtype == "bfloat16"
    texts = rows(9, 4 if columns == "unequal" else 9)
    given, state = read(one.engine, texts, last_only=columns != "all")
    for text, logits in zip(texts, given, strict=True):
        assert logits.dtype == np.float32
        # Eight bits of mantissa: the lower half of each float32 is zero.
        assert not (logits.view(np.uint32) & 0xFFFF).any()
        np.testing.assert_allclose(logits, one.subject.reference(text)[-len(logits) :], rtol=2**-7, atol=1e-3)
    (tail,) = rows(1, seed=5)
    given, _ = read(one.engine, [tail, tail], state, last_only=True)
    for text, logits in zip(texts, given, strict=True):
        expected = one.subject.reference(np.concatenate([text, tail]))[-1:]
        np.testing.assert_allclose(logits, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("used", "capacity", "most", "slots"),
    [
        (0, 0, 128, 0),
        (1, 0, 128, 64),
        (64, 0, 128, 64),
        (65, 0, 128, 128),
        (100, 0, 110, 110),
        (111, 0, 110, 111),
        (10, 100, 4096, 128),
        (10, 4000, 4096, 1152),
        (1030, 0, 4096, 1152),
    ],
)
def test_slots(used, capacity, most, slots):
    assert slots_for(used, capacity, most=most) == slots
