"""Find out what can be cut out of a model together, by what depends on what and not by names.

A `Probe` tells which rows of the linears that feed another reach which of its inputs:

- a *channel* of an MLP is an input that one row of each feeding linear reaches, at the same token, and
  nothing else does;
- a *group of heads* is a set of inputs and rows that reach each other, across tokens, and nothing else.

Both become `Pieces`. Where a norm, an expert or a cache mixes them, there is nothing to cut, and it is said where.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from lmopt.backends.torch.calibration import find_stack, find_stacks, prefixes
from lmopt.backends.torch.dependency_probe import Probe
from lmopt.errors import UnsupportedError
from lmopt.types import IntArray, SourceFacts

# Digits in which the number of an input is asked for: small enough for a bfloat16 to tell them apart.
_BASE: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What can be cut out of one linear's input, and of the linears that make it.

    Attributes:
        consumer: Path of the linear that reads the pieces.
        columns: `(in,)` int64, the piece that each of its inputs belongs to.
        rows: By path of each linear that makes them, `(out,)` int64, the piece of each of its rows.
        count: Number of pieces.
    """

    consumer: str
    columns: IntArray
    rows: Mapping[str, IntArray]
    count: int


def find_channels(module: nn.Module, vocab_size: int, source: SourceFacts | None = None) -> list[Pieces]:
    """Find the intermediate channels of every MLP.

    Args:
        module: A transformers model or a module of one's own.
        vocab_size: Width of the logits.
        source: What its encoder reads, `None` where it has none.

    Raises:
        UnsupportedError: A block has none that can be cut out; what mixes them is named.
        UnsupportedOptionError: The weights are quantized already.
    """
    probe = Probe(module, vocab_size, source)
    inside = {path: feeds for path, feeds in probe.closed().items() if not any(feeds.values())}
    found = _channels(probe, {path: list(feeds) for path, feeds in inside.items()})
    _require_every_block(_blocks(module, source), module, found, inside, "channels of an MLP")
    return found


def find_heads(module: nn.Module, vocab_size: int, source: SourceFacts | None = None) -> list[Pieces]:
    """Find the groups of heads of every attention: a key-value head with its query heads.

    Args:
        module: As for `find_channels`.
        vocab_size: As for `find_channels`.
        source: As for `find_channels`.

    Raises:
        UnsupportedError: As for `find_channels`.
        UnsupportedOptionError: As for `find_channels`.
    """
    probe = Probe(module, vocab_size, source)
    across = {path: feeds for path, feeds in probe.closed().items() if any(feeds.values())}
    found = _heads(probe, {path: list(feeds) for path, feeds in across.items()})
    _require_every_block(_blocks(module, source), module, found, across, "separate groups of attention heads")
    return found


def _channels(probe: Probe, feeds: Mapping[str, list[str]]) -> list[Pieces]:
    """Keep the linears of which each row that feeds them reaches one input."""
    sources = [source for several in feeds.values() for source in several]
    widths = {path: probe.inputs[path].shape[-1] for path in feeds}

    def pull(weights: Callable[[int], Tensor]) -> dict[str, Tensor]:
        seeds = {path: weights(width).to(probe.device) for path, width in widths.items()}
        return {path: one.float().flatten(0, -2) for path, one in probe.pull(seeds, sources).items()}

    plain = pull(lambda width: torch.ones(width))
    places = {path: one.abs().argmax(0, keepdim=True) for path, one in plain.items()}
    numbers = {
        path: torch.zeros(one.shape[-1], dtype=torch.int64, device=probe.device)
        for path, one in plain.items()
    }
    scale, widest = 1, max(widths.values(), default=0)
    while scale < widest:
        weighted = pull(lambda width, scale=scale: 1.0 + torch.arange(width) // scale % _BASE)  # type: ignore[misc]
        for path, one in weighted.items():
            ratio = one.gather(0, places[path]) / plain[path].gather(0, places[path])
            numbers[path] += scale * (ratio[0].nan_to_num(0.0).clamp(1, _BASE).round().long() - 1)
        scale *= _BASE
    # What the digits say is tried with two more sets of weights.
    tries = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            width: torch.randint(1, _BASE + 1, (width,), generator=generator)
            for width in set(widths.values())
        }
        tries.append((drawn, pull(lambda width, drawn=drawn: drawn[width].float())))  # type: ignore[misc]
    found = []
    for path, several in feeds.items():
        width = widths[path]
        rows: dict[str, IntArray] = {}
        for source in several:
            number = numbers[source].clamp(max=width - 1)
            good = (plain[source] != 0).any(0).all()
            for drawn, pulled in tries:
                expected = drawn[width].to(probe.device)[number] * plain[source]
                good &= ((pulled[source] - expected).abs() <= 0.05 * expected.abs()).all()
            owners = number.cpu().numpy().astype(np.int64)
            if bool(good) and len(set(np.bincount(owners, minlength=width).tolist())) == 1:
                rows[source] = owners
        if len(rows) == len(several):
            found.append(Pieces(path, np.arange(width, dtype=np.int64), rows, width))
    return found


