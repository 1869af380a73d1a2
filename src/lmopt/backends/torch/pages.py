"""Give memory back to the system that is not in use at the moment.

transformers maps a `safetensors` file instead of reading it. Once all weights have been read, for a hash
or by a forward pass, the whole file counts as memory of the process, and so do the libraries, beside
the copy that the engine under test makes.
"""

import ctypes
import itertools
import sys
from typing import Final

from torch import nn

from lmopt.mappings import FileMapping, drop_unwritten

# Reading what is mapped takes a hundredth of a second, and pages that are dropped are mapped again one by one.
_LARGE: Final = 64 << 20


def give_back(module: nn.Module) -> int:
    """Give back what the allocator keeps, and what was mapped of files and never written to.

    That is a module's weights, as far as they are mapped from a file and unchanged, and the code of shared
    libraries. Weights in memory of their own are left alone, and so is whatever another thread may unmap
    meanwhile. All of it can be used again at once; only writing to the weights by another thread during the
    call is not allowed. Does nothing where the system is not Linux, or the weights are less than 64 MiB.

    Args:
        module: Owner of the weights.

    Returns:
        Bytes of memory that were given back from mapped files.
    """
    if sys.platform != "linux" or not _is_large(module):
        return 0
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)
    weights = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(module.parameters(), module.buffers())
        if tensor.device.type == "cpu"
    }

    def ours(one: FileMapping) -> bool:
        # Of anybody else's mappings only those of libraries are sure to be there, unwritten, a moment later.
        library = not one.writable and ".so" in one.path.rpartition("/")[2]
        return one.private and (library or any(one.start <= start < one.end for start in weights))

    return drop_unwritten(ours)


def _is_large(module: nn.Module) -> bool:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return sum(one.numel() * one.element_size() for one in tensors) >= _LARGE
