"""Two graphs of an encoder-decoder: what is in them, that they say the same, and that the gate would notice."""

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lmopt
from lmopt.backends.onnxruntime.encoder import Encoder
from lmopt.compression import Quantize
from lmopt.errors import CorruptArtifactError, ParityError, UnsupportedError, UnsupportedOptionError
from lmopt.evaluation import locate
from lmopt.gate import verify
from lmopt.registry import exporters
from lmopt.testing.seq2seq import SEQ2SEQ_SOURCE, tiny_bart, tiny_seq2seq, tiny_t5

SOURCES = [[5, 6, 7, 8, 9, 10, 11], [40, 41, 42], [77, 3, 50, 51, 52]]


@pytest.fixture(scope="module")
def bart() -> lmopt.Model:
    return lmopt.Model.from_module(tiny_bart())


@pytest.fixture(scope="module", params=["portable", "onnxruntime"])
def folder(
    bart: lmopt.Model, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    folder = tmp_path_factory.mktemp("bart") / "out"
    lmopt.Exporter("onnx", target=request.param).export(bart, folder)
    return folder


def test_the_source_is_read_in_one_graph_only(folder: Path) -> None:
    encoder, decoder = (onnx.load(str(folder / f"{part}_model.onnx")) for part in ("encoder", "decoder"))
    kinds = [f"{layer}.encoder.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert [one.name for one in encoder.graph.input] == ["input_ids", "attention_mask"]
    assert [one.name for one in encoder.graph.output] == [f"present.{kind}" for kind in kinds]
    names = {one.name for one in decoder.graph.input}
    assert {"input_ids", "encoder_attention_mask", *(f"past_key_values.{kind}" for kind in kinds)} <= names
    assert {one.name for one in decoder.graph.output} == {
        "logits",
        *(f"present.{layer}.decoder.{kind}" for layer in range(2) for kind in ("key", "value")),
    }
    # No weight that makes keys and values of the encoder's outputs is left in what runs for each token, and of
    # the decoder nothing but these is in what runs once.
    weights = {one.name for one in decoder.graph.initializer}
    assert not [name for name in weights if "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name]
    assert [name for name in weights if "encoder_attn.q_proj" in name]
    once = {one.name for one in encoder.graph.initializer}
    assert not [name for name in once if "model.decoder.layers" in name and "encoder_attn" not in name]
    assert [name for name in once if "model.decoder.layers.0.encoder_attn.k_proj" in name]
    # ONNX Runtime's own operators: two layers read the source, two attend to themselves and to it.
    own = [
        Counter(node.op_type for node in graph.graph.node if node.domain == "com.microsoft")
        for graph in (encoder, decoder)
    ]
    softmax = [sum(node.op_type == "Softmax" for node in graph.graph.node) for graph in (encoder, decoder)]
    if lmopt.Artifact.open(folder).manifest["formats"]["onnx"]["target"] == "portable":
        assert (own, softmax) == ([{}, {}], [2, 4])
    else:
        # The head multiplies by the embedding as it lies.
        assert own == [
            {"MultiHeadAttention": 2},
            {"MultiHeadAttention": 4, "FusedMatMul": 1},
        ]
        assert softmax == [0, 0]
        # Attention keeps the cache, and needs no mask to be written down.
        kinds = Counter(node.op_type for node in decoder.graph.node)
        assert not set(kinds) & {"CumSum", "LessOrEqual", "Where", "Expand"}
        # One shape, in which all rows of a source ask it together.
        assert kinds["Concat"] == 1
        axes = {
            one.name: [axis.dim_param for axis in one.type.tensor_type.shape.dim]
            for one in decoder.graph.input
        }
        assert axes["encoder_attention_mask"] == ["source_batch_size", "encoder_sequence_length"]
        assert axes["past_key_values.0.encoder.key"][0] == "source_batch_size"
        assert axes["past_key_values.0.decoder.key"][0] == axes["input_ids"][0] == "batch_size"
        tables = [one for one in decoder.graph.initializer if set(one.dims) == {99, 32}]
        assert len(tables) == 1


def test_the_manifest_tells_the_cases(folder: Path) -> None:
    manifest = lmopt.Artifact.open(folder).manifest
    cases = manifest["parity"]["onnx"]["cases"]
    assert {
        "encoder",
        "sources",
        "prefill",
        "decode",
        "several",
        "batch-left",
        "select/join",
        "greedy",
    } <= set(cases)
    assert "fallback" not in manifest["formats"]["onnx"]
    assert lmopt.Artifact.open(folder).facts.source.kind == "ids"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "length_penalty": 1.5},
        {"do_sample": True, "seed": 4},
        {"decoder_input_ids": [7, 9]},
    ],
    ids=["greedy", "beams", "sampling", "prompt"],
)
def test_same_tokens_as_eager(bart: lmopt.Model, folder: Path, options: dict[str, Any]) -> None:
    found = []
    for source, backend in ((bart, "torch"), (folder, "onnxruntime")):
        with lmopt.Runtime(source, backend=backend) as rt:
            assert rt.report().facts.source == bart.facts.source
            found.append([one.token_ids for one in rt.generate(SOURCES, max_new_tokens=10, **options)])
    assert found[0] == found[1]


