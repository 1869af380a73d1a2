"""Put a copy of a model into a half precision type, except for modules that would leave its range.

Where types meet, values are cast: a module in the half type casts what it reads to it, a module in float32 to
float32 and what it gives back to the half type, unless that is what does not fit. All of it is hooks around
modules, which a trace sees as `Cast`.
"""

import copy
import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmopt.backends.torch.calibration import read_all
from lmopt.backends.torch.compressing import own, shallow_copy
from lmopt.backends.torch.language_model import CASTS, is_transformers, stated_casts
from lmopt.backends.torch.quantized import Quantized
from lmopt.compression.cast import LARGEST, SMALLEST, Cast
from lmopt.compression.step import Setting
from lmopt.errors import CorruptArtifactError, InputError, UnsupportedOptionError

_BATCH_TOKENS: Final = 512


def cast(module: nn.Module, step: Cast, setting: Setting) -> nn.Module:
    """Apply `lmopt.compression.Cast` to a copy of a module.

    Args:
        module: A transformers model or a module of one's own, in float32; it is only read.
        step: The step.
        setting: Calibration rows, if there are any, and whom to tell.

    Returns:
        The copy. Which modules stayed in float32 is noted on it, see `stated_casts`.

    Raises:
        InputError: A weight or an activation is not finite in float32 already.
        UnsupportedOptionError: It is in another type, was cast before, or nothing of it can be cast.
    """
    others = {str(one.dtype) for one in module.parameters() if one.is_floating_point()} - {"torch.float32"}
    if others or stated_casts(module):
        raise UnsupportedOptionError(
            f"{type(module).__name__} holds {', '.join(sorted(others)) or 'casts'} already; Cast is for models in "
            "float32: lmopt.Model.from_pretrained(..., dtype='float32')"
        )
    parts = {path: part for path, part in module.named_modules() if path}
    step.check_names(parts)
    kept: dict[str, bool] = {}  # by path, whether what it gives is too large for the type
    for path, part in parts.items():
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in step.keep) or _unfit(part, path, step.dtype):
            kept[path] = False
    if setting.rows:
        for path, wide in _leaving(module, step.limit, setting).items():
            kept[path] = kept.get(path, False) or wide
    small = shallow_copy(module).eval()
    with torch.no_grad():
        described = {"dtype": step.dtype, "float32": _outermost(kept)}
        if "" in described["float32"] or not apply_casts(small, described, type(module).__name__):
            raise UnsupportedOptionError(
                f"no weight of {type(module).__name__} can be {step.dtype}: its activations reach {step.limit:g}, a "
                f"{step.headroom:g}th of the largest number, throughout. Try Cast(dtype='bfloat16')"
            )
        own(small, module)
    return small


def apply_casts(module: nn.Module, casts: Any, name: str) -> int:
    """Bring a module in float32 into the types in which weights were saved, and note that on it.

    Args:
        module: The module; it is changed.
        casts: `{"dtype": type, "float32": {path: wide}}`, see `stated_casts`.
        name: What is loaded, for messages.

    Returns:
        How many weights are in the half type now.

    Raises:
        CorruptArtifactError: It is malformed, or does not fit the module.
    """
    kept = casts.get("float32") if isinstance(casts, Mapping) else None
    parts = dict(module.named_modules())
    if not isinstance(kept, Mapping) or casts.get("dtype") not in LARGEST or kept.keys() - parts.keys():
        raise CorruptArtifactError(f"{CASTS} of {name} is malformed, or tells of parts that it lacks")
    half = getattr(torch, casts["dtype"])
    inside = {one for path in kept for one in parts if one == path or one.startswith(path + ".")}
    shared = {id(weight) for path in inside for weight in parts[path].parameters(recurse=False)}
    made: dict[int, nn.Parameter] = {}
    for path, part in parts.items():
        if path in kept:
            _Border(torch.float32, None if kept[path] else half).around(part)
        if path in inside or isinstance(part, Quantized):
            continue
        weights = {key: one for key, one in part._parameters.items() if one is not None}
        for key, one in weights.items():
            # A weight that is tied to one in float32 stays so; whoever reads it is cast to.
            if one.is_floating_point() and id(one) not in shared:
                if id(one) not in made:
                    made[id(one)] = nn.Parameter(one.detach().to(half), one.requires_grad)
                part._parameters[key] = made[id(one)]
        if weights and path:
            mixed = any(id(one) in shared for one in weights.values())
            _Border(torch.float32 if mixed else half, half).around(part)
    stated: Any = module
    noted = {"dtype": casts["dtype"], "float32": dict(kept)}
    if is_transformers(module):
        setattr(stated.config, CASTS, noted)
        stated.config.dtype = half
    else:
        stated.lmopt_casts = noted
    return len(made)


