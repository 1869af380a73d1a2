"""The engine behind the spec: an exported decoder, computed operator by operator in NumPy."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from lmopt.contracts import EngineReport, EngineRequest, PaddingSide
from lmopt.errors import (
    ArtifactNotFoundError,
    ClosedError,
    DtypeError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.signature import LOGITS, ArrayState, Signature
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts
from lmopt_numpy.graph import Graph, load_graph
from lmopt_numpy.spec import BACKEND


def open_engine(request: EngineRequest) -> "NumpyEngine":
    """Open the `onnx` format of an artefact; refuse what cannot be honoured, before any work."""
    if request.options:
        raise UnsupportedOptionError(f"backend 'numpy' has no option {min(request.options)!r}; it takes none")
    if request.threads is not None:
        raise UnsupportedOptionError(
            "backend 'numpy' cannot set threads: NumPy's BLAS reads OMP_NUM_THREADS when Python starts"
        )
    support = BACKEND.supports(formats=("onnx",), device=request.device, dtype=request.dtype)
    if not support.ok:
        raise UnsupportedError(f"backend 'numpy' cannot run this: {'; '.join(support.reasons)}")
    if request.artifact is None:
        raise ArtifactNotFoundError(
            "backend 'numpy' runs exported artefacts; write one with "
            "lmopt.Exporter('onnx').export(model, folder)"
        )
    record = request.artifact.manifest["formats"].get("onnx", {})
    graph = load_graph(request.artifact)
    signature = Signature.from_graph(graph.inputs, graph.outputs)
    (logits,) = (spec for spec in graph.outputs if spec.name == LOGITS)
    if logits.dtype != "float32":
        raise UnsupportedError(
            f"backend 'numpy' computes in float32; the artefact's logits are {logits.dtype}. "
            "Export the model in float32: lmopt.Model.from_pretrained(..., dtype='float32')"
        )
    return NumpyEngine(graph, signature, request.facts, record.get("taps", ()))


class NumpyEngine:
    """One exported decoder; its state is a dictionary of NumPy arrays.

    `Signature` does the bookkeeping (masks, positions, padding, rows), so what is left is to run
    the graph. The graph and its weights are only read: threads may share the engine.
    """

    def __init__(
        self, graph: Graph, signature: Signature, facts: ModelFacts, taps: Sequence[Sequence[str]]
    ) -> None:
        self.facts = facts
        self._signature = signature
        self._taps = dict(taps)
        self._graph: Graph | None = graph

    @property
    def ragged(self) -> bool:
        """Rows may be unequal where the graph takes a mask."""
        return self._signature.has_mask

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> ArrayState:
        """Make the empty state; the cache grows by concatenation, so `capacity` has no use."""
        self._open()
        return self._signature.begin(batch, padding_side)

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: ArrayState, *, last_only: bool = False
    ) -> tuple[FloatArray, ArrayState]:
        """Read new tokens."""
        graph = self._open()
        for name, array in (("input_ids", input_ids), ("lengths", lengths)):
            if not np.issubdtype(np.asarray(array).dtype, np.integer):
                raise DtypeError(f"{name} is {np.asarray(array).dtype}; expected int64")
        step = self._signature.step(input_ids, lengths, state)
        presents = [one.present for one in self._signature.state]
        values = graph.run({**step.feeds, **state.tensors}, [LOGITS, *presents])
        tensors = {one.past.name: values[one.present] for one in self._signature.state}
        after = ArrayState(tensors, step.mask, step.lengths, step.padding_side)
        # A copy: the caller may write into its logits, which can be a view of the graph's memory.
        return np.array(step.align(values[LOGITS], last_only=last_only), np.float32), after

    def select(self, state: ArrayState, rows: IntArray) -> ArrayState:
        """Keep, drop, reorder or repeat rows."""
        self._open()
        return self._signature.select(state, rows)

    def join(self, states: Sequence[ArrayState]) -> ArrayState:
        """Put the rows of several states into one batch."""
        self._open()
        return self._signature.join(states)

    @property
    def rewinds(self) -> bool:
        """Rows can forget their last tokens where the state is a cache and nothing else."""
        return self._signature.rewinds

    def rewind(self, state: ArrayState, lengths: IntArray) -> ArrayState:
        """Let each row forget all but its first tokens."""
        self._open()
        return self._signature.rewind(state, lengths)

    def copy(self, state: ArrayState, *, capacity: int | None = None) -> ArrayState:
        """Make an independent copy: calls make new arrays and leave old ones alone, so both share them."""
        self._open()
        return ArrayState(dict(state.tensors), state.mask, state.lengths, state.padding_side)

    def tap_names(self) -> list[str]:
        """Names of the modules whose output the exporter noted down."""
        return list(self._taps)

    def taps(self, input_ids: IntArray, names: Sequence[str]) -> Mapping[str, AnyArray]:
        """Run ids from an empty state and return the named modules' outputs."""
        graph = self._open()
        if unknown := set(names) - set(self._taps):
            raise UnsupportedOptionError(f"no value is named {min(unknown)!r}; see tap_names()")
        batch, width = input_ids.shape
        state = self._signature.begin(batch)
        step = self._signature.step(input_ids, np.full(batch, width, np.int64), state)
        values = graph.run({**step.feeds, **state.tensors}, [self._taps[name] for name in names])
        return {name: values[self._taps[name]].copy() for name in names}

    def report(self) -> EngineReport:
        """Say what computes."""
        graph = self._open()
        details: dict[str, Any] = {"operators": graph.count, "ragged": self.ragged}
        versions = {name: version(name) for name in ("numpy", "onnx")}
        return EngineReport("numpy", "cpu", "float32", threads=0, versions=versions, details=details)

    def close(self) -> None:
        """Let go of the graph and its mapped weights."""
        self._graph = None

    def _open(self) -> Graph:
        if self._graph is None:
            raise ClosedError("this engine is closed; open a new lmopt.Runtime")
        return self._graph
