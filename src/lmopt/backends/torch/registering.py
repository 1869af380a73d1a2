"""Let torch's exporter read its translations of operators once a process, not once an export."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

_NAME: Final = "from_torchlib"
# What is replaced for a moment is there once for the whole process.
_replacing = threading.RLock()


@contextlib.contextmanager
def known_operators() -> Iterator[None]:
    """Give torch's exporter the tables of translations that it made before, while the block runs.

    It parses the source code of a thousand functions for one, half a second of each export. Nothing is added to a table
    by exports that bring no translations of their own, and those of lmopt do not. Where torch has moved the place, it
    reads them again.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        reading = ONNXRegistry.__dict__[_NAME]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    with replacing(ONNXRegistry, _NAME, _remembering(reading.__func__, ONNXRegistry)):
        yield


@contextlib.contextmanager
def replacing(owner: Any, name: str, by: Any) -> Iterator[None]:
    """Replace something of torch's own while the block runs, in one thread at a time."""
    with _replacing:
        before = vars(owner)[name]
        setattr(owner, name, by)
        try:
            yield
        finally:
            setattr(owner, name, before)


@functools.cache
def _remembering(reading: Callable[..., Any], registry: type) -> Any:
    return staticmethod(functools.cache(functools.partial(reading, registry)))
