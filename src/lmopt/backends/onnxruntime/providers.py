"""Execution providers on a GPU: asked for by name, and an error with ONNX Runtime's own reason if they do not start."""

import contextlib
import io
import os
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Final

from lmopt.accelerators import cuda, require_cuda
from lmopt.errors import DeviceError, UnsupportedOptionError

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
NAMES: Final = ("auto", "cuda", "tensorrt")
"""Values of the option `provider`."""

# What a decoder spends its time in. Shapes and positions are rightly computed on the CPU; these are not.
_HEAVY: Final = frozenset(
    (
        "MatMul",
        "Gemm",
        "FusedMatMul",
        "MatMulNBits",
        "MatMulInteger",
        "QLinearMatMul",
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
        "LSTM",
        "GRU",
        "RNN",
    )
)
_WORDS: Final = re.compile(r"\[(?:E|W|F):onnxruntime:[^\]]*\]\s*(.*)")
_one_at_a_time = threading.Lock()


def providers_for(device: str, provider: str, *, allow_tf32: bool) -> list[tuple[str, dict[str, Any]]]:
    """List providers with their options, the wanted one first.

    Args:
        device: `"cpu"`, `"cuda"` or `"cuda:<index>"`.
        provider: One of `NAMES`; `"auto"` is the device's own.
        allow_tf32: Whether float32 products may round their factors to 10 bits of mantissa, as Ampere and later
            do where they are let.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return [(CPU, {})]
    place = {"device_id": index or "0"}
    plain = (CUDA, {**place, "use_tf32": str(int(allow_tf32))})
    # What TensorRT does not take goes to CUDA, not to the CPU.
    return [(TENSORRT, place), plain] if provider == "tensorrt" else [plain]


def check_options(device: str, provider: object, *, allow_tf32: bool, dtype: str) -> str:
    """Refuse a provider that does not go with the device; give it.

    Args:
        device: As asked for.
        provider: As asked for.
        allow_tf32: As asked for.
        dtype: What the graph computes in.

    Raises:
        UnsupportedOptionError: It is unknown, has no device to run on, or cannot be told to leave TF32 alone.
    """
    if provider not in NAMES:
        raise UnsupportedOptionError(
            f"provider={provider!r} is not possible; expected one of {', '.join(NAMES)}"
        )
    on_gpu = device.partition(":")[0] == "cuda"
    if not on_gpu and (provider != "auto" or allow_tf32):
        given = f"provider={provider!r}" if provider != "auto" else "allow_tf32=True"
        raise UnsupportedOptionError(f"{given} needs device='cuda'; given: device={device!r}")
    forbidden = os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
    if provider == "tensorrt" and dtype == "float32" and not allow_tf32 and not forbidden:
        raise UnsupportedOptionError(
            "ONNX Runtime's TensorRT provider has no option that keeps float32 products from rounding to TF32. Allow "
            "it with allow_tf32=True, or forbid it to the whole process: export NVIDIA_TF32_OVERRIDE=0. Backend "
            "'tensorrt' can build without it"
        )
    return str(provider)


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Keep what ONNX Runtime writes to standard error and output: the only place where it says why.

    The file descriptor itself is turned aside, as the lines are written by native code, for as long as a session is
    made; other threads that write meanwhile have their lines kept as well, and get them back if all goes well.

    Yields:
        A list that holds the lines after the block.
    """
    lines: list[str] = []
    with _one_at_a_time, tempfile.TemporaryFile() as kept, contextlib.ExitStack() as stack:
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        aside = os.dup(2)
        stack.callback(os.close, aside)
        os.dup2(kept.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(aside, 2)
            kept.seek(0)
            lines += kept.read().decode(errors="replace").splitlines() + said.getvalue().splitlines()


def started_or_raise(
    device: str, wanted: str, given: Iterable[str], lines: Iterable[str], *, error: Exception | None = None
) -> None:
    """Compare the providers of a session with the one that was wanted.

    Args:
        device: As asked for.
        wanted: Provider that should compute.
        given: `session.get_providers()`, empty where there is no session.
        lines: What was said while it was made.
        error: What was raised in its place.

    Raises:
        DeviceError: Another provider took the place of the one that was wanted; with the captured reason.
    """
    names = list(given)
    if names[:1] == [wanted]:
        return
    found = _WORDS.findall("\n".join(lines)) or ([str(error)] if error else [])
    # Which library is missing explains more than that the provider could not be made.
    found.sort(key=lambda one: "cannot open shared object" not in one and "Failed to load" not in one)
    said = found[0].rpartition(": FAIL : ")[2] if found else "it gave no reason"
    more = f" This machine: {cuda().problem}." if cuda().problem else ""
    instead = f"onnxruntime gave {', '.join(names)}" if names else "onnxruntime made no session"
    raise DeviceError(
        f"asked for {device!r}, but {instead}: {wanted} did not start: {said}.{more} "
        "Check the driver and CUDA libraries with `lmopt doctor`, or ask for device='cpu'"
    )


def require_driver(device: str) -> None:
    """Refuse a GPU that is not there before a provider is asked to start on it.

    Raises:
        DeviceError: With the reason that the probe has.
    """
    if not cuda().problem:
        require_cuda(device)


def placement(session: Any, device: str) -> dict[str, int]:
    """Count the nodes of a graph by the provider that computes them.

    Args:
        session: Made with `session.record_ep_graph_assignment_info`.
        device: As asked for.

    Raises:
        DeviceError: Products or attention of a graph for a GPU would be computed on the CPU.
    """
    counts: Counter[str] = Counter()
    strays: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        counts[part.ep_name] += len(nodes)
        if part.ep_name == CPU:
            strays.update(one.op_type for one in nodes if one.op_type in _HEAVY)
    if device.partition(":")[0] == "cuda" and strays:
        listed = ", ".join(f"{count} {name}" for name, count in strays.most_common())
        raise DeviceError(
            f"asked for {device!r}, but onnxruntime would compute on the CPU: {listed}. The provider has no kernel for "
            "them in this type; export the model in another dtype, or use another provider or backend"
        )
    return dict(counts)
