"""Each operator against ONNX's own reference implementation."""

import numpy as np
import onnx
import pytest
from lmopt_numpy.operators import OPERATORS
from onnx import helper
from onnx.reference import ReferenceEvaluator

OPSET = 23
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
Y = RNG.normal(size=(2, 3, 4)).astype(np.float32)
N = RNG.integers(-9, 9, (2, 3, 4))
B = X > 0
i = lambda *values: np.array(values, np.int64)  # noqa: E731
LSTM = [RNG.normal(size=s).astype(np.float32) for s in ((5, 2, 3), (1, 16, 3), (1, 16, 4), (1, 32))]
GRU = [RNG.normal(size=s).astype(np.float32) for s in ((5, 2, 3), (1, 12, 3), (1, 12, 4), (1, 24))]
START = [RNG.normal(size=(1, 2, 4)).astype(np.float32) for _ in range(2)]

_UNARY = """Abs Ceil Cos Erf Exp Floor Gelu Identity LeakyRelu LogSoftmax Neg Reciprocal Relu Round Sigmoid
Sign Sin Size Softmax Softplus Tanh Transpose Flatten Shape"""
_BINARY = "Add Sub Mul Div Max Min Sum Equal Greater GreaterOrEqual Less LessOrEqual"
REDUCTIONS = ["ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"]

CASES = [
    *((name, [X], {}) for name in _UNARY.split()),
    *((name, [X, Y], {}) for name in _BINARY.split()),
    *((name, [X, i(1)], {"keepdims": keep}) for name in REDUCTIONS for keep in (0, 1)),
    *((name, [X], {}) for name in REDUCTIONS),
    *((name, [B, Y > 0], {}) for name in ("And", "Or", "Xor")),
    ("Not", [B], {}),
    ("Gelu", [X], {"approximate": "tanh"}),
    ("Softmax", [X], {"axis": 1}),
    ("Sqrt", [np.abs(X)], {}),
    ("Log", [np.abs(X)], {}),
    ("Pow", [np.abs(X), np.float32(2)], {}),
    ("Pow", [X, np.int64(3)], {}),
    ("Div", [N, i(3)], {}),
    ("Div", [N, i(-4)], {}),
    ("Mod", [N, i(3)], {}),
    ("Mod", [N, i(3)], {"fmod": 1}),
    ("Clip", [X, np.float32(-0.5), np.float32(0.5)], {}),
    ("IsNaN", [np.where(B, X, np.nan).astype(np.float32)], {}),
    ("IsInf", [np.where(B, X, np.inf).astype(np.float32)], {}),
    ("ArgMax", [X], {"axis": 1}),
    ("ArgMax", [N], {"axis": 2, "keepdims": 0, "select_last_index": 1}),
    ("ArgMin", [X], {"axis": -1}),
    ("Where", [B, X, Y], {}),
    ("Cast", [X], {"to": onnx.TensorProto.INT64}),
    ("Cast", [N], {"to": onnx.TensorProto.FLOAT}),
    ("Cast", [B], {"to": onnx.TensorProto.FLOAT}),
    ("CastLike", [N, X], {}),
    ("Concat", [X, Y], {"axis": -2}),
    ("Constant", [], {"value_ints": [1, 2]}),
    ("ConstantOfShape", [i(2, 3)], {}),
    ("CumSum", [X, np.int64(1)], {}),
    ("CumSum", [X, np.int64(2)], {"exclusive": 1, "reverse": 1}),
    ("Expand", [X[:, :1], i(1, 3, 1)], {}),
    ("Gather", [X, i(2, -1)], {"axis": 1}),
    ("GatherElements", [X, N % 3], {"axis": 1}),
    ("GatherND", [X, np.array([[0, 1], [1, 2]])], {}),
    ("GatherND", [X, np.array([[1], [2]])], {"batch_dims": 1}),
    ("NonZero", [N], {}),
    ("OneHot", [i(0, 2, -1), np.int64(4), np.array([0.0, 1.0], np.float32)], {}),
    ("Pad", [X, i(1, 0, 2, 0), np.float32(7), i(0, 2)], {}),
    ("Range", [np.int64(1), np.int64(9), np.int64(3)], {}),
    ("Reshape", [X, i(0, -1)], {}),
    ("Reshape", [np.zeros((2, 0, 4), np.float32), i(2, -1, 2)], {}),
    ("ScatterElements", [X, N[:, :1] % 3, Y[:, :1]], {"axis": 1}),
    ("ScatterElements", [X, N[:, :1] % 3, Y[:, :1]], {"axis": 1, "reduction": "add"}),
    ("ScatterND", [X, np.array([[0, 1], [1, 2]]), Y[0, :2]], {}),
    ("Shape", [X], {"start": 1, "end": -1}),
    ("Slice", [X, i(1), i(2**62), i(1)], {}),
    ("Slice", [X, i(-1, 0), i(-(2**62), 2), i(2, 1), i(-2, 1)], {}),
    ("Split", [X], {"axis": 2, "num_outputs": 3}),
    ("Split", [X, i(1, 3)], {"axis": 2}),
    ("Squeeze", [X[:, :1], i(1)], {}),
    ("Tile", [X, i(1, 2, 1)], {}),
    ("TopK", [X, i(2)], {}),
    ("TopK", [X, i(2)], {"axis": 1, "largest": 0}),
    ("Transpose", [X], {"perm": [1, 0, 2]}),
    ("Trilu", [X, np.int64(1)], {"upper": 0}),
    ("Trilu", [X], {}),
    ("Unsqueeze", [X, i(0, -1)], {}),
    ("MatMul", [X, np.swapaxes(Y, 1, 2)], {}),
    ("Gemm", [X[0], Y[0], np.float32([1, 2, 3])], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [X[0], Y[0]], {"transA": 1}),
    ("Einsum", [X, Y], {"equation": "bij,bkj->bik"}),
    ("Dropout", [X], {}),
    ("LayerNormalization", [X, Y[0, 0], Y[0, 1]], {"epsilon": 1e-3}),
    ("RMSNormalization", [X, Y[0, 0]], {"epsilon": 1e-3}),
    ("LSTM", LSTM, {"hidden_size": 4}),
    ("LSTM", [*LSTM, None, *START], {"hidden_size": 4}),
    ("GRU", GRU, {"hidden_size": 4}),
    ("GRU", [*GRU, None, START[0]], {"hidden_size": 4, "linear_before_reset": 1}),
]


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)]
)
def test_operator_equals_onnx_reference(kind, inputs, attributes):
    result = OPERATORS[kind](*inputs, **attributes)
    given = result if isinstance(result, tuple) else (result,)
    names = [f"x{n}" if one is not None else "" for n, one in enumerate(inputs)]
    outputs = [f"y{n}" for n in range(len(given))]
    graph = helper.make_graph(
        [helper.make_node(kind, names, outputs, **attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(one.dtype), one.shape)
            for name, one in zip(names, inputs, strict=True)
            if name
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    feeds = {name: np.asarray(one) for name, one in zip(names, inputs, strict=True) if name}
    expected = ReferenceEvaluator(model).run(None, feeds)
    for mine, theirs in zip(given, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def test_every_operator_is_tested():
    assert set(OPERATORS) == {kind for kind, _, _ in CASES}


@pytest.mark.parametrize("option", [{"direction": "reverse"}, {"layout": 1}, {"clip": 1.0}])
def test_recurrent_variants_are_refused_by_name(option):
    from lmopt.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match=next(iter(option))):
        OPERATORS["LSTM"](*LSTM, hidden_size=4, **option)
