"""Seen on a GPU, or not said: what only a device can show. Skipped without one, unless --require-gpu is given.

    python -m pytest -m gpu --require-gpu --gpu-report gpu-report.json

writes what was found, with the machine, the versions, every outcome and every figure.
"""

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmopt.accelerators import cuda
from lmopt.errors import DeviceError
from lmopt.evaluation import measure_speed
from lmopt.model import Model
from lmopt.runtime import Runtime
from lmopt.testing import models

pytestmark = pytest.mark.gpu
DTYPES = ("float32", "float16", "bfloat16")
LIMITS = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 3e-1}
"""Of single logits, which spread over a few units; the conformance kit has finer limits, of distributions."""
RUNS = 1000
PROMPT = list(range(5, 21))


@pytest.fixture
def artifact_of(workshop):
    """Give the tiny Llama, exported once in each compute type."""
    return lambda dtype: workshop.subject("llama", "onnx", dtype).artifact


@pytest.fixture
def tensorrt(artifact_of):
    """Open the tiny Llama on TensorRT."""
    opened = []

    def get(dtype: str = "float32", **options):
        opened.append(Runtime(artifact_of(dtype), backend="tensorrt", device="cuda", **options))
        return opened[-1]

    yield get
    for one in opened:
        one.close()


def step(engine, ids, state, **options):
    ids = np.asarray([ids])
    return engine.forward(ids, np.array([ids.shape[1]]), state, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_those_of_onnxruntime_on_the_cpu(artifact_of, tensorrt, gpu_figures, dtype):
    reference = artifact_of("float32" if dtype == "bfloat16" else dtype)
    with Runtime(reference, backend="onnxruntime") as cpu:
        expected = cpu.logits(PROMPT)
    given = tensorrt(dtype).logits(PROMPT)
    gpu_figures[f"largest difference of logits, {dtype}"] = float(np.abs(given - expected).max())
    np.testing.assert_allclose(given, expected, atol=LIMITS[dtype], rtol=LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_one_by_one_are_tokens_at_once(tensorrt, dtype):
    engine = tensorrt(dtype).engine
    whole, _ = step(engine, PROMPT, engine.begin(1))
    given, state = step(engine, PROMPT[:3], engine.begin(1))
    np.testing.assert_allclose(given[0], whole[0, :3], atol=LIMITS[dtype], rtol=LIMITS[dtype])
    for place in range(3, len(PROMPT)):
        given, state = step(engine, PROMPT[place : place + 1], state)
        np.testing.assert_allclose(given[0, 0], whole[0, place], atol=LIMITS[dtype], rtol=LIMITS[dtype])


def test_64_greedy_tokens_are_those_of_eager_float32(tensorrt):
    # An end that both know, and that cannot come before the last token.
    how = {"max_new_tokens": 64, "min_new_tokens": 64, "eos_token_id": 2, "do_sample": False}
    with Runtime(Model.from_module(models.tiny_llama()), backend="torch") as eager:
        expected = eager.generate([PROMPT], **how)[0].token_ids
    given = tensorrt().generate([PROMPT], **how)[0].token_ids
    assert len(given) == 64
    assert given == expected


@pytest.mark.real_model
def test_64_greedy_tokens_of_smollm2(smollm2: Path, gpu_figures):
    model = Model.from_pretrained(smollm2, dtype="float32")
    with Runtime(model, backend="torch") as eager:
        expected = eager.generate("The Moon is", max_new_tokens=64, do_sample=False).token_ids
    with Runtime(model, backend="tensorrt", device="cuda") as runtime:
        assert runtime.generate("The Moon is", max_new_tokens=64, do_sample=False).token_ids == expected
        gpu_figures["SmolLM2 on TensorRT"] = runtime.report().actual.details


def test_profiles_are_switched_there_and_back(tensorrt):
    runtime = tensorrt()
    engine = runtime.engine
    expected = runtime.logits(PROMPT)
    _, state = step(engine, PROMPT[:5], engine.begin(1))
    _, state = step(engine, PROMPT[5:6], state)
    _, state = step(engine, PROMPT[6:12], state)
    given, _ = step(engine, PROMPT[12:13], state)
    np.testing.assert_allclose(given[0, 0], expected[12], rtol=1e-3, atol=1e-3)


def test_a_replayed_graph_gives_the_same_bits(tensorrt, gpu_figures):
    results = []
    for graphs in (True, False):
        engine = tensorrt(cuda_graphs=graphs).engine
        logits, state = step(engine, PROMPT, engine.begin(1, capacity=60))
        found = [logits[0, -1]]
        for token in range(30):
            logits, state = step(engine, [5 + token], state)
            found.append(logits[0, 0])
        results.append(np.stack(found))
        gpu_figures[f"graphs, cuda_graphs={graphs}"] = engine.report().details["cuda_graphs"]
    np.testing.assert_array_equal(*results)


def test_graphs_are_captured_by_somebody(tensorrt):
    engine = tensorrt().engine
    _, state = step(engine, PROMPT, engine.begin(1, capacity=60))
    for token in range(10):
        _, state = step(engine, [5 + token], state)
    found = engine.report().details["cuda_graphs"]
    assert found["by"] == "TensorRT" or (found["replayed"] > 0 and not found["refused"]), found


def test_an_engine_is_found_again_and_a_damaged_one_built_again(tensorrt, monkeypatch, tmp_path):
    monkeypatch.setenv("LMOPT_CACHE", str(tmp_path))
    runtime = tensorrt()
    expected = runtime.logits(PROMPT)
    assert not runtime.report().actual.details["plan"]["from_cache"]
    again = tensorrt()
    assert again.report().actual.details["plan"]["from_cache"]
    np.testing.assert_allclose(again.logits(PROMPT), expected, rtol=1e-4, atol=1e-4)
    plan = max((one for one in tmp_path.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 0xFF
    plan.write_bytes(bytes(data))
    with pytest.warns(RuntimeWarning, match="compiled engine in the cache"):
        healed = tensorrt()
    assert not healed.report().actual.details["plan"]["from_cache"]
    np.testing.assert_allclose(healed.logits(PROMPT), expected, rtol=1e-4, atol=1e-4)


def test_1000_runs_leave_no_memory_behind(tensorrt, gpu_figures):
    from lmopt.backends.tensorrt import cuda as calls

    engine = tensorrt().engine
    free = []
    for _ in range(RUNS):
        _, state = step(engine, PROMPT, engine.begin(1))
        step(engine, [7], state)
        free.append(calls.free_memory())
    gpu_figures[f"bytes lost in {RUNS} runs"] = free[10] - free[-1]
    assert free[10] - free[-1] < 8 << 20


def test_two_threads(tensorrt):
    runtime = tensorrt()
    prompts = [PROMPT, PROMPT[::-1]]
    expected = [runtime.logits(one) for one in prompts]
    wrong: list[Any] = []

    def work(prompt, logits):
        for _ in range(50):
            found = runtime.logits(prompt)
            if not np.allclose(found, logits, rtol=1e-3, atol=1e-3):
                wrong.append(np.abs(found - logits).max())

    threads = [threading.Thread(target=work, args=pair) for pair in zip(prompts, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_device_that_is_not_there(tensorrt, artifact_of):
    beyond = f"cuda:{len(cuda().devices)}"
    with pytest.raises(DeviceError, match=beyond):
        Runtime(artifact_of("float32"), backend="tensorrt", device=beyond)


def test_onnxruntime_on_cuda_is_on_cuda(artifact_of, gpu_figures):
    with Runtime(artifact_of("float32"), backend="onnxruntime") as cpu:
        expected = cpu.logits(PROMPT)
    with Runtime(artifact_of("float32"), backend="onnxruntime", device="cuda") as runtime:
        np.testing.assert_allclose(runtime.logits(PROMPT), expected, rtol=1e-3, atol=1e-3)
        gpu_figures["nodes of ONNX Runtime on CUDA"] = runtime.report().actual.details["nodes"]


def test_torch_on_cuda_does_not_round(gpu_figures):
    model = Model.from_module(models.tiny_lstm())
    with Runtime(model, backend="torch") as cpu, Runtime(model, backend="torch", device="cuda") as gpu:
        difference = float(np.abs(cpu.logits(PROMPT) - gpu.logits(PROMPT)).max())
    gpu_figures["torch LSTM, cuda against cpu"] = difference
    assert difference < 1e-5  # TF32 would be off by 1e-3


@pytest.mark.real_model
def test_speed_beside_the_others(smollm2: Path, gpu_figures):
    """Figures, nothing asserted: decoding SmolLM2 in float16 by each engine that this machine has."""
    model = Model.from_pretrained(smollm2, dtype="float16")
    table: dict[str, Any] = {}
    for backend in ("torch", "onnxruntime", "tensorrt"):
        try:
            with Runtime(model, backend=backend, device="cuda") as runtime:
                table[backend] = speed_of(runtime, 128)
        except Exception as error:
            table[backend] = f"{type(error).__name__}: {error}"
    table["torch.compile"] = _compiled(model)
    gpu_figures["tokens per second, SmolLM2 float16, 128 + 128"] = table


def speed_of(runtime: Runtime, tokens: int) -> dict[str, Any]:
    """Measure a prompt of so many tokens, and as many new ones."""
    return asdict(measure_speed(runtime.engine, prompt_tokens=tokens, new_tokens=tokens, rounds=5))


def _compiled(model: Model) -> dict[str, float] | str:
    """Decode with transformers' static cache and torch.compile, as its documentation does."""
    import torch

    try:
        module = model.module.to("cuda")
        ids = torch.randint(5, 1000, (1, 128), device="cuda")
        settings = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False}
        settings["cache_implementation"] = "static"
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            module.generate(ids, **settings)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {"prefill and decode": 128 / sorted(times)[2]}
