"""What the kit cannot know: which of OpenVINO's habits are off, and what becomes of the graph."""

import subprocess
import sys

import numpy as np
import pytest
from lmopt_openvino.arrays import ArrayEngine
from lmopt_openvino.cached import CachedEngine

from lmopt.contracts import EngineRequest
from lmopt.errors import (
    ArtifactNotFoundError,
    UnsupportedError,
    UnsupportedOptionError,
    UnsupportedPrecisionError,
)
from lmopt.registry import backends


def open_engine(subject, **asked):
    factory = backends.load("openvino")
    return factory(EngineRequest(facts=subject.facts, artifact=subject.artifact, **{"threads": 1, **asked}))


@pytest.fixture(scope="module")
def llama(workshop):
    return workshop.subject("llama", "onnx", "float32")


@pytest.fixture(scope="module")
def halved(workshop):
    return workshop.subject("llama", "onnx", "bfloat16")


@pytest.mark.parametrize(
    ("model", "engine", "operator"),
    [
        ("llama", CachedEngine, "ScaledDotProductAttention"),
        ("gpt", ArrayEngine, "Subgraph"),  # its mask is no sum, so the attention is left to OpenVINO
        ("lstm", ArrayEngine, "RNNSeq"),
    ],
)
def test_attention_that_is_recognised_becomes_one_operator(workshop, model, engine, operator):
    one = open_engine(workshop.subject(model, "onnx", "float32"))
    assert type(one) is engine
    layers = [layer["layerType"] for layer in one._graph.layers]
    assert operator in layers
    assert layers.count("ScaledDotProductAttention") == (2 if model == "llama" else 0)
    one.close()


def test_any_order_of_calls_gives_the_same_rows(llama):
    """Lazy selection, hidden slots and the cutting of them, in long random orders, against eager rows."""
    rng = np.random.default_rng(7)
    engine = open_engine(llama)
    for _ in range(4):
        rows = [np.zeros(0, np.int64) for _ in range(3)]
        state = engine.begin(3)
        for _ in range(14):
            width = int(rng.integers(1, 5))
            new = rng.integers(1, width + 1, len(rows))
            ids = rng.integers(0, llama.facts.vocab_size, (len(rows), width))
            logits, state = engine.forward(ids, new, state, last_only=True)
            rows = [
                np.concatenate([row, line[:count]]) for row, line, count in zip(rows, ids, new, strict=True)
            ]
            np.testing.assert_allclose(logits[:, 0], [llama.reference(row)[-1] for row in rows], atol=2e-5)
            what = rng.integers(0, 5)
            if what == 0:
                kept = np.array([int(rng.integers(max(0, len(row) - 4), len(row) + 1)) for row in rows])
                state = engine.rewind(state, kept)
                rows = [row[:count] for row, count in zip(rows, kept, strict=True)]
            elif what == 1:
                picked = rng.integers(0, len(rows), int(rng.integers(1, 5)))
                state, rows = engine.select(state, picked), [rows[index] for index in picked]
            elif what == 2 and len(rows) < 5:
                other = rng.integers(0, llama.facts.vocab_size, (1, 3))
                _, fresh = engine.forward(other, np.array([3]), engine.begin(1))
                state, rows = engine.join([state, fresh]), [*rows, other[0]]
    engine.close()


def test_slots_that_no_row_sees_are_cut_out(llama):
    engine = open_engine(llama)
    text = np.arange(90)[None] % llama.facts.vocab_size
    _, state = engine.forward(text, np.array([90]), engine.begin(1))
    state = engine.rewind(state, np.array([5]))
    assert state.book.mask.shape[1] == 5
    logits, _ = engine.forward(text[:, 5:6], np.array([1]), state)
    np.testing.assert_allclose(logits[0], llama.reference(text[0, :6])[-1:], atol=2e-5)


def test_float32_is_float32(llama):
    """OpenVINO's own default on a CPU with bfloat16 units rounds a float32 model."""
    engine = open_engine(llama)
    assert engine.report().dtype == "float32"
    assert not {"bf16", "f16"} & {layer["runtimePrecision"] for layer in engine._graph.layers}
    compiled = engine._graph.compiled()
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert str(compiled.get_property("KV_CACHE_PRECISION")) == "<Type: 'float32'>"


def test_bfloat16_weights_are_not_taken_for_float32(halved):
    """There the hint says float32 and the layers say bfloat16."""
    with pytest.raises(UnsupportedPrecisionError, match="asked for float32"):
        open_engine(halved, dtype="float32")


def test_bfloat16_can_be_asked_for_by_name(llama):
    row = np.arange(20)[None]
    engine = open_engine(llama, dtype="bfloat16")
    assert engine.report().dtype == "bfloat16"
    _, state = engine.forward(row[:, :19], np.array([19]), engine.begin(1))
    logits, _ = engine.forward(row[:, 19:], np.array([1]), state)
    lost = abs(logits[0, -1] - llama.reference(row[0])[-1]).max()
    assert 1e-4 < lost < 0.2  # it was asked for, and it is really done
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic_quantization_group_size": -1},
        {"dynamic_quantization_group_size": True},
        {"pinning": 1},
    ],
)
def test_impossible_options_are_refused(llama, options):
    with pytest.raises(UnsupportedOptionError, match=next(iter(options))):
        open_engine(llama, options=options)


def test_no_thread_is_refused(llama):
    with pytest.raises(UnsupportedOptionError, match="threads is 0"):
        open_engine(llama, threads=0)


@pytest.mark.parametrize("device", ["gpu", "npu", "cuda"])
def test_other_devices_are_refused(llama, device):
    with pytest.raises(UnsupportedError, match=device):
        open_engine(llama, device=device)


def test_another_dialect_is_refused_with_the_way_out(workshop):
    """What ONNX Runtime's own dialect holds, OpenVINO cannot read; the kit runs on the portable one only."""
    fused = workshop.subject("llama", "onnx", "float32", "onnxruntime")
    assert fused.artifact.manifest["formats"]["onnx"]["target"] == "onnxruntime"
    with pytest.raises(UnsupportedError, match=r"'onnxruntime'. Export .*target='portable'"):
        open_engine(fused)


def test_a_model_that_was_not_exported_is_refused_with_the_way_out(llama):
    with pytest.raises(ArtifactNotFoundError, match=r"lmopt\.Exporter"):
        backends.load("openvino")(EngineRequest(facts=llama.facts))


def test_nothing_is_reported_home(tmp_path):
    """`import openvino` runs its telemetry package; this one would leave a trace."""
    (tmp_path / "openvino_telemetry").mkdir()
    (tmp_path / "openvino_telemetry" / "__init__.py").write_text(
        f"open({str(tmp_path / 'trace')!r}, 'w').close()\n"
    )
    code = "import lmopt_openvino.engine, sys; assert 'openvino_telemetry' not in sys.modules"
    environment = {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "intel").exists()


def test_neither_torch_nor_onnx_is_imported(llama):
    code = (
        "import sys, numpy as np\n"
        "from lmopt.artifact import Artifact\n"
        "from lmopt.contracts import EngineRequest\n"
        "from lmopt.registry import backends\n"
        "artifact = Artifact.open(sys.argv[1])\n"
        "engine = backends.load('openvino')(EngineRequest(facts=artifact.facts, artifact=artifact))\n"
        "engine.forward(np.zeros((1, 3), np.int64), np.array([3]), engine.begin(1))\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", code, str(llama.artifact.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
