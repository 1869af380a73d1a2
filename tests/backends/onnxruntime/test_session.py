"""A session is what was asked for, and nothing slower."""

from pathlib import Path

import onnx
import pytest

from lmopt.backends.onnxruntime import session
from lmopt.backends.onnxruntime.session import SessionSettings, create_session, ort

NORM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[b,s,4] x, float[b,s,4] y) => (float[b,s,4] out)
<float[4] w = {1,2,3,4}, float[4] bias = {4,3,2,1}>
{
  sum = Add (x, y)
  out = LayerNormalization <axis = -1, epsilon = 0.00001> (sum, w, bias)
}
"""


@pytest.mark.parametrize("slower", [(), session._SLOWER])
def test_sums_and_norms_are_not_joined(
    slower: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_SLOWER", slower)
    opened = ort.SessionOptions

    def writing() -> ort.SessionOptions:
        options = opened()
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        return options

    monkeypatch.setattr(ort, "SessionOptions", writing)
    create_session(onnx.parser.parse_model(NORM).SerializeToString(), SessionSettings("cpu", 1))
    kinds = {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}
    # ONNX Runtime does join them where it is not told otherwise, or this proves nothing.
    assert ("SkipLayerNormalization" in kinds) == (not slower)
