"""What a transformers model calls its key-value cache: `cache` from transformers 5.24 on, which renamed it.

Before, and in code that comes with a model, it is `past_key_values`. The old name is still understood by
newer versions, but with a warning, and until 5.40 only. So each model is called by the name that its
own forward states.
"""

import inspect
from typing import Any, Final

from torch import nn

from lmopt.errors import UnsupportedError

NAMES: Final = ("past_key_values", "cache")


def parameters_of(module: nn.Module) -> list[str]:
    """Names that a module's forward takes, then those of the classes above if it hands `**kwargs` on."""
    above = [vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)]
    names: list[str] = []
    for forward in (module.forward, *above):
        parameters = inspect.signature(forward).parameters
        names += parameters
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            break
    return names


def cache_name(module: nn.Module) -> str:
    """Name the argument by which a transformers model takes its cache.

    Raises:
        UnsupportedError: It takes none.
    """
    if found := [name for name in parameters_of(module) if name in NAMES]:
        return found[0]
    raise UnsupportedError(
        f"{type(module).__name__} takes neither {' nor '.join(NAMES)}; lmopt runs causal language models that keep "
        "a key-value cache. Wrap it as a LanguageModel (lmopt.Model.from_module) to run it by its own state."
    )


def cache_of(result: Any) -> Any:
    """Take the cache out of what a transformers model returned.

    Its field need not have the argument's name: a model's own code may still say `past_key_values`
    where transformers' class of the result says `cache`.
    """
    return result.cache if hasattr(result, "cache") else result.past_key_values
