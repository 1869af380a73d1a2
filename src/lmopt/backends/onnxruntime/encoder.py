"""The encoder of an exported encoder-decoder: a graph that runs once for a source."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lmopt.backends.onnxruntime.graph import open_session, run_options, run_values, show_values
from lmopt.backends.onnxruntime.session import SessionSettings, ort
from lmopt.contracts import ArtifactView
from lmopt.errors import ClosedError, CorruptArtifactError, EngineError
from lmopt.signature import ATTENTION_MASK, SOURCE_MASK, Signature, source_name
from lmopt.types import TOKENS, AnyArray, IntArray

_HALF: Final = "tensor(float16)"


class Encoder:
    """An encoder's graph in a session of its own.

    Args:
        artifact: Artefact with the format `onnx`.
        settings: How the session runs.
        signature: Of the decoder's graph: what it takes of a source, this one must give.
        widened: Whether a bfloat16 graph is computed in float32.

    Raises:
        CorruptArtifactError: A file is damaged, or the graph does not give what the decoder's takes.
        EngineError: ONNX Runtime refuses the graph.
    """

    def __init__(
        self,
        artifact: ArtifactView,
        settings: SessionSettings,
        signature: Signature,
        *,
        widened: bool = False,
    ) -> None:
        entry = artifact.manifest["formats"]["onnx"]
        file = entry["encoder"]
        self._artifact, self._settings, self._file = artifact, settings, file
        self._taps: dict[str, str] = dict(entry.get("encoder_taps", ()))
        self._session: ort.InferenceSession | None = open_session(artifact, file, settings, widened=widened)
        self._options = run_options()
        self._device = settings.device
        self._outputs = {one.past.name: source_name(one.past.name) for one in signature.from_source}
        given = {one.name for one in self._session.get_outputs()}
        inputs = self._session.get_inputs()
        self._input, self._half = inputs[0].name, inputs[0].type == _HALF
        self._masked = any(one.name == ATTENTION_MASK for one in inputs)
        if missing := set(self._outputs.values()) - given:
            raise CorruptArtifactError(
                f"{file} does not give {sorted(missing)[0]!r}, which the decoder's graph takes; they are not of "
                "one model. Export it again."
            )
        self._keeps_mask = signature.has_source_mask

    def run(self, inputs: AnyArray, mask: IntArray) -> Mapping[str, "ort.OrtValue"]:
        """Read sources; give what the decoder's graph takes of them, by its names.

        Args:
            inputs: As for `lmopt.contracts.SupportsEncoder.encode`, checked.
            mask: `(batch, source)` int64.

        Raises:
            EngineError: The run failed.
            ClosedError: The engine was closed.
        """
        session = self._session
        if session is None:
            raise ClosedError("this engine is closed; open a new lmopt.Runtime")
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(one))
            for name, one in self._feeds(inputs, mask).items()
        }
        try:
            results = run_values(session, self._device, values, list(self._outputs.values()), self._options)
        except Exception as error:
            if self._session is None:
                raise ClosedError(
                    "this engine was closed while it computed; open a new lmopt.Runtime"
                ) from error
            raise EngineError(f"onnxruntime failed on {len(inputs)} sources: {error}") from error
        found = dict(zip(self._outputs, results, strict=True))
        if self._keeps_mask:
            found[SOURCE_MASK] = ort.OrtValue.ortvalue_from_numpy(mask)
        return found

    def tap_names(self) -> list[str]:
        """Names of the modules whose output the graph can show."""
        return list(self._taps)

    def taps(self, inputs: AnyArray, mask: IntArray, names: Sequence[str]) -> dict[str, AnyArray]:
        """Read sources with the named module outputs added to the graph's outputs; padding may show as zeros.

        Args:
            inputs: As for `run`.
            mask: As for `run`.
            names: Of `tap_names()`.
        """
        values = {name: self._taps[name] for name in names}
        path = self._artifact.file(self._file)
        shown = show_values(path, self._settings, self._artifact.path, values, self._feeds(inputs, mask))
        packed = {name for name, value in values.items() if value.endswith(TOKENS)}
        return {name: _in_rows(one, mask) if name in packed else one for name, one in shown.items()}

    def _feeds(self, inputs: AnyArray, mask: IntArray) -> dict[str, AnyArray]:
        feeds = {self._input: inputs.astype(np.float16) if self._half else inputs}
        if self._masked:
            feeds[ATTENTION_MASK] = mask
        return feeds

    def close(self) -> None:
        """Let go of the session, and stop runs that are inside it."""
        self._options.terminate = True
        self._session = None


def _in_rows(tokens: AnyArray, mask: IntArray) -> AnyArray:
    """Put `(tokens, size)` at their places in `(batch, source, size)`."""
    rows = np.zeros((*mask.shape, tokens.shape[-1]), tokens.dtype)
    rows[mask != 0] = tokens
    return rows