def test_deployment_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys, lmopt\n"
        f"with lmopt.Runtime({str(folder)!r}) as rt:\n"
        "    print(rt.backend, len(rt.generate([5, 6, 7], max_new_tokens=4).token_ids))\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["onnxruntime", "4"], done.stderr


def damaged(model: lmopt.Model, path: str) -> lmopt.Model:
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        module.get_submodule(path).weight.mul_(1.05)
    return lmopt.Model.from_module(module)


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.encoder.layers.0.self_attn.q_proj", "model.encoder.layers.0"),
        ("model.encoder.layers.1.fc1", "model.encoder.layers.1"),
        # The encoder's graph computes it, and the decoder's what becomes of it.
        ("model.decoder.layers.1.encoder_attn.v_proj", "model.decoder.layers.1"),
        ("model.decoder.layers.0.encoder_attn.q_proj", "model.decoder.layers.0"),
        ("model.decoder.layers.1.fc2", "model.decoder.layers.1"),
        (None, None),
    ],
)
def test_where_a_graph_and_its_model_part_is_found(
    bart: lmopt.Model, folder: Path, path: str | None, block: str | None
) -> None:
    other = bart if path is None else damaged(bart, path)
    with (
        lmopt.Runtime(other, backend="torch") as ours,
        lmopt.Runtime(folder, backend="onnxruntime") as theirs,
    ):
        found = locate(ours.engine, theirs.engine, np.arange(3, 20), source=np.array(SOURCES[0]))
    assert found.block == block
    assert path is None or path in found.suspects
    assert found.errors


def test_an_engine_that_shows_nothing_after_a_source_is_told_apart(bart: lmopt.Model) -> None:
    class Older:
        def tap_names(self) -> list[str]:
            return []

        def taps(self, input_ids: Any, names: Any) -> Any:
            return {}

    with (
        lmopt.Runtime(bart, backend="torch") as ours,
        pytest.raises(UnsupportedError, match="parameter source"),
    ):
        locate(ours.engine, Older(), np.arange(3, 20), source=np.array(SOURCES[0]))


def test_a_failed_gate_names_the_block(bart: lmopt.Model, folder: Path) -> None:
    artifact = lmopt.Artifact.open(folder)
    with pytest.raises(
        ParityError, match=r"first difference in model\.encoder\.layers\.1, operator model\.enc"
    ):
        verify(
            damaged(bart, "model.encoder.layers.1.fc1"), exporters.spec("onnx"), folder, artifact.manifest,
            tolerance=None, progress=lambda done, total: None,
        )  # fmt: skip


def test_the_gate_notices_a_wrong_source(
    bart: lmopt.Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Encoder.run

    def wrong(self: Encoder, inputs: Any, mask: Any) -> Any:
        # As if the encoder saw the padding behind shorter sources.
        return right(self, inputs, np.ones_like(mask))

    def examine() -> Any:
        artifact = lmopt.Artifact.open(folder)
        spec = exporters.spec("onnx")
        return verify(
            bart, spec, folder, artifact.manifest, tolerance=None, progress=lambda done, total: None
        )

    assert examine().ok
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "run", wrong)
        with pytest.raises(ParityError) as caught:
            examine()
    failed = {case.case for case in caught.value.report.cases if not case.ok}
    assert {"encoder", "sources"} <= failed
    assert "prefill" not in failed


