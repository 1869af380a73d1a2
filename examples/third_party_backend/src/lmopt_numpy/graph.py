"""Read an ONNX file and run it, one operator after another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from lmopt.contracts import ArtifactView
from lmopt.errors import CorruptArtifactError, UnsupportedError
from lmopt.types import AnyArray, TensorSpec
from lmopt_numpy.operators import OPERATORS

_MODEL = "model.onnx"


@dataclass(frozen=True, slots=True)
class Node:
    """One operator of the graph; `""` stands for an input or output that is left out."""

    name: str
    kind: str
    compute: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def run(self, values: dict[str, Any]) -> None:
        """Compute the outputs from the inputs."""
        arguments = [values[name] if name else None for name in self.inputs]
        result = self.compute(*arguments, **self.attributes)
        results = result if isinstance(result, tuple) else (result,)
        values.update((name, one) for name, one in zip(self.outputs, results, strict=False) if name)


@dataclass(frozen=True, slots=True)
class Graph:
    """A decoder's graph, its weights mapped from the file and not read until they are used."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, AnyArray]

    @property
    def count(self) -> int:
        """Number of operators."""
        return len(self.nodes)

    def run(self, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """Compute the wanted values; each other value is dropped after its last use."""
        last_use = {name: index for index, node in enumerate(self.nodes) for name in node.inputs}
        values: dict[str, Any] = {**self.constants, **feeds}
        keep = {*wanted, *self.constants}
        for index, node in enumerate(self.nodes):
            node.run(values)
            for name in {*node.inputs, *node.outputs}:
                if name and last_use.get(name, index) <= index and name not in keep:
                    values.pop(name, None)
        return {name: values[name] for name in wanted}


def load_graph(artifact: ArtifactView) -> Graph:
    """Read the graph of an artefact.

    Every file is asked of the artefact, which verifies its hash before it is opened.

    Raises:
        CorruptArtifactError: The file is no ONNX model, or its weights are not where it says.
        UnsupportedError: An operator is missing here; the message names it.
    """
    path = artifact.file(_MODEL)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise CorruptArtifactError(f"{path} is not an ONNX model: {error}") from error
    graph = model.graph
    foreign = {f"{node.domain}::{node.op_type}" for node in graph.node if node.domain not in ("", "ai.onnx")}
    missing = {node.op_type for node in graph.node} - set(OPERATORS)
    if foreign or missing:
        raise UnsupportedError(
            f"backend 'numpy' lacks the operator {', '.join(sorted(foreign | missing))}. "
            "Export with target='portable', or run this model on another backend."
        )
    files: dict[str, AnyArray] = {}
    constants = {one.name: _weight(one, artifact, files) for one in graph.initializer}
    inputs = tuple(_spec(value) for value in graph.input if value.name not in constants)
    nodes = []
    for node in graph.node:
        attributes = {one.name: _attribute(one) for one in node.attribute}
        compute = OPERATORS[node.op_type]
        made = Node(node.name, node.op_type, compute, tuple(node.input), tuple(node.output), attributes)
        if node.op_type == "Constant":
            made.run(constants)
        else:
            nodes.append(made)
    return Graph(inputs, tuple(_spec(value) for value in graph.output), tuple(nodes), constants)


def _weight(tensor: onnx.TensorProto, artifact: ArtifactView, files: dict[str, AnyArray]) -> AnyArray:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    name = where["location"]
    if name not in files:
        files[name] = np.memmap(artifact.file(name), np.uint8, mode="r")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    start = int(where.get("offset", 0))
    size = int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize
    data = files[name][start : start + size]
    if len(data) != size:
        raise CorruptArtifactError(f"{Path(name)} is too short for the weight {tensor.name!r}")
    # A plain array over the mapping: np.memmap's own bookkeeping costs time at every operator.
    return np.asarray(data).view(np.ndarray).view(dtype).reshape(tensor.dims)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return TensorSpec(value.name, dtype, shape)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return value.decode() if isinstance(value, bytes) else value
