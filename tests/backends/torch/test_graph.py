"""What both dialects do with a graph after the trace."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from lmopt.backends.torch.graph import share_reshaped


def test_a_table_in_two_shapes_is_stored_and_mapped_once(tmp_path: Path) -> None:
    table = np.arange(4096, dtype=np.float32).reshape(64, 8, 8)
    nodes = [
        helper.make_node("Reshape", ["table", "shape"], ["flat"]),
        helper.make_node("Gather", ["flat", "ids"], ["row"]),
        helper.make_node("ReduceSum", ["table"], ["sum"], keepdims=0),
        helper.make_node("Add", ["row", "sum"], ["looked_up"]),
        # Of small tensors, which lie in the graph itself, nothing would be saved.
        helper.make_node("Reshape", ["looked_up", "wide"], ["result"]),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, [8, 8])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([0, -1]), "shape"),
            numpy_helper.from_array(np.array([8, 8]), "wide"),
        ],
    )
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=1024)
    feeds = {"ids": np.array([3])}
    before = ort.InferenceSession(path).run(None, feeds)[0]
    size = (tmp_path / "data").stat().st_size
    share_reshaped(path)
    after = onnx.load(path, load_external_data=False).graph
    stored = {one.name: one for one in after.initializer}
    assert stored.keys() == {"table", "flat", "wide"}
    assert list(stored["flat"].dims) == [64, 64]
    assert list(stored["flat"].external_data) == list(stored["table"].external_data)
    assert [node.op_type for node in after.node] == ["Gather", "ReduceSum", "Add", "Reshape"]
    assert (tmp_path / "data").stat().st_size == size
    assert np.array_equal(ort.InferenceSession(path).run(None, feeds)[0], before)
