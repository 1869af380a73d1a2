"""A second body for the same weights, to be changed freely while the original stays as it is."""

import copy
import itertools

from torch import Tensor, nn

from lmopt.backends.torch.fused.reason import InexpressibleError


def twin_of(module: nn.Module) -> nn.Module:
    """Copy a module's structure and configuration; parameters and buffers are shared.

    Raises:
        InexpressibleError: Something that hangs on the module cannot be copied.
    """
    shared: dict[int, object] = {}
    for part in module.modules():
        for value in itertools.chain(part._parameters.values(), part._buffers.values(), vars(part).values()):
            if isinstance(value, Tensor):
                shared[id(value)] = value
    try:
        return copy.deepcopy(module, shared)
    except Exception as error:
        raise InexpressibleError(
            f"{type(module).__name__} cannot be copied for a trace ({type(error).__name__}: {error})"
        ) from error
