"""An ONNX graph as TensorRT's network, with all that must live as long as it does."""

from collections import Counter
from pathlib import Path
from typing import Any, Final, Self

from lmopt.backends.tensorrt.collecting import Log, logger_for
from lmopt.backends.tensorrt.flavour import Flavour
from lmopt.errors import EngineBuildError

TYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT4": "int4",
    "FP8": "fp8",
    "FP4": "fp4",
    "UINT8": "uint8",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
    "E8M0": "e8m0",
}
"""TensorRT's names of types to NumPy's, or the usual ones."""
_MOST_ERRORS: Final = 3
_PRODUCTS: Final = frozenset({"MATRIX_MULTIPLY", "EINSUM", "CONVOLUTION", "ATTENTION_INPUT"})


class Network:
    """A strongly typed network: each type in it is one that the graph states.

    Builder, network, parser and logger hold each other by address only; a network whose Python object is gone
    crashes the process. They are kept together here and let go of in order.

    Args:
        flavour: The TensorRT that parses.

    Attributes:
        flavour: The same.
        log: What TensorRT has said so far.
        builder: `Builder`.
        native: `INetworkDefinition`.
    """

    def __init__(self, flavour: Flavour) -> None:
        trt = flavour.module
        self.flavour = flavour
        self.log: Log = logger_for(trt)
        self.builder: Any = trt.Builder(self.log.native)
        # Strong typing must be asked for in TensorRT 10, and is all there is from 11 on.
        strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        older = flavour.name == "tensorrt" and int(flavour.version.split(".")[0]) < 11
        self.native: Any = self.builder.create_network(
            1 << int(strong) if older and strong is not None else 0
        )
        self._parser: Any = trt.OnnxParser(self.native, self.log.native)

    def __enter__(self) -> Self:
        """Give the network itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of parser, network and builder, in this order."""
        self.close()

    def close(self) -> None:
        """Let go of parser, network and builder, in this order."""
        self._parser = None
        self.native = None
        self.builder = None

    def parse(self, model: Path) -> Self:
        """Read an ONNX file; external data are looked for beside it.

        Raises:
            EngineBuildError: TensorRT refuses the graph; nodes and reasons are named.
        """
        if not self._parser.parse_from_file(str(model)):
            raise EngineBuildError(
                f"{self.flavour.name} {self.flavour.version} cannot read {model}: {'; '.join(self._complaints())}"
            )
        self._decompose_attention()
        return self

    def _complaints(self) -> list[str]:
        """What the parser has against a graph, with the nodes that it is about."""
        found = []
        for index in range(min(self._parser.num_errors, _MOST_ERRORS)):
            error = self._parser.get_error(index)
            where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
            found.append(f"{where}{error.desc()} [{str(error.code()).rpartition('.')[2]}]")
        return found or list(self.log.errors()[-_MOST_ERRORS:]) or ["TensorRT gives no reason"]

    def _decompose_attention(self) -> None:
        """Let attention without a kernel of its own be made of products: there is none for float32."""
        trt = self.flavour.module
        kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
        for layer in self.layers():
            if kind is not None and layer.type == kind:
                # The bindings give layers as their base class; this is how Polygraphy, too, gets at the rest.
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True

    def layers(self) -> list[Any]:
        """List its layers."""
        return [self.native.get_layer(index) for index in range(self.native.num_layers)]

    def inputs(self) -> dict[str, str]:
        """Name to type of its inputs."""
        tensors = (self.native.get_input(index) for index in range(self.native.num_inputs))
        return {one.name: type_name(one) for one in tensors}

    def outputs(self) -> dict[str, str]:
        """Name to type of its outputs."""
        tensors = (self.native.get_output(index) for index in range(self.native.num_outputs))
        return {one.name: type_name(one) for one in tensors}

    def types(self) -> Counter[str]:
        """How many of the values in it have each type."""
        return Counter(
            type_name(tensor)
            for layer in self.layers()
            for index in range(layer.num_outputs)
            if (tensor := layer.get_output(index)) is not None
        )

    def products(self) -> Counter[str]:
        """In which types it multiplies matrices, and how many in each; products over one column do not count."""
        found: Counter[str] = Counter()
        for layer in self.layers():
            if layer.type.name not in _PRODUCTS or layer.num_inputs == 0:
                continue
            operands = [
                one
                for index in range(min(2, layer.num_inputs))
                if (one := layer.get_input(index)) is not None
            ]
            # Angles of rotary positions are an outer product: no kernel for products is looked for.
            if layer.type.name == "MATRIX_MULTIPLY" and any(
                1 in tuple(one.shape)[-1:] for one in operands[:1]
            ):
                continue
            found[type_name(operands[0])] += 1
        return found


def type_name(tensor: Any) -> str:
    """Name the type of a tensor as lmopt does."""
    name: str = tensor.dtype.name
    return TYPES.get(name, name.lower())
