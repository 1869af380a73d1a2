"""Apply steps that change one matrix at a time: quantizers and pruners of single weights."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lmopt.backends.torch.calibration import Stage, shared, stages, whole_passes
from lmopt.backends.torch.pages import give_back
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.quantizing import Weight, find_weights, finite_values, put, tie
from lmopt.backends.torch.scaling import find_producer, multiply
from lmopt.compression.layout import QuantizedArray
from lmopt.compression.scaling import scaled
from lmopt.compression.statistics import Statistics
from lmopt.compression.step import Setting, UnknownModuleWarning
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray

# Modules that a warning names.
_NAMED: Final = 3
# Numbers of a weight whose error is computed at once.
_AT_ONCE: Final = 1 << 22


def by_matrix(module: nn.Module, step: Any, setting: Setting) -> nn.Module:
    """Apply a step to a copy of a module, weight by weight.

    Weights inside the model's blocks are changed block by block, each on what the changed blocks before it
    make of the texts, so that a block can make up for their errors.

    Args:
        module: The module; it is only read.
        step: Has `form(path, part)`, `check_names(paths)` and `apply(weight, form, name, statistics)`,
            which gives a `QuantizedArray` or a `(out, in)` float32 matrix.
        setting: Calibration texts, and whom to tell.

    Raises:
        InputError: A weight is not finite.
        UnsupportedOptionError: A pattern matches nothing, tied weights would be changed differently, or
            there is nothing to change.

    Warns:
        UnknownModuleWarning: Some matrices are in modules of another type, and stay as they are.
    """
    weights = find_weights(module, setting.vocab_size)
    step.check_names([one.path for one in weights])
    forms: Mapping[str, Any] = {one.path: step.form(one.path, one.part) for one in weights}
    _check_forms(module, weights, forms)
    _tell_unknown(module, weights, step.name)
    changing = [one for one in weights if forms[one.path] is not None]
    small = shallow_copy(module)
    tied: dict[str, list[str]] = {}
    for one in changing:
        if one.tied is not None:
            tied.setdefault(one.tied, []).append(one.path)
    left = {one.path for one in changing if one.tied is None}
    done = 0

    def change(path: str, statistics: Statistics | None) -> None:
        nonlocal done
        before = finite_values(small, path)
        changed = step.apply(before, forms[path], path, statistics)
        after = changed.values() if isinstance(changed, QuantizedArray) else changed
        setting.errors[path] = relative_error(before, after, statistics)
        activations = getattr(forms[path], "activations", None)
        first = put(small, path, changed, activations)
        for other in tied.get(path, ()):
            tie(small, other, first, activations)
        left.discard(path)
        done += 1
        setting.progress(step.name, done, len(changing) - sum(map(len, tied.values())))

    with torch.no_grad():
        # What is looked up comes first, so that the blocks are changed on what they will read.
        if step.needs_texts:
            readers = _readers_of_tied(changing, forms)
            for stage in whole_passes(small, setting, list(readers)):
                for path, statistics in stage.statistics.items():
                    change(readers[path], statistics)
            for one in changing:
                if one.part == "embedding" and one.path in left:
                    change(one.path, None)
            for stage in stages(small, setting, [one.path for one in changing if one.path in left]):
                found = _scale(small, stage, step, forms)
                for paths in shared(found):
                    for path in paths:
                        change(path, found[path])
                    found[paths[0]].forget()
                give_back(module)
        for path in sorted(left, key=[one.path for one in changing].index):
            change(path, None)
        own(small, module)
    return small.eval()


def _readers_of_tied(changing: Sequence[Weight], forms: Mapping[str, Any]) -> dict[str, str]:
    """Say which heads have the weight of an embedding: path of the head, to path of the embedding.

    A look-up has no input that is worth a statistic, and the head has. Of 8 bits, round to nearest loses too little
    for the time that a large vocabulary takes.
    """
    return {
        one.path: one.tied
        for one in changing
        if one.tied is not None and one.part == "head" and getattr(forms[one.path], "bits", 0) < 8
    }


def _scale(module: nn.Module, stage: Stage, step: Any, forms: Mapping[str, Any]) -> dict[str, Statistics]:
    """Scale inputs where the step wants to and a producer can take it; give the statistics after that."""
    found = dict(stage.statistics)
    choose = getattr(step, "scales", None)
    if choose is None or stage.run is None:
        return found
    for paths in stage.shared():
        readers: list[Any] = [module.get_submodule(path) for path in paths]
        statistics = stage.statistics[paths[0]]
        producer = find_producer(stage.parts, readers, stage.run)
        if producer is None:
            continue
        scales = choose(
            [finite_values(module, path) for path in paths], [forms[path] for path in paths], statistics
        )
        if scales is None:
            continue
        own = producer.own(torch.from_numpy(scales).to(readers[0].weight.device))
        spread = producer.spread(own)
        producer.divide(own)
        multiply(readers, spread)
        after = scaled(statistics, spread.cpu().numpy())
        found.update(dict.fromkeys(paths, after))
    return found


def relative_error(before: FloatArray, after: FloatArray, statistics: Statistics | None) -> float:
    """Compute `||(W - W') X|| / ||W X||`, over the weight alone where nothing is known of `X`."""
    over = of = 0.0
    # Some rows at a time: a head has many.
    step = max(1, _AT_ONCE // before.shape[1])
    for start in range(0, len(before), step):
        kept = before[start : start + step]
        error = kept - after[start : start + step]
        if statistics is None:
            over, of = over + float(np.vdot(error, error)), of + float(np.vdot(kept, kept))
        else:
            over += float(np.vdot(error @ statistics.gram, error))
            of += float(np.vdot(kept @ statistics.gram, kept))
    return float(np.sqrt(max(over, 0.0) / of)) if of > 0 else 0.0


def shallow_copy(module: nn.Module) -> nn.Module:
    """Copy a module that shares every weight with the original, until a part is replaced."""
    memo: dict[int, Any] = {id(one): one for one in (*module.parameters(), *module.buffers())}
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied


def own(small: nn.Module, original: nn.Module) -> None:
    """Give a copy weights of its own in place of those that it still shares with the original."""
    shared = {id(one) for one in (*original.parameters(), *original.buffers())}
    copies: dict[int, Tensor] = {}

    def fresh(one: Tensor) -> Tensor:
        if id(one) not in copies:
            made = one.detach().clone()
            copies[id(one)] = nn.Parameter(made, one.requires_grad) if isinstance(one, nn.Parameter) else made
        return copies[id(one)]

    for part in small.modules():
        for group in (part._parameters, part._buffers):
            for name, one in group.items():
                if one is not None and id(one) in shared:
                    group[name] = fresh(one)  # type: ignore[assignment]


def _check_forms(module: nn.Module, weights: list[Weight], forms: Mapping[str, Any]) -> None:
    for one in weights:
        if one.tied is not None and forms[one.path] != forms[one.tied]:
            raise UnsupportedOptionError(
                f"{one.path} and {one.tied} are one weight (tied); the step asks for {_told(forms[one.path])} and "
                f"{_told(forms[one.tied])}. Give both the same, such as embedding=8, head=8"
            )
    if all(form is None for form in forms.values()):
        raise UnsupportedOptionError(
            f"{type(module).__name__} has no linear or embedding that this step would change"
            + (" (its weights are quantized already)" if quantized_parts(module) else "")
        )


def _tell_unknown(module: nn.Module, weights: list[Weight], name: str) -> None:
    """Warn of matrices that no step changes: a recurrence's, a convolution's, experts in one tensor."""
    known = {one.path for one in weights}
    unknown: dict[str, int] = {}
    for path, part in module.named_modules():
        # Of embeddings, the tokens' is meant; positions are few, and looked up.
        if path in known or isinstance(part, nn.Embedding):
            continue
        count = sum(one.numel() for one in part.parameters(recurse=False) if one.dim() > 1)
        if count:
            unknown[path] = count
    if not unknown:
        return
    largest = sorted(unknown, key=lambda path: -unknown[path])
    listed = [
        f"{path or 'the model itself'} ({type(module.get_submodule(path)).__name__}, {unknown[path]:,} weights)"
        for path in largest[:_NAMED]
    ]
    more = f" and {len(largest) - _NAMED} more" if len(largest) > _NAMED else ""
    warnings.warn(
        f"step {name!r} changes nn.Linear, GPT-2's Conv1D and the token embedding. Of the model's weights, "
        f"{sum(unknown.values()) / max(1, sum(one.numel() for one in module.parameters())):.1%} are in modules of "
        f"other types and stay as they are: {', '.join(listed)}{more}",
        UnknownModuleWarning,
        stacklevel=2,
    )


def _told(form: Any) -> str:
    if form is None:
        return "to leave it as it is"
    return f"{form.bits} bits in groups of {form.group_size}" if hasattr(form, "bits") else str(form)