def test_what_is_not_there_yet_is_refused(bart: lmopt.Model, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="models without an encoder so far"):
        lmopt.Exporter("onnx", target="onnxruntime", kv_cache_dtype="int8").export(bart, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="one graph, and an encoder-decoder takes two"):
        lmopt.Exporter("torch.export").export(bart, tmp_path / "out")
    with pytest.raises(UnsupportedOptionError, match="models without an encoder so far"):
        lmopt.Runtime(bart, kv_cache_dtype="int8")
    assert not list(tmp_path.iterdir())


def test_quantized_products_are_one_operator(bart: lmopt.Model, tmp_path: Path) -> None:
    step = Quantize(bits=8, group_size=16, embedding=8, head=8)
    small = lmopt.Compressor([step]).compress(bart, sources=SOURCES)
    exporter = lmopt.Exporter("onnx", target="onnxruntime", accuracy_level=4)
    record = exporter.export(small, tmp_path / "out").manifest["formats"]["onnx"]
    assert {"MatMulNBits", "MultiHeadAttention", "GatherBlockQuantized"} <= set(record["operators"])
    assert record["accuracy_level"] == 4
    with lmopt.Runtime(small) as eager, lmopt.Runtime(tmp_path / "out") as exported:
        first, second = (rt.logits([5, 6, 7], sources=SOURCES[0]) for rt in (eager, exported))
        with pytest.raises(UnsupportedOptionError, match="not for encoder-decoders"):
            lmopt.Runtime(tmp_path / "out", deterministic=True)
    assert np.abs(first - second).max() < 0.1 * np.abs(first).max()


def test_half_types_are_written_portable(tmp_path: Path) -> None:
    model = lmopt.Model.from_module(tiny_t5().half())
    record = lmopt.Exporter("onnx", target="onnxruntime").export(model, tmp_path / "out").manifest
    assert record["formats"]["onnx"]["target"] == "portable"
    assert "float16" in record["formats"]["onnx"]["fallback"]


def test_beams_carry_their_source_along(bart: lmopt.Model, folder: Path) -> None:
    """What rows hold of their sources moves with them, and stays where beams of one source change places."""
    for source, backend in ((bart, "torch"), (folder, "onnxruntime")):
        with lmopt.Runtime(source, backend=backend) as rt:
            engine = rt.engine
            inputs = np.array([[5, 6, 7, 8], [40, 41, 42, 43]])
            state = engine.encode(inputs, np.array([4, 4]))
            state = engine.select(state, np.array([0, 0, 1, 1]))
            _, state = engine.forward(np.array([[2], [3], [2], [3]]), np.ones(4, np.int64), state)
            name = next(iter(engine.encoded(state)))
            before = state.tensors[name]
            state = engine.select(state, np.array([1, 0, 3, 3]))
            assert state.tensors[name] is before
            state = engine.select(state, np.array([2, 0, 3]))
            found = engine.encoded(state)[name]
            alone = [engine.encoded(engine.encode(row[None], np.array([4])))[name][0] for row in inputs]
            for row, number in zip(found, (1, 0, 1), strict=True):
                np.testing.assert_allclose(row, alone[number], atol=1e-5)
            fresh = [engine.encode(row[None], np.array([4])) for row in inputs]
            joined = engine.select(engine.join(fresh), np.array([1, 1]))
            for row in engine.encoded(joined)[name]:
                np.testing.assert_allclose(row, alone[1], atol=1e-5)


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    model = lmopt.Model.from_module(tiny_seq2seq(), source=SEQ2SEQ_SOURCE)
    record = lmopt.Exporter("onnx", target="onnxruntime").export(model, tmp_path / "out").manifest
    assert "none of its parts" in record["formats"]["onnx"]["fallback"]
    with lmopt.Runtime(model) as eager, lmopt.Runtime(tmp_path / "out") as exported:
        for options in ({}, {"num_beams": 3}):
            said = [
                [
                    one.token_ids
                    for one in rt.generate([[5, 6, 7], [9], [8, 4, 3]], max_new_tokens=8, **options)
                ]
                for rt in (eager, exported)
            ]
            assert said[0] == said[1]
    (tmp_path / "out" / "encoder_model.onnx").write_bytes(
        (tmp_path / "out" / "decoder_model.onnx").read_bytes()
    )
    with pytest.raises(CorruptArtifactError, match="encoder_model"):
        lmopt.Runtime(tmp_path / "out")
