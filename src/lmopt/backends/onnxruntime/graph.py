"""An exported graph that is open: its session, what it is, and the values inside it that can be shown."""

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmopt.backends.onnxruntime.providers import placement
from lmopt.backends.onnxruntime.session import SessionSettings, create_session, installed_wheels, ort
from lmopt.backends.onnxruntime.widening import widen
from lmopt.checking import check_step
from lmopt.contracts import ArtifactView, EngineReport, EngineRequest
from lmopt.errors import ClosedError, EngineError, InputError, NotInstalledError, UnsupportedError
from lmopt.mappings import opening
from lmopt.registry import pip_line
from lmopt.signature import LOGITS, LOGITS_TO_KEEP, Signature, bytes_per_token
from lmopt.types import AnyArray, IntArray, TensorSpec

MODEL: Final = "model.onnx"
_DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class Graph:
    """The `onnx` format of an artefact in one session.

    Args:
        request: Asks for an artefact that has the format.
        settings: How the session runs.
        file: The decoder's graph.
        widened: Whether a bfloat16 graph is computed in float32.

    Attributes:
        signature: Roles of inputs and outputs.
        dtype: What it computes in.
        keeps_logits: Whether the graph can compute the logits of the last positions only.
        run_options: To be handed to every run, so that `close` can stop it.

    Raises:
        CorruptArtifactError: A file is damaged, or the graph is no decoder.
        UnsupportedError: Another compute type was asked for.
        EngineError: ONNX Runtime refuses the graph.
    """

    def __init__(
        self, request: EngineRequest, settings: SessionSettings, file: str = MODEL, *, widened: bool = False
    ) -> None:
        assert request.artifact is not None
        self._file = file
        self._artifact: ArtifactView = request.artifact
        self._format: Mapping[str, Any] = request.artifact.manifest["formats"]["onnx"]
        self._settings = settings
        self._session: ort.InferenceSession | None = self._load(widened)
        self.run_options = run_options()
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.signature = Signature.from_graph(_specs(inputs), _specs(outputs))
        self.keeps_logits = LOGITS_TO_KEEP in {
            one.name for one in self._session.get_overridable_initializers()
        }
        self.dtype = _DTYPES[next(one for one in outputs if one.name == LOGITS).type]
        if request.dtype not in {"auto", self.dtype}:
            self.close()
            raise UnsupportedError(
                f"the artefact computes in {self.dtype}; asked for {request.dtype}. Precision is "
                f"chosen at export: lmopt.Model.from_pretrained(..., dtype={request.dtype!r}), then export again"
            )

    def _load(self, widened: bool) -> "ort.InferenceSession":
        return open_session(self._artifact, self._file, self._settings, widened=widened)

    def session(self) -> "ort.InferenceSession":
        """Give the session; whoever holds it keeps it alive, also through `close`.

        Raises:
            ClosedError: It is closed.
        """
        session = self._session
        if session is None:
            raise ClosedError("this engine is closed; open a new lmopt.Runtime")
        return session

    def failed(self, error: Exception, rows: int, tokens: int) -> Exception:
        """Say what a run that raised an error comes to."""
        if self._session is None:
            return ClosedError("this engine was closed while it computed; open a new lmopt.Runtime")
        return EngineError(f"onnxruntime failed on {rows} rows of {tokens} tokens: {error}")

    def close(self) -> None:
        """Let go of the session, and stop runs that are inside it after the operator they are at."""
        self.run_options.terminate = True
        self._session = None

    def report(self, **details: Any) -> EngineReport:
        """Say which provider computes, with how many threads."""
        return EngineReport(
            backend="onnxruntime",
            device=self._settings.device,
            dtype=self.dtype,
            threads=self._settings.threads,
            versions=dict.fromkeys(installed_wheels(), ort.__version__),
            details={
                "providers": self.session().get_providers(),
                "target": self._format.get("target", "portable"),
                "kv_cache_dtype": state[0].past.dtype if (state := self.signature.state) else "none",
                "kv_cache_bytes_per_token": bytes_per_token(state),
                **self._on_gpu(),
                **details,
            },
        )

    @property
    def device(self) -> str:
        """Where the session computes, as it was asked for."""
        return self._settings.device

    def _on_gpu(self) -> dict[str, Any]:
        """What a report adds for a GPU."""
        if self.device == "cpu":
            return {}
        return {"nodes": placement(self.session(), self.device), "allow_tf32": self._settings.allow_tf32}

    def tap_names(self) -> list[str]:
        """Names of the modules whose output the graph can show."""
        return [name for name, _ in self._format.get("taps", ())]

    def taps(
        self,
        input_ids: IntArray,
        names: Sequence[str],
        *,
        capacity: int = 0,
        past: Mapping[str, AnyArray] | None = None,
    ) -> dict[str, AnyArray]:
        """Run ids from an empty state with the named module outputs added to the graph's outputs.

        Args:
            input_ids: `(batch, sequence)` ids.
            names: Of `tap_names()`.
            capacity: Slots of the past, for graphs that are given room ahead.
            past: The state that the ids come after, by name; an empty one where `None`.
        """
        self.session()
        known = dict(self._format.get("taps", ()))
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"the graph cannot show {unknown[0]!r}; tap_names() lists what it can")
        values = {name: known[name] for name in names}
        ids = np.asarray(input_ids, np.int64)
        state = self.signature.begin(len(ids))
        lengths = np.full(len(ids), ids.shape[1])
        check_step(ids, lengths, state.lengths, self.signature.vocab_size)
        if past is None:
            past = {
                one.past.name: np.zeros(one.sizes(len(ids), capacity), one.past.dtype)
                for one in self.signature.state
            }
        feeds = {**self.signature.step(ids, lengths, state).feeds, **past}
        path = self._artifact.file(self._file)
        return show_values(path, self._settings, self._artifact.path, values, feeds)


