"""Child processes that talk in frames over pipes and never outlive their parent.

A child is a fresh Python that runs one module of lmopt. It is no `multiprocessing` child: the caller's
`__main__` is not imported again, so scripts need no guard and notebooks work, and nothing is pickled. A frame
is a JSON object with NumPy arrays behind it.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final

import numpy as np

from lmopt import errors
from lmopt.errors import EngineError, LmoptError
from lmopt.types import AnyArray

_PARENT: Final = "LMOPT_PARENT_PROCESS"
_LENGTH: Final = struct.Struct(">Q")
_WATCH_S: Final = 0.5


class Channel:
    """Two pipe ends through which frames come and go.

    Args:
        source: Descriptor to read from.
        target: Descriptor to write to.
    """

    def __init__(self, source: int, target: int) -> None:
        self.source = source
        self._target = target
        self._lock = threading.Lock()

    def send(self, header: Mapping[str, Any], arrays: Sequence[AnyArray] = ()) -> None:
        """Send one frame.

        Args:
            header: Plain data.
            arrays: Numbers that go with it, of any shapes.

        Raises:
            OSError: Nobody reads any more.
        """
        parts = [np.ascontiguousarray(one) for one in arrays]
        kinds = [[part.dtype.str, list(part.shape)] for part in parts]
        text = json.dumps({"header": header, "arrays": kinds}).encode()
        with self._lock:
            self._write(_LENGTH.pack(len(text)) + text)
            for part in parts:
                self._write(part.reshape(-1).view(np.uint8).data)

    def receive(self) -> tuple[dict[str, Any], list[AnyArray]] | None:
        """Wait for the next frame.

        Returns:
            Header and arrays; `None` where the other side is gone, also in the middle of a frame.
        """
        length = self._read(_LENGTH.size)
        text = length and self._read(_LENGTH.unpack(length)[0])
        if not text:
            return None
        frame = json.loads(text)
        arrays: list[AnyArray] = []
        for kind, shape in frame["arrays"]:
            array = np.empty(shape, np.dtype(kind))
            if array.nbytes:
                content = self._read(array.nbytes)
                if content is None:
                    return None
                array = np.frombuffer(content, array.dtype).reshape(shape)
            arrays.append(array)
        return frame["header"], arrays

    def _write(self, content: bytes | memoryview) -> None:
        left = memoryview(content)
        while left.nbytes:
            left = left[os.write(self._target, left) :]

    def _read(self, size: int) -> bytearray | None:
        """Read so many bytes; unbuffered, so that `select` sees whatever is left."""
        content = bytearray(size)
        left = memoryview(content)
        while left.nbytes:
            try:
                count = os.readv(self.source, [left])
            except OSError:
                return None
            if not count:
                return None
            left = left[count:]
        return content


class Child:
    """A process that runs a module of lmopt; its stdin and stdout are the channel.

    Args:
        module: Module to run, which calls `serve`.
        environment: Variables to set for it.
        stderr: Open file that takes its stderr; `None` lets it share the caller's.
    """

    def __init__(
        self, module: str, *, environment: Mapping[str, str] | None = None, stderr: IO[bytes] | None = None
    ) -> None:
        places = [place or os.getcwd() for place in sys.path]
        self.process = subprocess.Popen(
            # -P: what lies in the working directory is not imported by accident.
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(places),
                _PARENT: str(os.getpid()),
                **(environment or {}),
            },
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.channel = Channel(self.process.stdout.fileno(), self.process.stdin.fileno())

    def end(self, grace_s: float = 0.0) -> str:
        """End the process, at once or after a time to leave by itself, and say how it ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        return ending(self.process.returncode)


def ending(status: int) -> str:
    """Say in words how a process ended.

    >>> ending(-9), ending(3)
    ('killed by SIGKILL', 'exit status 3')
    """
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def as_failure(error: Exception) -> dict[str, str]:
    """Write an error as plain data, for the parent; one that is not lmopt's own is shown on stderr, too."""
    if not isinstance(error, LmoptError):
        traceback.print_exception(error, file=sys.stderr)
    return {"type": type(error).__name__, "message": str(error)}


def from_failure(failure: Mapping[str, str]) -> LmoptError:
    """Make an error again from what `as_failure` wrote."""
    kind = getattr(errors, failure["type"], None)
    if isinstance(kind, type) and issubclass(kind, LmoptError):
        return kind(failure["message"])
    return EngineError(f"a process of lmopt failed: {failure['type']}: {failure['message']}")


def serve() -> Channel:
    """Make this process a child: take over stdin and stdout as channel, and end when the parent does.

    What libraries print goes to stderr. Ctrl-C is the parent's business.

    Returns:
        The channel to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, target = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    parent = int(os.environ.pop(_PARENT))
    threading.Thread(target=_watch, args=(parent,), name="lmopt-parent", daemon=True).start()
    return Channel(source, target)


def _watch(parent: int) -> None:
    """End this process when its parent is gone, whatever it is doing.

    Linux could send a signal (PR_SET_PDEATHSIG), but does so when the *thread* ends that started the child.
    """
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)
