"""Measure what rounding each weight would cost, and quantize under a budget."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmopt.backends.torch.calibration import Reading, find_stacks, gathering, prefixes
from lmopt.backends.torch.compressing import by_matrix
from lmopt.backends.torch.quantizing import find_weights, matrix_of, values_of
from lmopt.compression.mixed import Candidate, Mixed, choose_widths
from lmopt.compression.statistics import Statistics
from lmopt.compression.step import Setting
from lmopt.errors import InputError

# Tokens of a piece: logits and their gradients are held for so many at once.
_PIECE: Final = 256


def by_budget(module: nn.Module, step: Mixed, setting: Setting) -> nn.Module:
    """Choose a width for each weight, and quantize a copy of a module.

    Args:
        module: The module; it is only read.
        step: The budget, and how to quantize.
        setting: Calibration texts, and whom to tell.

    Raises:
        UnsupportedOptionError: The budget is too small.
        InputError: There are no calibration texts.
    """
    candidates = predicted(module, step, setting)
    free = {path for one in candidates for path in one.paths}
    budget = 0.0
    for one in find_weights(module, setting.vocab_size):
        form = step.quantizer.form(one.path, one.part)
        if form is not None and one.tied is None:
            rows, columns = matrix_of(module.get_submodule(one.path)).shape
            budget += step.average_bits / 8 * rows * columns
            if one.path not in free:
                budget -= form.nbytes(rows, columns)
    chosen = choose_widths(candidates, int(budget))
    options = step.options()
    forms = {
        path: options[choice] for one, choice in zip(candidates, chosen, strict=True) for path in one.paths
    }
    return by_matrix(module, step.with_forms(forms), setting)


def predicted(module: nn.Module, step: Mixed, setting: Setting) -> list[Candidate]:
    """Predict for each weight inside the model what each width costs, in nats of KL divergence a token.

    Args:
        module: The module; it is only read.
        step: Widths, and how to quantize.
        setting: Calibration texts, and whom to tell.

    Raises:
        InputError: There are no calibration texts.
    """
    if not setting.rows:
        raise InputError("step 'mixed' measures sensitivities on calibration texts; there are none")
    free = [
        one.path
        for one in find_weights(module, setting.vocab_size)
        if one.part == "linear" and one.tied is None and not step.quantizer.overridden(one.path)
    ]
    read, sent = _curvature(module, free, setting, step.tokens)
    candidates = []
    groups = _groups(module, {path: read[path] for path in free if path in read})
    for paths in groups:
        candidates.append(_candidate(module, paths, step, read, sent))
        setting.progress("try widths", len(candidates), len(groups))
    return candidates


def _curvature(
    module: nn.Module, paths: list[str], setting: Setting, most: int
) -> tuple[dict[str, Statistics], dict[str, NDArray[np.float64]]]:
    """Second moments of what linears read, and of the gradients at what they send, a token."""
    sent: dict[str, Tensor] = {}
    tokens = 0
    generator = torch.Generator().manual_seed(0)

    def watch(path: str) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            def add(gradient: Tensor) -> None:
                squares = gradient.detach().reshape(-1, gradient.shape[-1]).double().square().sum(0)
                sent[path] = sent[path] + squares if path in sent else squares

            if not result.requires_grad:
                # Gradients end here. A copy, since the model may write into what it is given.
                result = result.requires_grad_().clone()
            result.register_hook(add)
            return result

        return hook

    with gathering(module, paths) as gathered, ExitStack() as hooks:
        hooks.enter_context(_only_activations(module))
        for path in paths:
            hooks.callback(module.get_submodule(path).register_forward_hook(watch(path)).remove)
        pieces = _pieces(module, setting, most)
        for number, piece in enumerate(pieces):
            with torch.enable_grad():
                logits = piece.logits(module)[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
                # Any: torch's own annotations leave `backward` out.
                loss: Any = nn.functional.cross_entropy(
                    logits, drawn[:, 0].to(logits.device), reduction="sum"
                )
                loss.backward()
            tokens += len(drawn)
            setting.progress("sensitivities", number + 1, len(pieces))
        read = gathered()
    return read, {path: (squares / tokens).cpu().numpy() for path, squares in sent.items()}


@contextmanager
def _only_activations(module: nn.Module) -> Iterator[None]:
    """Let gradients flow to no weight: those of weights would double the memory."""
    wanted = [(one, one.requires_grad) for one in module.parameters()]
    for one, _ in wanted:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one, before in wanted:
            one.requires_grad_(before)


def _groups(module: nn.Module, read: dict[str, Statistics]) -> list[list[str]]:
    """Group the linears of each block by what they read; what an encoder gives is read in every block of a decoder."""
    blocks = prefixes(find_stacks(module))
    groups: dict[tuple[int, str], list[str]] = {}
    for path, one in read.items():
        home = next((block for block in blocks if path.startswith(block)), "")
        groups.setdefault((id(one), home), []).append(path)
    return list(groups.values())


def _candidate(
    module: nn.Module,
    paths: list[str],
    step: Mixed,
    read: dict[str, Statistics],
    sent: dict[str, NDArray[np.float64]],
) -> Candidate:
    """Predict what each form costs some weights, by the errors that the quantizer itself makes."""
    draft = step.quantizer.draft()
    steps = [replace(draft, bits=one["bits"], group_size=one["group_size"]) for one in step.options()]
    costs, sizes = np.zeros(len(steps)), np.zeros(len(steps), np.int64)
    for path in paths:
        weight = values_of(module.get_submodule(path))
        gram, slope = read[path].gram, sent[path]
        for number, quantizer in enumerate(steps):
            form = quantizer.form(path, "linear")
            assert form is not None
            error = weight - quantizer.apply(weight, form, path, read[path]).values()
            costs[number] += 0.5 * float(
                slope @ np.einsum("nk,nk->n", error @ gram, error).astype(np.float64)
            )
            sizes[number] += form.nbytes(len(weight), weight.shape[1])
    read[paths[0]].forget()
    return Candidate(tuple(paths), tuple(costs.tolist()), tuple(sizes.tolist()))


def _pieces(module: nn.Module, setting: Setting, most: int) -> list[Reading]:
    """Cut so many tokens of the texts into pieces; texts after sources stay whole."""
    if len(setting.sources):
        found: list[Reading] = []
        tokens = 0
        for row, source in zip(setting.rows, setting.sources, strict=True):
            if found and tokens + len(row) > most:
                break
            found.append(Reading.of(module, row, source))
            tokens += len(row)
        return found
    pieces = [row[start : start + _PIECE] for row in setting.rows for start in range(0, len(row), _PIECE)]
    kept = max(1, most // max(map(len, pieces)))
    return [Reading.of(module, piece) for piece in pieces[:kept]]
