"""Create ONNX Runtime sessions that are exactly what was asked for, or an error."""

import os
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from lmopt.errors import BrokenPluginError, DeviceError, EngineError

_telemetry_off = os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1") == "1"
if "onnxruntime" in sys.modules and not _telemetry_off:  # pragma: no cover - an import order of the user's
    import warnings

    warnings.warn("onnxruntime was imported with its telemetry on, before lmopt", stacklevel=2)

import onnxruntime as ort  # noqa: E402 (the switch above is read at import)

from lmopt.registry import pip_line  # noqa: E402

# The other modules take `ort` from here, so that the switch above is always set first.
__all__ = ["PROVIDERS", "SessionSettings", "create_session", "installed_wheels", "ort"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def installed_wheels() -> list[str]:
    """List the distributions that share the module folder `onnxruntime`."""
    names = {dist.metadata["Name"].lower() for dist in distributions() if dist.metadata["Name"]}
    return sorted(name for name in names if name in {"onnxruntime", "onnxruntime-gpu"})


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a session runs.

    Attributes:
        device: `"cpu"`, `"cuda"` or `"cuda:<index>"`.
        threads: Threads inside one operator, at least 1.
        spinning: Whether threads that wait for work keep their CPU busy for a moment.
    """

    device: str
    threads: int
    spinning: bool = True


def create_session(
    model: Path | bytes, settings: SessionSettings, *, data_folder: Path | None = None
) -> "ort.InferenceSession":
    """Create a session on one device.

    Args:
        model: Path of the graph, or its bytes with `data_folder` for the external data.
        settings: Where and how it runs.
        data_folder: Folder of external data where `model` is bytes.

    Raises:
        BrokenPluginError: Two wheels overwrite each other.
        DeviceError: The session would not run where it was asked to.
        EngineError: ONNX Runtime refuses the graph; its words are kept.
    """
    if len(wheels := installed_wheels()) > 1:
        raise BrokenPluginError(
            f"{' and '.join(wheels)} are both installed and overwrite each other's files. "
            f"Repair it: {sys.executable} -m pip uninstall -y {' '.join(wheels)}, then "
            f"{pip_line('onnxruntime')} (or onnxruntime-gpu)"
        )
    device = settings.device
    kind, _, index = device.partition(":")
    provider = PROVIDERS[kind]
    if provider not in ort.get_available_providers():
        line = pip_line('"lmopt[onnxruntime-gpu]"')
        raise DeviceError(
            f"device {device!r} needs {provider}; this onnxruntime was built with "
            f"{', '.join(ort.get_available_providers())}. Install the GPU build instead: "
            f"{sys.executable} -m pip uninstall -y onnxruntime, then {line}"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(settings.spinning)))
    if data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(data_folder)
        )
    provider_options: dict[str, Any] = {"device_id": index} if index else {}
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=[(provider, provider_options)])
    except Exception as error:
        raise EngineError(f"onnxruntime {ort.__version__} cannot load {_name(model)}: {error}") from error
    # onnxruntime replaces a provider that does not start by the CPU, with a log line only.
    if session.get_providers()[0] != provider:
        raise DeviceError(
            f"asked for {device!r}, but onnxruntime gave {', '.join(session.get_providers())}: "
            f"{provider} did not start. "
            " Check the driver and CUDA libraries with `lmopt doctor`, or ask for device='cpu'."
        )
    return session


def _name(model: Path | bytes) -> str:
    return f"a graph of {len(model)} bytes" if isinstance(model, bytes) else str(model)