def _heads(probe: Probe, feeds: Mapping[str, list[str]]) -> list[Pieces]:
    """Cut the inputs of each linear into sets that share rows of the linears that feed it."""
    columns = {path: torch.full((probe.inputs[path].shape[-1],), -1) for path in feeds}
    rows = {
        path: {one: torch.full((probe.noise[one].shape[-1],), -1) for one in feeds[path]} for path in feeds
    }
    sources = [source for several in feeds.values() for source in several]
    number = 0
    while True:
        chosen = {}
        for path, owners in columns.items():
            if bool((free := owners < 0).any()):
                chosen[path] = torch.zeros(len(owners), dtype=torch.bool)
                chosen[path][int(free.nonzero()[0])] = True
        if not chosen:
            break
        touched, growing = {}, True
        while growing:
            seeds = {
                path: probe.draw(*probe.inputs[path].shape) * mask.to(probe.device)
                for path, mask in chosen.items()
            }
            pulled = probe.pull(seeds, sources)
            touched = {source: (one != 0).flatten(0, -2).any(0) for source, one in pulled.items()}
            reached = probe.reached(touched)
            growing = False
            for path, mask in chosen.items():
                more = mask | reached[path].cpu()
                growing = growing or bool((more != mask).any())
                chosen[path] = more
        for path, mask in chosen.items():
            columns[path][mask] = number
            for source, owners in rows[path].items():
                owners[touched[source].cpu()] = number
        number += 1
    found = []
    for path, owners in columns.items():
        every = [owners, *rows[path].values()]
        counts = [torch.bincount(one.clamp(min=0), minlength=int(owners.max()) + 1) for one in every]
        alike = all(bool((one == one[0]).all()) and int(one[0]) > 0 for one in counts)
        if len(counts[0]) > 1 and alike and not any(bool((one < 0).any()) for one in every):
            own = {source: one.numpy().astype(np.int64) for source, one in rows[path].items()}
            found.append(Pieces(path, owners.numpy().astype(np.int64), own, len(counts[0])))
    return found


def _blocks(module: nn.Module, source: SourceFacts | None) -> list[str]:
    """Name the blocks, of encoder and decoder where there are both; the whole model where there are none."""
    longest = find_stack(module)
    return prefixes(find_stacks(module) if source else [longest] if longest else []) or [""]


def _require_every_block(
    blocks: Iterable[str], module: nn.Module, found: list[Pieces], tried: Iterable[str], what: str
) -> None:
    """Refuse a model with a block in which nothing was found, naming what stands in the way.

    Raises:
        UnsupportedError: See above.
    """
    for block in blocks:
        if any(one.consumer.startswith(block) for one in found):
            continue
        near = next((path for path in tried if path.startswith(block)), None)
        culprit = near.rpartition(".")[0] if near else _largest(module, block)
        kind = type(module.get_submodule(culprit)).__name__
        raise UnsupportedError(
            f"{culprit or type(module).__name__} ({kind}) has no {what} that could be cut out: "
            + (
                f"what {near} reads is one piece (a norm over all of it, or one key-value head for all)"
                if near
                else "no linear there reads what other linears of its own make (experts in one tensor, a recurrence, "
                "or products that are no modules)"
            )
            + ". DropBlocks, Wanda or a quantizer may fit this model"
        )


def _largest(module: nn.Module, block: str) -> str:
    """Path of the part of a block with most weights that are no linear's."""
    sizes = {
        path: sum(one.numel() for one in part.parameters(recurse=False))
        for path, part in module.named_modules()
        if path.startswith(block) and type(part) is not nn.Linear
    }
    return max(sizes, key=lambda path: sizes[path], default=block.rstrip("."))