def in_float32(module: nn.Module) -> nn.Module:
    """Copy a module of half types in float32: the same weights, and nothing rounds between them."""
    wide = copy.deepcopy(module)
    forget_casts(wide)
    return wide.float()


def forget_casts(module: nn.Module) -> None:
    """Take the casts off a module that is to compute in one type."""
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [
                key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Border)
            ]:
                del hooks[key]


class _Border:
    """Casts what enters and leaves a module.

    Args:
        inner: Type of what enters.
        outer: Type of what leaves, `None` to leave it.
    """

    def __init__(self, inner: torch.dtype, outer: torch.dtype | None) -> None:
        self.inner, self.outer = inner, outer

    def around(self, part: nn.Module) -> None:
        part.register_forward_pre_hook(self.enter, with_kwargs=True)
        if self.outer is not None and self.outer != self.inner:
            part.register_forward_hook(self.leave)

    def enter(self, part: nn.Module, args: Any, kwargs: Any) -> Any:
        return _to(args, self.inner), _to(kwargs, self.inner)

    def leave(self, part: nn.Module, args: Any, result: Any) -> Any:
        assert self.outer is not None
        return _to(result, self.outer)


def _to(values: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floats else value

    # A cache of transformers is no tree, and keeps what it holds.
    return pytree.tree_map(one, values)


def _unfit(part: nn.Module, path: str, dtype: str) -> bool:
    """Whether a module's own weights leave the range of a type at either end."""
    for key, weight in part.named_parameters(recurse=False):
        if not weight.is_floating_point() or not weight.numel():
            continue
        most = float(weight.detach().abs().max())
        if not most < float("inf"):
            raise InputError(f"{path}.{key} holds NaN or infinity: the model is damaged already")
        if most > LARGEST[dtype] or 0 < most < SMALLEST[dtype]:
            return True
    return False


def _leaving(module: nn.Module, limit: float, setting: Setting) -> dict[str, bool]:
    """Read the texts; find modules that go beyond a limit, and whether with what they give."""
    found: dict[str, bool] = {}
    given: dict[int, Tensor] = {}  # what modules gave in this pass, kept alive so that identities hold

    def watch(path: str) -> Any:
        def hook(part: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            for tensor in _floats((args, kwargs)):
                if not _within(tensor, limit, path):
                    found.setdefault(path, False)
                    # What arises between modules arises in the one around them.
                    if id(tensor) not in given:
                        found.setdefault(path.rpartition(".")[0], False)
            for tensor in _floats(result):
                given[id(tensor)] = tensor
                if not _within(tensor, limit, path):
                    found[path] = True

        return hook

    with ExitStack() as hooks:
        for path, part in module.named_modules():
            if path:
                handle = part.register_forward_hook(watch(path), with_kwargs=True)
                hooks.callback(handle.remove)

        def done(place: int, count: int) -> None:
            setting.progress("measure ranges", place, count)
            given.clear()

        read_all(module, setting, tokens=_BATCH_TOKENS, done=done)
    return found


def _within(tensor: Tensor, limit: float, path: str) -> bool:
    if not tensor.numel():
        return True
    most = float(tensor.abs().max())
    # A mask's lowest number is no value that anything is computed from.
    if most >= torch.finfo(tensor.dtype).max and bool((tensor <= 0).all()):
        return True
    if not most < float("inf"):
        raise InputError(f"{path} computes NaN or infinity: the model is damaged already")
    return most <= limit


def _floats(values: Any) -> Iterator[Tensor]:
    for one in pytree.tree_leaves(values):
        if isinstance(one, Tensor) and one.is_floating_point():
            yield one


def _outermost(kept: Mapping[str, bool]) -> dict[str, bool]:
    """Leave out modules inside of others; one that hands on what an inner one gives too large does so too."""
    outer = {
        path: wide for path, wide in kept.items()
        if not any(path != other and (other == "" or path.startswith(other + ".")) for other in kept)
    }  # fmt: skip
    return dict(sorted(outer.items()))
