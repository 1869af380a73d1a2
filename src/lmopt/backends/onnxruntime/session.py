"""Create ONNX Runtime sessions that are exactly what was asked for, or an error."""

import contextlib
import functools
import io
import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from lmopt.accelerators import cuda
from lmopt.backends.onnxruntime.providers import (
    CPU,
    captured,
    placement,
    providers_for,
    require_driver,
    started_or_raise,
)
from lmopt.errors import BrokenPluginError, DeviceError, EngineError

_telemetry_off = os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1") == "1"
if "onnxruntime" in sys.modules and not _telemetry_off:  # pragma: no cover - an import order of the user's
    import warnings

    warnings.warn("onnxruntime was imported with its telemetry on, before lmopt", stacklevel=2)

import onnxruntime as ort  # noqa: E402 (the switch above is read at import)

from lmopt.registry import pip_line  # noqa: E402

_SLOWER: Final = ("SkipLayerNormFusion",)
"""What makes operators that take longer on a CPU than those they replace: `SkipLayerNormalization` of 640 rows of 256
takes 0.70 ms, `Add` and `LayerNormalization` 0.23 (two threads, version 1.32)."""

# The other modules take `ort` from here, so that the switch above is always set first.
__all__ = ["SessionSettings", "create_session", "installed_wheels", "ort"]


def installed_wheels() -> list[str]:
    """List the distributions that share the module folder `onnxruntime`."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        # Asked for by name: a look at what every installed distribution is called takes 0.1 s.
        with contextlib.suppress(PackageNotFoundError):
            distribution(name)
            found.append(name)
    return found


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a session runs.

    Attributes:
        device: `"cpu"`, `"cuda"` or `"cuda:<index>"`.
        threads: Threads inside one operator, at least 1.
        spinning: Whether threads that wait for work keep their CPU busy for a moment.
        provider: `"auto"`: the device's own; or `"cuda"` or `"tensorrt"`.
        allow_tf32: Whether float32 products on a GPU may round to TF32.
    """

    device: str
    threads: int
    spinning: bool = True
    provider: str = "auto"
    allow_tf32: bool = False


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
        DeviceError: The session would not run where it was asked to; with ONNX Runtime's own reason.
        EngineError: ONNX Runtime refuses the graph; its words are kept.
    """
    if len(wheels := installed_wheels()) > 1:
        raise BrokenPluginError(
            f"{' and '.join(wheels)} are both installed and overwrite each other's files. "
            f"Repair it: {sys.executable} -m pip uninstall -y {' '.join(wheels)}, then "
            f"{pip_line('onnxruntime')} (or onnxruntime-gpu)"
        )
    device = settings.device
    wanted = providers_for(device, settings.provider, allow_tf32=settings.allow_tf32)
    provider = wanted[0][0]
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
    source = model if isinstance(model, bytes) else str(model)
    on_gpu = provider != CPU
    if on_gpu:
        require_driver(device)
        _load_cuda_libraries()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    capture: contextlib.AbstractContextManager[list[str]] = (
        captured() if on_gpu else contextlib.nullcontext([])
    )
    with capture as lines:
        try:
            session = ort.InferenceSession(
                source, options, providers=wanted, disabled_optimizers=None if on_gpu else _SLOWER
            )
        except Exception as error:
            session, problem = None, error
    if session is None:
        if on_gpu and cuda().problem:
            started_or_raise(device, provider, (), lines, error=problem)
        raise EngineError(f"onnxruntime {ort.__version__} cannot load {_name(model)}: {problem}") from problem
    # onnxruntime replaces a provider that does not start by the CPU, with a log line only.
    started_or_raise(device, provider, session.get_providers(), lines)
    if on_gpu:
        placement(session, device)
        # Warnings of ONNX Runtime were told to be kept back, and some of its parts do not know of that.
        sys.stderr.writelines(f"{line}\n" for line in lines if "[W:onnxruntime:" not in line)
    return session


@functools.cache
def _load_cuda_libraries() -> None:
    """Load the CUDA libraries that pip has installed: nothing else finds them where torch is not imported.

    What it has to say about those that it does not find is dropped: a provider that misses one says so itself.
    """
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls(directory="")


def _name(model: Path | bytes) -> str:
    return f"a graph of {len(model)} bytes" if isinstance(model, bytes) else str(model)
