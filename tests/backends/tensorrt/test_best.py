"""The largest logits, found on the device: what comes to the host settles the token as the whole line would."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

import lmopt
from lmopt.backends.tensorrt import device_engine, lane
from lmopt.backends.tensorrt.best import IDS, VALUES, add_best, settled
from lmopt.errors import UnsupportedOptionError

LINE = np.array([3.0, 9.0, 1.0, 9.0, 5.0, -2.0, 8.0, 0.0], np.float32)


def top(line, many):
    """What a device hands out, in an order of its own: of equals the last first."""
    ids = np.lexsort((-np.arange(line.size), -line))[:many]
    return line[ids], ids


@pytest.mark.parametrize(("count", "kept"), [(1, [1, 3]), (2, [1, 3]), (3, [1, 3, 6]), (4, [1, 3, 4, 6])])
def test_what_is_left_out_is_below_the_last(count, kept):
    logits, ids = settled(*top(LINE, 5), count, LINE.size)
    assert ids.tolist() == kept
    assert logits.tolist() == LINE[kept].tolist()


@pytest.mark.parametrize(
    ("line", "many", "count"),
    [
        (LINE, 5, 5),  # the next might tie with the fifth
        (LINE, 2, 1),  # a third might be 9 as well
        (np.full(8, -np.inf, np.float32), 5, 1),
        (np.where(np.arange(8) == 2, np.float32(np.inf), LINE), 5, 1),  # infinity stands for NaN
        (np.array([1, *[1 - 2.0**-22] * 6, 0], np.float32), 5, 1),  # a temperature might make them equal
    ],
)
def test_what_is_not_settled_takes_the_whole_line(line, many, count):
    assert settled(*top(line, many), count, line.size) is None


def test_all_of_a_vocabulary_is_always_enough():
    logits, ids = settled(*top(LINE, 8), 8, LINE.size)
    assert ids.tolist() == list(range(8))
    assert logits.tolist() == LINE.tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_graph_finds_them_in_the_last_column(dtype, tmp_path):
    lines = np.random.default_rng(0).normal(size=(2, 3, 199)).astype(dtype)
    lines[1, 2, [7, 9]] = np.nan
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shape = ("batch_size", "sequence_length", 199)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["logits"])],
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("logits", kind, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "plain.onnx")
    found = ir.load(tmp_path / "plain.onnx")
    assert add_best(found.graph, 1000) == 199
    found = ir.load(tmp_path / "plain.onnx")
    assert add_best(found.graph, 20) == 20
    ir.save(found, tmp_path / "best.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "best.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "best.onnx", providers=["CPUExecutionProvider"])
    values, ids = session.run([VALUES, IDS], {"x": lines})
    assert values.dtype == np.float32
    assert ids[0].tolist() == (-lines[0, 2].astype(np.float32)).argsort(kind="stable")[:20].tolist()
    assert values[0].tolist() == lines[0, 2][ids[0]].astype(np.float32).tolist()
    assert values[1].max() == np.inf
    assert settled(values[1], ids[1], 1, 199) is None


@pytest.mark.parametrize("model", ["llama", "lstm"])
@pytest.mark.parametrize("open_lines", [False, True], ids=["settled", "whole"])
def test_more_rows_than_a_profile_takes(model, open_lines, opened, rows, monkeypatch):
    if open_lines:
        monkeypatch.setattr(device_engine, "settled", lambda values, *rest: None)
    engine = opened(model).engine
    ids, more = np.stack(rows(*[5] * 6)), np.stack(rows(*[1] * 6, seed=1))
    lengths = np.full(6, 5)
    _, state = engine.forward(ids, lengths, engine.begin(6))
    whole, _ = engine.forward(more, lengths // 5, state)
    _, state = engine.forward(ids, lengths, engine.begin(6))
    logits, kept, state = engine.forward_best(more, state, 3)
    assert state.lengths.tolist() == [6] * 6
    for line, given, names in zip(whole[:, 0], logits, kept, strict=True):
        if open_lines:
            assert names is None
            assert given.tolist() == line.tolist()
        else:
            assert names.tolist() == sorted(line.argsort()[-3:].tolist())
            assert given.tolist() == line[names].tolist()


def test_generation_brings_whole_lines_for_prompts_only(gpu, workshop, monkeypatch):
    brought = []
    real = lane.Lane.logits
    monkeypatch.setattr(
        lane.Lane, "logits", lambda self, *given: (brought.append(given[1]), real(self, *given))[1]
    )
    folder = workshop.subject("llama", "onnx", "float32").artifact.path
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 8, "seed": 3, "temperature": 0.8}
    found = []
    for best in (64, 0):
        brought.clear()
        with lmopt.Runtime(folder, backend="tensorrt", device="cuda", best_logits=best) as runtime:
            found.append(
                [
                    [one.token_ids for one in runtime.generate([[5, 6, 7], [8, 9]], **options)]
                    for options in (options, {"max_new_tokens": 12}, {"max_new_tokens": 12, "logprobs": True})
                ]
            )
        # One call reads both prompts; 11 tokens follow the first.
        assert len(brought) == ((1 + 0) * 2 + 12 if best else 36)
    assert found[0] == found[1]


def test_more_than_the_engine_finds_is_refused(opened):
    engine = opened(best_logits=8).engine
    assert engine.most_best == 8
    for count in (0, 9):
        with pytest.raises(UnsupportedOptionError, match="best_logits="):
            engine.forward_best(np.array([[3]]), engine.begin(1), count)


@pytest.mark.parametrize("wrong", [-1, 3841, 1.0, True])
def test_an_impossible_number_is_refused(opened, wrong):
    with pytest.raises(UnsupportedOptionError, match=r"best_logits=.* from 0 to 3840"):
        opened(best_logits=wrong)


def test_a_graph_without_logits_has_no_best(written):
    path = written([helper.make_node("Relu", ["x"], ["y"])], dtype=TensorProto.FLOAT)
    assert add_best(ir.load(path).graph, 5) == 0
