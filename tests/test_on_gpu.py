"""Seen on a GPU, or not said: PyTorch and ONNX Runtime on CUDA, held against PyTorch on the CPU.

    python -m pytest -m gpu --require-gpu --gpu-report gpu-report.json

Skipped without a GPU, unless --require-gpu is given. What TensorRT shows there stands beside its other tests.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmopt import Compressor, Exporter, Model, Runtime
from lmopt.accelerators import cuda
from lmopt.backends.onnxruntime.session import installed_wheels
from lmopt.compression import Quantize
from lmopt.errors import DeviceError, UnsupportedOptionError
from lmopt.evaluation import compare_speed
from lmopt.testing import parametrize_backend_checks
from lmopt.testing.models import tiny_llama, tiny_lstm
from lmopt.testing.plan import PlannedCheck
from lmopt.testing.workshop import ENCODER_MODELS, MODELS, missing_device
from lmopt.training import TrainingConfig, train

pytestmark = pytest.mark.gpu

NO_MODULES = "a torch.export program is one graph: it has no modules whose outputs could be shown"
KIT = (*MODELS, *ENCODER_MODELS)
ENGINES = ("torch", "onnxruntime")
NEW_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "Q",
    "In 1905, Albert Einstein published four papers which",
    "La Lune est",
)


def needs(engine: str) -> None:
    """Skip an engine whose installed build knows no GPU."""
    if engine == "onnxruntime" and installed_wheels() != ["onnxruntime-gpu"]:
        pytest.skip(f"the wheel for GPUs is not installed: {installed_wheels()}")


@parametrize_backend_checks(
    "torch",
    models=KIT,
    devices=("cuda",),
    # Without a GPU no check is planned that could be expected to fail.
    expected_failures={}
    if missing_device("cuda", live=True)
    else {"taps_show_values[*-torch.export-*]": NO_MODULES},
)
def test_torch_conforms(check: PlannedCheck) -> None:
    check()


@parametrize_backend_checks("onnxruntime", models=KIT, devices=("cuda",))
def test_onnxruntime_conforms(check: PlannedCheck) -> None:
    needs("onnxruntime")
    check()


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model.from_pretrained(smollm2, dtype="float32")


@pytest.fixture(scope="module")
def on_cpu(model: Model) -> Iterator[Runtime]:
    with Runtime(model, backend="torch") as runtime:
        yield runtime


@pytest.fixture(scope="module", params=ENGINES)
def on_gpu(
    request: pytest.FixtureRequest, model: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runtime]:
    needs(request.param)
    source: Any = model
    if request.param == "onnxruntime":
        source = Exporter("onnx").export(model, tmp_path_factory.mktemp("gpu") / "float32")
    with Runtime(source, backend=request.param, device="cuda") as runtime:
        yield runtime


@pytest.mark.real_model
def test_greedy_tokens_are_the_cpus_alone_and_in_a_batch(
    model: Model,
    on_cpu: Runtime,
    on_gpu: Runtime,
    assert_greedy: Callable[[Any, list[int], list[int]], None],
) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    together = on_gpu.generate(list(PROMPTS), **options)
    tokenizer = on_cpu.tokenizer
    assert tokenizer is not None
    for prompt, one in zip(PROMPTS, together, strict=True):
        ids = tokenizer.encode(prompt)
        for tokens in (one.token_ids, on_gpu.generate(prompt, **options).token_ids):
            assert len(tokens) == NEW_TOKENS
            assert_greedy(model.module, ids, list(tokens))


@pytest.mark.real_model
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 4}, {"do_sample": True, "seed": 3, "temperature": 0.8, "top_k": 40}],
    ids=["beams", "sampled"],
)
def test_other_ways_give_the_cpus_tokens(on_cpu: Runtime, on_gpu: Runtime, how: dict[str, Any]) -> None:
    options = {"max_new_tokens": 24, "eos_token_id": None, **how}
    expected = [on_cpu.generate(prompt, **options).token_ids for prompt in PROMPTS[:3]]
    assert [on_gpu.generate(prompt, **options).token_ids for prompt in PROMPTS[:3]] == expected


@pytest.mark.real_model
def test_perplexity_is_the_cpus(on_gpu: Runtime, wiki_text: str, gpu_figures: dict[str, Any]) -> None:
    found = on_gpu.perplexity(wiki_text[:40_000], context=512, stride=512, tokens=4096)
    gpu_figures[f"perplexity of SmolLM2 float32, {on_gpu.backend}"] = found.value
    assert found.value == pytest.approx(21.440, abs=0.01)


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_half_types_are_near(
    engine: str, dtype: str, smollm2: Path, wiki_text: str, tmp_path: Path, gpu_figures: dict[str, Any]
) -> None:
    needs(engine)
    if engine == "onnxruntime" and dtype == "bfloat16":
        pytest.skip("backend 'onnxruntime' does not compute in bfloat16, and says so")
    source: Any = Model.from_pretrained(smollm2, dtype=dtype)
    if engine == "onnxruntime":
        source = Exporter("onnx").export(source, tmp_path / dtype)
    with Runtime(source, backend=engine, device="cuda") as runtime:
        assert runtime.report().actual.dtype == dtype
        found = runtime.perplexity(wiki_text[:40_000], context=512, stride=512, tokens=4096).value
    gpu_figures[f"perplexity of SmolLM2 {dtype}, {engine}"] = found
    assert found == pytest.approx(21.440, rel=0.01)


@pytest.mark.real_model
@pytest.mark.filterwarnings("ignore::lmopt.compressor.LossWarning")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_quantized_tokens_are_the_cpus(
    engine: str, bits: int, model: Model, tmp_path: Path, gpu_figures: dict[str, Any]
) -> None:
    needs(engine)
    small = Compressor([Quantize(bits=bits, group_size=64)]).compress(
        model, texts=["One two three four five. " * 40]
    )
    with Runtime(small, backend="torch") as runtime:
        expected = [runtime.generate(one, max_new_tokens=24).token_ids for one in PROMPTS[:3]]
    source: Any = small
    if engine == "onnxruntime":
        source = Exporter("onnx").export(small, tmp_path / "small")
    with Runtime(source, backend=engine, device="cuda") as runtime:
        given = [runtime.generate(one, max_new_tokens=24).token_ids for one in PROMPTS[:3]]
        gpu_figures[f"{bits} bits, {engine}"] = runtime.report().actual.details
    assert given == expected


@pytest.mark.real_model
def test_keys_and_values_in_8_bits(model: Model, on_cpu: Runtime) -> None:
    with (
        Runtime(model, backend="torch", kv_cache_dtype="int8") as cpu,
        Runtime(model, backend="torch", device="cuda", kv_cache_dtype="int8") as gpu,
    ):
        for prompt in PROMPTS[:3]:
            expected = cpu.generate(prompt, max_new_tokens=16, eos_token_id=None).token_ids
            assert gpu.generate(prompt, max_new_tokens=16, eos_token_id=None).token_ids == expected


def test_training_learns_there_what_it_learns_on_the_cpu(gpu_figures: dict[str, Any]) -> None:
    ids = np.tile(np.arange(5, 37), 40)
    for name, make in (("llama", tiny_llama), ("lstm", tiny_lstm)):
        losses = {}
        for device in ("cpu", "cuda"):
            how = TrainingConfig(
                learning_rate=0.01,
                max_steps=30,
                block_size=32,
                per_device_train_batch_size=4,
                seed=1,
                device=device,
            )
            losses[device] = train(
                Model.from_module(make()), ids, evaluation=ids[:333], config=how
            ).perplexity
        gpu_figures[f"perplexity after 30 steps, {name}"] = losses
        assert losses["cuda"] < 5  # of 100 tokens or more before
        assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_training_in_half_types(half: str) -> None:
    ids = np.tile(np.arange(5, 37), 40)
    how = TrainingConfig(
        learning_rate=0.01,
        max_steps=60,
        block_size=32,
        per_device_train_batch_size=4,
        device="cuda",
        **{half: True},
    )
    result = train(Model.from_module(tiny_llama()), ids, evaluation=ids[:333], config=how)
    assert result.perplexity is not None
    assert result.perplexity < 5


@pytest.mark.real_model
def test_no_memory_is_left_behind(model: Model, gpu_figures: dict[str, Any]) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with Runtime(model, backend="torch", device="cuda") as runtime:
        held = []
        for _ in range(20):
            runtime.generate(list(PROMPTS), max_new_tokens=8)
            gc.collect()
            held.append(torch.cuda.memory_allocated())
        gpu_figures["bytes held by torch over 20 requests"] = held
        assert held[-1] == held[4]
    del runtime
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("engine", ENGINES)
def test_a_device_that_is_not_there(engine: str) -> None:
    needs(engine)
    beyond = f"cuda:{len(cuda().devices)}"
    with pytest.raises(DeviceError, match=beyond):
        Runtime(Model.from_module(tiny_llama()), backend=engine, device=beyond)


def test_rounding_to_tf32_is_asked_for() -> None:
    ids = list(range(5, 21))
    with (
        Runtime(Model.from_module(tiny_lstm()), backend="torch") as cpu,
        Runtime(Model.from_module(tiny_lstm()), backend="torch", device="cuda") as exact,
    ):
        assert np.abs(cpu.logits(ids) - exact.logits(ids)).max() < 1e-5
    with pytest.raises(UnsupportedOptionError, match="cuda only"):
        Runtime(Model.from_module(tiny_lstm()), backend="torch", allow_tf32=True)


@pytest.mark.real_model
@pytest.mark.parametrize("batch", [1, 32])
def test_speed(on_gpu: Runtime, batch: int, gpu_figures: dict[str, Any]) -> None:
    """Figures, nothing asserted; `benchmarks/decode.py --device cuda` compares with transformers' own loop."""
    found = compare_speed({"": on_gpu.engine}, prompt_tokens=128, new_tokens=64, rounds=3, batch=batch)[""]
    gpu_figures[f"speed of SmolLM2 float32, {on_gpu.backend} {version('torch')}, batch {batch}"] = asdict(
        found
    )
