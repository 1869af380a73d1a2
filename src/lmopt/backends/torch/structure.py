"""Cut channels and heads out of a copy of a model, and prove that the copy computes what it should."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lmopt.backends.torch.calibration import stages
from lmopt.backends.torch.compressing import own, relative_error, shallow_copy
from lmopt.backends.torch.dependencies import Pieces, find_channels, find_heads
from lmopt.backends.torch.language_model import device_of, is_transformers
from lmopt.backends.torch.quantizing import matrix_of, set_matrix, values_of
from lmopt.backends.torch.reconfiguring import reconfigure, text_config, width_fields
from lmopt.backends.torch.resizing import cut, stated_widths, tell_structure
from lmopt.backends.torch.sameness import require_same
from lmopt.compression.channels import PruneChannels
from lmopt.compression.heads import PruneHeads
from lmopt.compression.pieces import importance, refit
from lmopt.compression.statistics import Statistics
from lmopt.compression.step import Setting
from lmopt.errors import InputError, UnsupportedError
from lmopt.types import FloatArray, IntArray

_Step = PruneChannels | PruneHeads


def prune_channels(module: nn.Module, step: PruneChannels, setting: Setting) -> nn.Module:
    """Apply `lmopt.compression.PruneChannels` to a copy of a module.

    Args:
        module: A transformers model or a module of one's own; it is only read.
        step: The step.
        setting: Calibration rows, and whom to tell.

    Returns:
        The copy, narrower. A transformers model's configuration says its new widths.

    Raises:
        UnsupportedError: The module has no channels that can be cut out, or fixes their number.
        UnsupportedOptionError: The share does not fit, or layers of unequal width were to be made equal.
        InputError: A weight or an activation is not finite, or there are no calibration rows.
    """
    found = find_channels(module, setting.vocab_size, setting.source)
    widths = {one.count for one in found}
    if step.uniform and len(widths) > 1:
        raise UnsupportedError(
            f"the layers of {type(module).__name__} are {', '.join(map(str, sorted(widths)))} channels wide, so they "
            "cannot all be given one width by the same share: PruneChannels(uniform=False)"
        )
    masked, kept = _masked(module, found, step, setting, together=not step.uniform)
    small, touched = _cut(masked, found, kept)
    if not is_transformers(module):
        tell_structure(small, widths=_sizes(small, touched))
    else:
        before = frozenset(stated_widths(module))
        if step.uniform:
            new = len(kept[found[0].consumer])
            tries, free = width_fields(small.config, found[0].count, new), before - touched
        else:
            tries, free = iter([{}]), before | touched
        if reason := reconfigure(small, tries, may_differ=free):
            raise UnsupportedError(
                f"{type(module).__name__} cannot be narrowed alike: {reason}. With PruneChannels(uniform=False) lmopt "
                "keeps the widths itself"
            )
    return _finished(module, small, masked, setting)


def prune_heads(module: nn.Module, step: PruneHeads, setting: Setting) -> nn.Module:
    """Apply `lmopt.compression.PruneHeads` to a copy of a module.

    Args:
        module: A transformers model or a module of one's own; it is only read.
        step: The step.
        setting: Calibration rows, and whom to tell.

    Returns:
        The copy, with fewer heads a layer. A transformers model's configuration says so.

    Raises:
        UnsupportedError: The module has no groups of heads that can be cut out, or fixes their number.
        UnsupportedOptionError: The share does not fit.
        InputError: A weight or an activation is not finite, or there are no calibration rows.
    """
    if setting.source is not None and is_transformers(module):
        raise UnsupportedError(
            f"{type(module).__name__} is an encoder-decoder of transformers: it computes the width of a head from its "
            "number of heads, or keeps a table with a column for each, so no configuration says that heads are gone. "
            "PruneChannels, Wanda, SparseGPT and quantizers take this model"
        )
    found = find_heads(module, setting.vocab_size, setting.source)
    masked, kept = _masked(module, found, step, setting, together=False)
    small, touched = _cut(masked, found, kept)
    if is_transformers(module):
        text = text_config(small.config)
        heads, groups, left = text.num_attention_heads, found[0].count, len(kept[found[0].consumer])
        size = len(found[0].columns) // heads
        changes = {"num_attention_heads": heads * left // groups, "head_dim": size}
        if getattr(text, "num_key_value_heads", None) is not None:
            changes["num_key_value_heads"] = text.num_key_value_heads * left // groups
        for one in found:
            _cut_per_head(small, one, kept[one.consumer], heads, size)
        if reason := reconfigure(small, [changes], may_differ=frozenset(stated_widths(module))):
            raise UnsupportedError(
                f"{type(module).__name__} with {changes['num_attention_heads']} heads of {size} is nothing that "
                f"transformers could load: {reason}. PruneChannels, DropBlocks and Wanda may fit this model"
            )
    else:
        tell_structure(small, widths=_sizes(small, touched))
    return _finished(module, small, masked, setting)


def _masked(
    module: nn.Module, found: list[Pieces], step: _Step, setting: Setting, *, together: bool
) -> tuple[nn.Module, dict[str, IntArray]]:
    """Choose pieces, and make a copy that reads the others as zeros; it has its own weights only where it must.

    Layers are masked in the order in which they read, so that each is scored and fitted on what the masked
    ones before it make of the texts.
    """
    if step.needs_texts and not len(setting.rows):
        raise InputError(
            f"step {step.name!r} must see the model read text: give calibration texts, or score='weight' with "
            "refit=False"
        )
    masked = shallow_copy(module).eval()
    by_path = {one.consumer: one for one in found}
    kept: dict[str, IntArray] = {}
    if together:
        scores: dict[str, FloatArray] = {}

        def score(one: Pieces, read: Statistics | None) -> None:
            scores[one.consumer] = _scores(masked, one, step, read)

        _each(masked, by_path, step, setting, score)
        kept = step.choose(scores)

    def mask(one: Pieces, read: Statistics | None) -> None:
        path = one.consumer
        if not together:
            kept.update(step.choose({path: _scores(masked, one, step, read)}))
        columns = _owned(one.columns, kept[path])
        before = values_of(masked.get_submodule(path))
        after = np.zeros_like(before)
        fits = step.refit and read is not None
        after[:, columns] = (
            refit(before, read.gram, columns, step.damping) if fits and read else before[:, columns]
        )
        part = masked.get_submodule(path)
        set_matrix(part, torch.from_numpy(after).to(matrix_of(part)))
        setting.errors[path] = relative_error(before, after, read)

    _each(masked, by_path, step, setting, mask)
    return masked, kept


def _each(
    module: nn.Module,
    found: Mapping[str, Pieces],
    step: _Step,
    setting: Setting,
    work: Callable[[Pieces, Statistics | None], None],
) -> None:
    """Call `work` for each linear, in the order in which they read, with what it reads."""
    done = 0
    with torch.no_grad():
        if not step.needs_texts:
            for one in found.values():
                work(one, None)
            return
        for stage in stages(module, setting, list(found)):
            for path, read in stage.statistics.items():
                work(found[path], read)
                done += 1
                setting.progress(step.name, done, len(found))
    if done < len(found):
        raise UnsupportedError(f"{len(found) - done} of {len(found)} layers have read no calibration text")


def _scores(module: nn.Module, one: Pieces, step: _Step, read: Statistics | None) -> FloatArray:
    producers = [
        (matrix_of(module.get_submodule(path)).detach().float().norm(dim=1).cpu().numpy(), owners)
        for path, owners in one.rows.items()
    ]
    return importance(
        step.score, values_of(module.get_submodule(one.consumer)), one.columns, producers, read, one.consumer
    )


def _cut(masked: nn.Module, found: list[Pieces], kept: Mapping[str, IntArray]) -> tuple[Any, frozenset[str]]:
    """Cut the masked pieces out of another copy; give it, and the paths of the linears that are smaller now."""
    small = shallow_copy(masked)
    device = device_of(masked)
    for one in found:
        left = kept[one.consumer]
        cut(small.get_submodule(one.consumer), None, torch.from_numpy(_owned(one.columns, left)).to(device))
        for path, owners in one.rows.items():
            cut(small.get_submodule(path), torch.from_numpy(_owned(owners, left)).to(device), None)
    return small, frozenset(path for one in found for path in (one.consumer, *one.rows))


def _cut_per_head(small: nn.Module, one: Pieces, kept: IntArray, heads: int, size: int) -> None:
    """Cut what an attention holds of each query head beside its linears, such as a sink's logit."""
    parent = small.get_submodule(one.consumer.rpartition(".")[0])
    left = np.unique(_owned(one.columns, kept) // size)
    for name, weight in list(parent._parameters.items()):
        if weight is not None and weight.dim() == 1 and len(weight) == heads:
            index = torch.from_numpy(left).to(weight.device)
            setattr(parent, name, nn.Parameter(weight.detach()[index], weight.requires_grad))


def _finished(module: nn.Module, small: nn.Module, masked: nn.Module, setting: Setting) -> nn.Module:
    """Hold the cut copy against the masked one, then give it weights of its own."""
    require_same(small.eval(), masked, "cutting", setting.source)
    own(small, module)
    return small


def _owned(owners: IntArray, kept: IntArray) -> IntArray:
    """Places of what belongs to the pieces that are kept."""
    return np.flatnonzero(np.isin(owners, kept)).astype(np.int64)


def _sizes(small: nn.Module, paths: frozenset[str]) -> dict[str, list[int]]:
    return {path: list(matrix_of(small.get_submodule(path)).shape) for path in sorted(paths)}