def show_values(
    path: Path,
    settings: SessionSettings,
    data_folder: Path,
    values: Mapping[str, str],
    feeds: Mapping[str, AnyArray],
) -> dict[str, AnyArray]:
    """Run a graph once with values inside of it added to its outputs.

    Args:
        path: The graph.
        settings: How the session runs.
        data_folder: Where its weights are.
        values: Names to show under, to names of values.
        feeds: Its inputs by name.
    """
    wanted = list(dict.fromkeys(values.values()))
    if not wanted:
        return {}
    session = create_session(_with_outputs(path, wanted), settings, data_folder=data_folder)
    computed = dict(zip(wanted, session.run(wanted, dict(feeds)), strict=True))
    return {name: computed[value] for name, value in values.items()}


def open_session(
    artifact: ArtifactView, file: str, settings: SessionSettings, *, widened: bool = False
) -> "ort.InferenceSession":
    """Create a session while another thread hashes the weights, which are only numbers to it.

    Args:
        artifact: Artefact with the format `onnx`; all files of it that belong to the graph are verified.
        file: The graph.
        settings: How the session runs.
        widened: Whether a bfloat16 graph is computed in float32.
    """
    model = artifact.file(file)
    files = [name for name in artifact.manifest["formats"]["onnx"].get("files", ()) if name != file]
    # Of several graphs each has its weights in a file of its own name; others may lie anywhere.
    own = [name for name in files if name.startswith(file)] or files
    forget = opening(artifact.path / name for name in own)
    with ThreadPoolExecutor(1, "lmopt-verify") as pool:
        verified = [pool.submit(artifact.file, name) for name in own]
        try:
            if widened:
                with tempfile.TemporaryDirectory(prefix="lmopt-widened-") as folder:
                    session = create_session(widen(model, Path(folder)), settings)
            else:
                session = create_session(model, settings)
        except EngineError:
            for one in verified:
                one.result()  # a damaged file explains more than what onnxruntime makes of it
            raise
        for one in verified:
            one.result()
    # Most kernels have laid their weights out anew by now, and of a matrix that is looked up as well, as a
    # tied embedding is, a text reads a few rows.
    forget()
    return session


def run_values(
    session: "ort.InferenceSession",
    device: str,
    feeds: Mapping[str, "ort.OrtValue"],
    outputs: Sequence[str],
    options: "ort.RunOptions",
) -> Sequence["ort.OrtValue"]:
    """Run, and leave what a graph gives where it was computed; only logits come to the host.

    Args:
        session: Of a graph.
        device: Where it computes, as it was asked for.
        feeds: Name to value of each input, wherever they lie.
        outputs: Names of what is wanted.
        options: Of the run.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        values: Sequence[ort.OrtValue] = session.run_with_ort_values(outputs, feeds, options)
        return values
    io = session.io_binding()
    for name, value in feeds.items():
        io.bind_ortvalue_input(name, value)
    for name in outputs:
        if name == LOGITS:
            io.bind_output(name, "cpu")
        else:
            io.bind_output(name, kind, int(index or 0))
    # What lies on the host is copied while this goes on, and nothing else waits for the copies.
    io.synchronize_inputs()
    session.run_with_iobinding(io, options)
    io.synchronize_outputs()
    bound: Sequence[ort.OrtValue] = io.get_outputs()
    return bound


def run_options() -> "ort.RunOptions":
    """Make options of runs that can be stopped together."""
    options = ort.RunOptions()
    # Of graph capture on a GPU, and off; onnxruntime's Python asks for it in each run, and where it is not
    # set an exception is raised and caught, which takes longer than all the rest around a run.
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options


def _specs(values: Sequence[Any]) -> list[TensorSpec]:
    return [TensorSpec(one.name, _DTYPES.get(one.type, one.type), tuple(one.shape)) for one in values]


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
