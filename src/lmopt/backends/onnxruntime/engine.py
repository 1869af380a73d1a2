"""Run an exported decoder on ONNX Runtime, its state kept as runtime values between calls."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from lmopt.backends.onnxruntime.session import create_session
from lmopt.backends.onnxruntime.spec import BACKEND
from lmopt.contracts import EngineReport, EngineRequest, PaddingSide
from lmopt.errors import (
    ArtifactNotFoundError,
    ClosedError,
    EngineError,
    InputError,
    NotInstalledError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.platform import usable_cpus
from lmopt.registry import pip_line
from lmopt.signature import LOGITS, ArrayState, Signature, check_step
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts, TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def open_engine(request: EngineRequest) -> "OnnxRuntimeEngine":
    """Open the `onnx` format of an artefact; see `lmopt.contracts.EngineFactory`."""
    BACKEND.require(device=request.device, dtype=request.dtype)
    if request.options:
        raise UnsupportedOptionError(
            f"backend 'onnxruntime' has no option {sorted(request.options)[0]!r}; it has none beyond device, "
            "dtype and threads"
        )
    if request.artifact is None:
        raise ArtifactNotFoundError(
            "backend 'onnxruntime' runs exported artefacts; export the model first with "
            "lmopt.Exporter('onnx').export(model, folder), or give the model to lmopt.Runtime, which does it"
        )
    if request.threads is not None and request.threads < 1:
        raise UnsupportedOptionError(f"threads is {request.threads}; expected at least 1")
    return OnnxRuntimeEngine(request)


class OnnxRuntimeEngine:
    """One exported decoder in one session."""

    def __init__(self, request: EngineRequest) -> None:
        assert request.artifact is not None
        self.facts: ModelFacts = request.facts
        self._artifact = request.artifact
        self._format: Mapping[str, Any] = request.artifact.manifest["formats"]["onnx"]
        self._device = request.device
        self._threads = request.threads or usable_cpus()
        # Naming the data file too has it verified before the engine maps it.
        for name in self._format.get("files", ()):
            self._artifact.file(name)
        self._session: ort.InferenceSession | None = create_session(
            self._artifact.file("model.onnx"), device=self._device, threads=self._threads
        )
        self._signature = Signature.from_graph(
            _specs(self._session.get_inputs()), _specs(self._session.get_outputs())
        )
        self._outputs = [LOGITS, *(one.present for one in self._signature.state)]
        self._dtype = _DTYPES[next(o for o in self._session.get_outputs() if o.name == LOGITS).type]
        if request.dtype not in {"auto", self._dtype}:
            self.close()
            raise UnsupportedError(
                f"the artefact computes in {self._dtype}; asked for {request.dtype}. Precision is "
                f"chosen at export: lmopt.Model.from_pretrained(..., dtype={request.dtype!r}), then export again"
            )

    @property
    def ragged(self) -> bool:
        """Whether rows may be unequal: whether the graph takes a mask."""
        return self._signature.has_mask

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> ArrayState:
        """Make the empty state of `batch` rows; the cache grows, so `capacity` has no use here."""
        self._open_session()
        state = self._signature.begin(batch, padding_side)
        state.tensors = {name: _to_ort(array) for name, array in state.tensors.items()}
        return state

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: ArrayState, *, last_only: bool = False
    ) -> tuple[FloatArray, ArrayState]:
        """Read new tokens; see `lmopt.contracts.Engine.forward`."""
        session = self._open_session()
        step = self._signature.step(input_ids, lengths, state)
        feeds = {name: _to_ort(array) for name, array in step.feeds.items()}
        try:
            logits, *present = session.run_with_ort_values(self._outputs, feeds | state.tensors)
        except Exception as error:
            raise EngineError(
                f"onnxruntime failed on {len(lengths)} rows of {input_ids.shape[1]} tokens: {error}"
            ) from error
        tensors = {one.past.name: value for one, value in zip(self._signature.state, present, strict=True)}
        aligned = step.align(logits.numpy(), last_only=last_only)
        return aligned.astype(np.float32, copy=False), ArrayState(
            tensors, step.mask, step.lengths, step.padding_side
        )

    def select(self, state: ArrayState, rows: IntArray) -> ArrayState:
        """Keep, drop, reorder or repeat rows."""
        self._open_session()
        if np.array_equal(rows, np.arange(len(state.lengths))):
            return state
        return _with_ort_values(self._signature.select(_with_arrays(state), rows))

    def join(self, states: Sequence[ArrayState]) -> ArrayState:
        """Put the rows of several states into one batch."""
        self._open_session()
        if len(states) == 1:
            return states[0]
        return _with_ort_values(self._signature.join([_with_arrays(one) for one in states]))

    def report(self) -> EngineReport:
        """Say which provider computes, with how many threads."""
        session = self._open_session()
        return EngineReport(
            backend="onnxruntime",
            device=self._device,
            dtype=self._dtype,
            threads=self._threads,
            versions={"onnxruntime": ort.__version__},
            details={
                "providers": session.get_providers(),
                "state": "growing cache" if self._signature.grows else "recurrent",
                "target": self._format.get("target", "portable"),
            },
        )

    def close(self) -> None:
        """Release the session."""
        self._session = None

    def tap_names(self) -> list[str]:
        """Names of the modules whose output the graph can show."""
        return [name for name, _ in self._format.get("taps", ())]

    def taps(self, input_ids: IntArray, names: Sequence[str]) -> dict[str, AnyArray]:
        """Run ids from an empty state with the named module outputs added to the graph's outputs."""
        self._open_session()
        known = dict(self._format.get("taps", ()))
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"the graph cannot show {unknown[0]!r}; tap_names() lists what it can")
        values = {name: known[name] for name in names}
        session = create_session(
            _with_outputs(self._artifact.file("model.onnx"), list(values.values())),
            device=self._device,
            threads=self._threads,
            data_folder=self._artifact.path,
        )
        ids = np.asarray(input_ids, np.int64)
        state = self._signature.begin(len(ids))
        lengths = np.full(len(ids), ids.shape[1])
        check_step(ids, lengths, state.lengths, self.facts.vocab_size)
        feeds = dict(self._signature.step(ids, lengths, state).feeds) | state.tensors
        wanted = list(dict.fromkeys(values.values()))
        computed = dict(zip(wanted, session.run(wanted, feeds), strict=True))
        return {name: computed[value] for name, value in values.items()}

    def _open_session(self) -> "ort.InferenceSession":
        if self._session is None:
            raise ClosedError("this engine is closed; open a new lmopt.Runtime")
        return self._session


def _specs(values: Sequence[Any]) -> list[TensorSpec]:
    return [TensorSpec(one.name, _DTYPES.get(one.type, one.type), tuple(one.shape)) for one in values]


def _to_ort(array: AnyArray) -> "ort.OrtValue":
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _with_arrays(state: ArrayState) -> ArrayState:
    tensors = {name: value.numpy() for name, value in state.tensors.items()}
    return ArrayState(tensors, state.mask, state.lengths, state.padding_side)


def _with_ort_values(state: ArrayState) -> ArrayState:
    state.tensors = {name: _to_ort(array) for name, array in state.tensors.items()}
    return state


def _with_outputs(path: Any, names: Sequence[str]) -> bytes:
    """Serialise the graph with more outputs, its weights left where they are."""
    try:
        import onnx
    except ImportError as error:
        line = pip_line('"lmopt[onnx]"')
        raise NotInstalledError(f"showing values inside a graph needs onnx: {line}") from error
    model = onnx.load(str(path), load_external_data=False)
    present = {value.name for value in model.graph.output}
    for name in dict.fromkeys(names):
        if name not in present:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    return bytes(model.SerializeToString())
