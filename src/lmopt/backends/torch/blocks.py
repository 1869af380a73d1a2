"""Drop whole blocks of a copy of a model, chosen by what they do to what runs through them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lmopt.backends.torch.calibration import batches_of, entering, find_stack, logits_of
from lmopt.backends.torch.compressing import own, shallow_copy
from lmopt.backends.torch.language_model import device_of, is_transformers
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.quantizing import set_part
from lmopt.backends.torch.reconfiguring import reconfigure
from lmopt.backends.torch.resizing import Blocks, reindex, some_blocks, stated_widths, tell_structure
from lmopt.backends.torch.sameness import require_same
from lmopt.compression.depth import DropBlocks
from lmopt.compression.step import Setting
from lmopt.errors import InputError, UnsupportedError, UnsupportedOptionError
from lmopt.types import FloatArray

# Tokens that are run at once; the logits of a large vocabulary are the most of it.
_BATCH_TOKENS: Final = 1024
# Lists of a configuration that are not one entry a block, whatever their length.
_NOT_BY_BLOCK: Final = ("token", "architectures", "section")


def drop_blocks(module: nn.Module, step: DropBlocks, setting: Setting) -> nn.Module:
    """Apply `lmopt.compression.DropBlocks` to a copy of a module.

    Args:
        module: A transformers model or a module of one's own; it is only read.
        step: The step.
        setting: Calibration rows, and whom to tell.

    Returns:
        The copy, with fewer blocks. A transformers model's configuration says so.

    Raises:
        UnsupportedError: The module is no stack of blocks that hand one tensor on, or fixes their number.
        UnsupportedOptionError: All blocks would go, or the weights are quantized.
        InputError: There are no calibration rows, or a block computes NaN.
    """
    if quantized_parts(module):
        raise UnsupportedOptionError(
            f"{type(module).__name__} has quantized weights; drop blocks first and quantize then: "
            "Compressor([DropBlocks(...), Quantize(...)])"
        )
    if not len(setting.rows):
        raise InputError(f"step {step.name!r} must see the model read text: give calibration texts")
    whole = shallow_copy(module).eval()
    stack = find_stack(whole)
    if stack is None:
        raise UnsupportedError(f"{type(module).__name__} has no list of equal blocks, so none can be dropped")
    path, blocks = stack
    going = step.number(len(blocks))
    batches = batches_of(setting.rows, device_of(module), _BATCH_TOKENS)
    influences = block_influences(whole, blocks, batches, path)
    if step.score == "block-influence":
        dropped = step.choose(influences)
        setting.progress(step.name, 1, 1)
    else:
        step.choose(influences)  # refuses blocks that compute NaN
        dropped = _by_loss(
            whole, blocks, batches, going, lambda done, total: setting.progress(step.name, done, total)
        )
    kept = [place for place in range(len(blocks)) if place not in dropped]
    small = shallow_copy(module)
    ours: Any = small.get_submodule(path)
    if not is_transformers(module):
        reindex(ours, kept)
        tell_structure(small, blocks={path: kept})
    set_part(small, path, some_blocks(ours, kept))
    if is_transformers(module) and (reason := _reconfigure(small, path, kept, len(blocks))):
        raise UnsupportedError(f"{type(module).__name__} cannot do without blocks {dropped}: {reason}")
    with bypassed(blocks, dropped):
        require_same(small.eval(), whole, "dropping blocks")
    own(small, module)
    return small


def block_influences(
    module: nn.Module, blocks: Blocks, batches: Sequence[Tensor], path: str = "the list of blocks"
) -> FloatArray:
    """Measure `1 - mean cos(x, f(x))` of each block over all tokens (ShortGPT's block influence).

    Args:
        module: The model.
        blocks: Its blocks.
        batches: `(rows, tokens)` ids.
        path: Name of the list of blocks, for messages.

    Returns:
        `(blocks,)` float32, 0 for a block that changes nothing, up to 2.

    Raises:
        UnsupportedError: The blocks are not run one after the other, each on what the one before it gave.
    """
    totals = torch.zeros(len(blocks), dtype=torch.float64)
    order: list[int] = []
    last: list[Tensor] = []

    def watch(place: int) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            x, y = entering(args, kwargs), _leaving(result)
            if x is None or y is None or x.shape != y.shape:
                raise UnsupportedError(
                    f"{path}.{place} ({type(part).__name__}) hands no tensor on of the shape it takes"
                )
            if order and order[-1] + 1 == place and not (last[0] is x or torch.equal(last[0], x)):
                raise UnsupportedError(f"{path}.{place} does not read what the block before it gives")
            order.append(place)
            last[:] = [y]
            totals[place] += functional.cosine_similarity(x.float(), y.float(), dim=-1).double().sum().cpu()

        return hook

    with ExitStack() as hooks:
        for place, part in enumerate(blocks):
            hooks.callback(part.register_forward_hook(watch(place), with_kwargs=True).remove)
        for batch in batches:
            order.clear()
            with torch.no_grad():
                logits_of(module, batch)
            if order != list(range(len(blocks))):
                raise UnsupportedError(f"the blocks of {path} are not run once each, one after the other")
    tokens = sum(batch.numel() for batch in batches)
    influences: FloatArray = (1 - totals / tokens).float().numpy()
    return influences


@contextmanager
def bypassed(blocks: Blocks, places: Sequence[int]) -> Iterator[None]:
    """Let blocks hand on what they are given, as if they were not there."""

    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        x = entering(args, kwargs)
        return (x, *result[1:]) if isinstance(result, tuple) else x

    with ExitStack() as hooks:
        for place in places:
            hooks.callback(blocks[place].register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _by_loss(
    module: nn.Module,
    blocks: Blocks,
    batches: Sequence[Tensor],
    count: int,
    tell: Callable[[int, int], None],
) -> list[int]:
    """Drop one block after the other, each time the one without which the loss is least."""
    dropped: list[int] = []
    total = sum(len(blocks) - gone for gone in range(count))
    done = 0
    for _ in range(count):
        losses: dict[int, float] = {}
        for place in range(len(blocks)):
            if place in dropped:
                continue
            with bypassed(blocks, [*dropped, place]):
                losses[place] = sum(_loss(module, batch) for batch in batches)
            done += 1
            tell(done, total)
        if not np.isfinite(list(losses.values())).all():
            raise InputError(
                "the loss on the calibration texts is NaN or infinite: the model is damaged already"
            )
        dropped.append(min(losses, key=lambda place: losses[place]))
    return sorted(dropped)


def _loss(module: nn.Module, batch: Tensor) -> float:
    """Sum of the negative log-probabilities of a batch's tokens, each after those before it."""
    with torch.no_grad():
        logits = logits_of(module, batch)[:, :-1]
    return sum(
        float(functional.cross_entropy(one.float(), ids, reduction="sum"))
        for one, ids in zip(logits, batch[:, 1:], strict=True)
    )


def _reconfigure(small: Any, path: str, kept: list[int], blocks: int) -> str | None:
    text = small.config.get_text_config(decoder=True)
    changes: dict[str, Any] = {
        name: [value[place] for place in kept]
        for name, value in text.to_dict().items()
        if isinstance(value, list) and len(value) == blocks and not any(one in name for one in _NOT_BY_BLOCK)
    }
    changes["num_hidden_layers"] = len(kept)
    places = {f"{path}.{old}.": f"{path}.{place}." for place, old in enumerate(kept)}
    widths = {
        places[block] + name[len(block) :]: sizes
        for name, sizes in stated_widths(small).items()
        for block in places
        if name.startswith(block)
    }
    return reconfigure(small, [changes], may_differ=frozenset(widths), kept_blocks=(path, kept))


def _leaving(result: Any) -> Tensor | None:
    y = result[0] if isinstance(result, tuple) and result else result
    return y if isinstance(y, Tensor) else None
