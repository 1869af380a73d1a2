"""Let a transformers model's configuration say what was cut out of the model.

Nothing is believed of the names of fields beyond the three that transformers itself gives every model
(`num_attention_heads`, `num_key_value_heads`, `num_hidden_layers`): a change of the configuration counts when a
model that transformers builds from it, without memory for its weights, has the very shapes that are there.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers.initialization import no_init_weights

from lmopt.backends.torch.loading import quiet
from lmopt.backends.torch.quantizing import is_conv1d, matrix_of
from lmopt.backends.torch.resizing import WIDTHS

# Where a field of no value stands for a multiple of another size, its name says that it is a width.
_WIDTH_NAMES: Final = re.compile("inner|intermediate|ffn|ffw|mlp")
_PLAIN: Final = (bool, int, float, str, type(None), tuple, list)


def reconfigure(
    small: Any,
    candidates: Iterable[Mapping[str, Any]],
    *,
    may_differ: frozenset[str] = frozenset(),
    kept_blocks: tuple[str, Sequence[int]] | None = None,
) -> str | None:
    """Give a cut model a configuration that it could be built from.

    Args:
        small: The cut model; its configuration, and the plain attributes of its parts that follow from it,
            are changed. Its weights are only looked at.
        candidates: Changes of the text configuration, by field, to try in turn.
        may_differ: Paths of linears whose sizes the configuration need not give: `lmopt_widths` does.
        kept_blocks: Path of the list of blocks, and the places of those that are left, where some went.

    Returns:
        `None`, or why no candidate fits.
    """
    text = text_config(small.config)
    before = _built(small, copy.deepcopy(small.config))
    reason = "its configuration has no field for it"
    for changes in candidates:
        trial = copy.deepcopy(small.config)
        changed = text_config(trial)
        for field, value in changes.items():
            setattr(changed, field, value)
        try:
            after = _built(small, trial)
        except Exception as error:
            reason = f"transformers builds none with {dict(changes)}: {type(error).__name__}: {error}"
            continue
        widths = _differing(small, after)
        if widths is None or not widths.keys() <= may_differ:
            reason = f"with {dict(changes)} transformers builds other shapes" + _told(widths)
            continue
        old_place = _old_places(kept_blocks)
        if strange := _other_kind(before, after, kept_blocks, old_place):
            return strange
        _follow(small, before, after, old_place)
        for field, value in changes.items():
            setattr(text, field, value)
        small.config.__dict__.pop(WIDTHS, None)
        if widths:
            setattr(small.config, WIDTHS, widths)
        return None
    return reason


def text_config(config: Any) -> Any:
    """Give the part of a configuration that tells of the text model; of an encoder-decoder, all of it."""
    # Of these transformers gives a copy with one half, which changes nothing.
    both = getattr(config, "is_encoder_decoder", False)
    return config if both else config.get_text_config(decoder=True)


def width_fields(config: Any, old: int, new: int) -> Iterator[dict[str, Any]]:
    """Propose fields that may hold the width of the MLPs: of its value, one or all of such names, then unset ones."""
    values = text_config(config).to_dict()
    equal = [name for name, value in values.items() if type(value) is int and value == old]
    yield from ({name: new} for name in equal)
    yield {name: new for name in equal if _WIDTH_NAMES.search(name)}
    yield from ({name: new} for name, value in values.items() if value is None and _WIDTH_NAMES.search(name))


def _built(small: Any, config: Any) -> nn.Module:
    """Build a model without weights from what a file with a configuration would bring back."""
    attention = config._attn_implementation
    # `from_dict` is what a loader calls: fields that it does not take over are seen here.
    restored = type(config).from_dict(config.to_dict())
    restored._attn_implementation = attention
    with quiet(), no_init_weights(), torch.device("meta"):
        built: nn.Module = type(small)._from_config(restored, dtype=small.dtype)
    return built


def _differing(small: nn.Module, built: nn.Module) -> dict[str, list[int]] | None:
    """Sizes of the linears that are not as built; `None` where anything else differs."""
    ours, theirs = small.state_dict(), built.state_dict()
    if ours.keys() != theirs.keys():
        return None
    found: dict[str, list[int]] = {}
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            path = name.rpartition(".")[0]
            part = small.get_submodule(path)
            if type(part) is not nn.Linear and not is_conv1d(part):
                return None
            found[path] = list(matrix_of(part).shape)
    return found


def _told(widths: Mapping[str, Sequence[int]] | None) -> str:
    return f" than {next(iter(widths.items()))}" if widths else ""


def _old_places(kept: tuple[str, Sequence[int]] | None) -> dict[str, str]:
    """Prefixes of the blocks' paths now, to those before."""
    if kept is None:
        return {}
    return {f"{kept[0]}.{place}": f"{kept[0]}.{old}" for place, old in enumerate(kept[1])}


def _pairs(before: nn.Module, after: nn.Module, places: Mapping[str, str]) -> Iterator[tuple[str, Any, Any]]:
    """Parts of a model before and after, by their path after."""
    parts = dict(before.named_modules())
    depth = next(iter(places)).count(".") + 1 if places else 0
    for path, part in after.named_modules():
        head = ".".join(path.split(".")[:depth])
        old = places[head] + path[len(head) :] if places and head in places else path
        if old in parts:
            yield path, parts[old], part


def _plain(part: nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(part).items() if isinstance(value, _PLAIN) and name != "training"
    }


def _other_kind(
    before: nn.Module, after: nn.Module, kept: tuple[str, Sequence[int]] | None, places: Mapping[str, str]
) -> str | None:
    """Say which block would be of another kind at its new place; `None` where each stays what it is."""
    if kept is None:
        return None
    for path, old, new in _pairs(before, after, places):
        if not path.startswith(f"{kept[0]}."):
            continue
        place = int(path[len(kept[0]) + 1 :].partition(".")[0])
        ours, theirs = _plain(old), _plain(new)
        for name, value in theirs.items():
            counts = type(value) is int and value == place and ours.get(name) == kept[1][place]
            if ours.get(name) != value and not counts:
                return (
                    f"block {kept[1][place]} would become block {place}, where transformers builds another kind "
                    f"({name} of {path} is {value!r}, was {ours.get(name)!r})"
                )
    return None


def _follow(small: nn.Module, before: nn.Module, after: nn.Module, places: Mapping[str, str]) -> None:
    """Change the plain attributes that the change of configuration changes."""
    for path, old, new in _pairs(before, after, places):
        part, was = small.get_submodule(path), _plain(old)
        for name, value in _plain(new).items():
            if was.get(name) != value:
                setattr(part, name, value)
