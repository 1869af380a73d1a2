"""Give memory back to the system that is not in use at the moment.

transformers maps a `safetensors` file instead of reading it. Once all weights have been read, for a hash
or by a forward pass, the whole file counts as memory of the process, and so do the libraries, beside
the copy that the engine under test makes. Pages of a mapped file that nobody has written to can be
dropped at any time: the next access maps them again out of the system's page cache.
"""

import ctypes
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from torch import nn

_MAPS: Final = Path("/proc/self/smaps")
_MADV_DONTNEED: Final = 4


def give_back(module: nn.Module) -> int:
    """Give back what the allocator keeps, and what was mapped of files and never written to.

    That is a module's weights, as far as they are mapped from a file and unchanged, and what cannot
    be written to, such as code. Weights in memory of their own are left alone. All of it can be used
    again at once; only writing to the weights by another thread during the call is not allowed. Does
    nothing where the system is not Linux.

    Args:
        module: Owner of the weights.

    Returns:
        Bytes of memory that were given back from mapped files.
    """
    if sys.platform != "linux":
        return 0
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)
    advise = library.madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    weights = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(module.parameters(), module.buffers())
        if tensor.device.type == "cpu"
    }
    given = 0
    for first, end, writable, resident in _unwritten():
        # A writable mapping of somebody else's might be written to between the look and the drop.
        ours = not writable or any(first <= start < end for start in weights)
        if ours and advise(first, end - first, _MADV_DONTNEED) == 0:
            given += resident
    return given


def _unwritten() -> Iterator[tuple[int, int, bool, int]]:
    """Find the private mappings of files that still are the files' content.

    Yields:
        First address, end address, whether it may be written to, and its bytes in memory.
    """
    try:
        lines = _MAPS.read_text(errors="replace").splitlines()
    except OSError:
        return
    first = end = resident = 0
    private_file = writable = False
    for line in lines:
        name, *rest = line.split()
        if not name.endswith(":"):  # addresses, permissions, offset, device, inode, path
            first, end = (int(part, 16) for part in name.split("-"))
            private_file, writable = rest[0].endswith("p") and rest[3] != "0", "w" in rest[0]
        elif name == "Rss:":
            resident = 1024 * int(rest[0])
        # Of a private mapping of a file: what was written to.
        elif name == "Anonymous:" and private_file and rest[0] == "0":
            yield first, end, writable, resident
