"""The engine on graphs written by hand: a recurrent decoder, and graphs that it must refuse."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lmopt.artifact import Artifact, publish
from lmopt.contracts import EngineRequest
from lmopt.errors import CorruptArtifactError, LmoptError, UnsupportedError
from lmopt.registry import backends
from lmopt.types import ModelFacts

VOCAB, HIDDEN = 11, 4
RNG = np.random.default_rng(0)
WEIGHTS = {
    "embedding": RNG.normal(size=(VOCAB, 3)),
    "w": RNG.normal(size=(1, 4 * HIDDEN, 3)),
    "r": RNG.normal(size=(1, 4 * HIDDEN, HIDDEN)),
    "b": RNG.normal(size=(1, 8 * HIDDEN)),
    "head": RNG.normal(size=(HIDDEN, VOCAB)),
}
STATE = (1, "batch_size", HIDDEN)
NODES = [
    helper.make_node("Gather", ["embedding", "input_ids"], ["e"]),
    helper.make_node("Transpose", ["e"], ["x"], perm=[1, 0, 2]),
    helper.make_node(
        "LSTM",
        ["x", "w", "r", "b", "", "past_state.0", "past_state.1"],
        ["h", "present_state.0", "present_state.1"],
        hidden_size=HIDDEN,
    ),
    helper.make_node("Squeeze", ["h", "one"], ["s"]),
    helper.make_node("Transpose", ["s"], ["t"], perm=[1, 0, 2]),
    helper.make_node("MatMul", ["t", "head"], ["logits"]),
]


def write(folder, nodes, dtype=TensorProto.FLOAT):
    """Publish a recurrent decoder with these nodes, its weights in external data."""
    logits = helper.make_tensor_value_info("logits", dtype, ("batch_size", "sequence_length", VOCAB))
    past = [helper.make_tensor_value_info(f"past_state.{n}", dtype, STATE) for n in (0, 1)]
    present = [helper.make_tensor_value_info(f"present_state.{n}", dtype, STATE) for n in (0, 1)]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("batch_size", "sequence_length"))
    constants = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in WEIGHTS.items()]
    constants.append(numpy_helper.from_array(np.array([1]), "one"))
    graph = helper.make_graph(nodes, "decoder", [ids, *past], [logits, *present], constants)
    domains = {node.domain for node in nodes} | {""}
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid(d, 21 if not d else 1) for d in domains]
    )
    with publish(folder) as staging:
        onnx.save(
            model,
            staging.path / "model.onnx",
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=0,
        )
        staging.manifest["formats"]["onnx"] = {"files": ["model.onnx", "model.onnx.data"]}
    return Artifact.open(folder)


def open_engine(artifact, **options):
    return backends.load("numpy")(EngineRequest(facts=ModelFacts(VOCAB), artifact=artifact, **options))


def truth(row):
    """The LSTM's own equations, one token after the other, gates in the order i, o, f, c."""
    h = c = np.zeros(HIDDEN)
    logits = []
    w, r, b = WEIGHTS["w"][0], WEIGHTS["r"][0], WEIGHTS["b"][0]
    for token in row:
        gates = w @ WEIGHTS["embedding"][token] + r @ h + b[: 4 * HIDDEN] + b[4 * HIDDEN :]
        i, o, f, g = gates.reshape(4, HIDDEN)
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
        logits.append(h @ WEIGHTS["head"])
    return np.array(logits)


def test_a_recurrent_decoder_runs_selects_and_joins(tmp_path):
    engine = open_engine(write(tmp_path / "m", NODES))
    assert not engine.ragged
    rows = RNG.integers(0, VOCAB, (3, 9))
    logits, state = engine.forward(rows[:, :5], np.full(3, 5), engine.begin(3))
    np.testing.assert_allclose(logits, [truth(row)[:5] for row in rows], atol=1e-5)
    order = np.array([2, 0])
    state = engine.join([engine.select(state, order)])
    logits, _ = engine.forward(rows[order, 5:], np.full(2, 4), state)
    np.testing.assert_allclose(logits, [truth(row)[5:] for row in rows[order]], atol=1e-5)


def test_an_operator_that_is_missing_is_named(tmp_path):
    strange = [*NODES[:-1], helper.make_node("Attention", ["t", "t", "t"], ["logits"])]
    with pytest.raises(UnsupportedError, match="Attention"):
        open_engine(write(tmp_path / "m", strange))


def test_an_operator_of_another_domain_is_named(tmp_path):
    strange = [*NODES[:-1], helper.make_node("MatMul", ["t", "head"], ["logits"], domain="com.microsoft")]
    with pytest.raises(UnsupportedError, match=r"com\.microsoft::MatMul"):
        open_engine(write(tmp_path / "m", strange))


def test_another_type_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UnsupportedError, match="Export the model in float32"):
        open_engine(write(tmp_path / "m", NODES, TensorProto.FLOAT16))


def test_weights_outside_the_folder_are_refused(tmp_path):
    artifact = write(tmp_path / "m", NODES)
    path = artifact.path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../secret" if entry.key == "location" else entry.value

    class Trusting:
        """An artefact whose graph was changed and whose hashes nobody checks."""

        manifest = artifact.manifest

        def file(self, name):
            return path if name == "model.onnx" else artifact.file(name)

    path.write_bytes(model.SerializeToString())
    (tmp_path / "secret").write_bytes(bytes(4096))
    with pytest.raises(LmoptError, match="secret"):
        open_engine(Trusting())


def test_a_file_that_is_no_graph_is_corrupt(tmp_path):
    artifact = write(tmp_path / "m", NODES)
    (tmp_path / "garbage").write_bytes(b"\xff" * 100)

    class Broken:
        manifest = artifact.manifest

        def file(self, name):
            return tmp_path / "garbage"

    with pytest.raises(CorruptArtifactError, match="garbage"):
        open_engine(Broken())


def test_neither_torch_nor_onnxruntime_is_imported(tmp_path):
    write(tmp_path / "m", NODES)
    code = (
        "import sys, numpy as np\n"
        "from lmopt.artifact import Artifact\n"
        "from lmopt.contracts import EngineRequest\n"
        "from lmopt.registry import backends\n"
        "from lmopt.types import ModelFacts\n"
        f"request = EngineRequest(facts=ModelFacts({VOCAB}), artifact=Artifact.open(sys.argv[1]))\n"
        "engine = backends.load('numpy')(request)\n"
        "engine.forward(np.zeros((1, 3), np.int64), np.array([3]), engine.begin(1))\n"
        "heavy = {'torch', 'onnxruntime', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
