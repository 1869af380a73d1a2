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
    except ImportError:
        yield
        return

    def remembering(reading: Any) -> Any:
        return _remembering(reading.__func__, ONNXRegistry)

    with replacing(ONNXRegistry, _NAME, remembering):
        yield


@contextlib.contextmanager
def replacing(owner: Any, name: str, by: Callable[[Any], Any]) -> Iterator[None]:
    """Replace something of torch's own while the block runs, in one thread at a time.

    Args:
        owner: What has it; nothing is replaced where it has it no more.
        name: Its name there.
        by: Makes what takes its place, given what is there.
    """
    with _replacing:
        before = vars(owner).get(name)
        if before is None:
            yield
            return
        setattr(owner, name, by(before))
        try:
            yield
        finally:
            setattr(owner, name, before)


@functools.cache
def _remembering(reading: Callable[..., Any], registry: type) -> Any:
    return staticmethod(functools.cache(functools.partial(reading, registry)))
