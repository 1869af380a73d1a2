"""Show linears what they read on calibration texts, block by block, while earlier blocks change.

Where a model is a stack of equal blocks, each is run by itself on what the ones before it have made of the
texts: two passes over the texts in all, and no more in memory than the texts' hidden states. That a stack may be
run so is not believed but tried: the first texts must come out of it as they come out of the model. Everything
else is run as a whole, as often as the statistics take to fit into memory; so are encoder-decoders, whose blocks are
run by themselves on the first pair only, to see what scales can be moved where.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lmopt.backends.torch.attention import own_attention
from lmopt.backends.torch.encoder_decoder import as_read
from lmopt.backends.torch.language_model import device_of, is_transformers
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.quantizing import matrix_of
from lmopt.backends.torch.resizing import Blocks
from lmopt.compression.statistics import Statistics
from lmopt.compression.step import Setting
from lmopt.types import AnyArray, IntArray

# Tokens that are run at once.
_BATCH_TOKENS: Final = 4096
# Bytes of statistics at once where a model has no blocks.
_MOST_BYTES: Final = 1 << 29


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model reads in one pass.

    Attributes:
        ids: `(rows, tokens)` int64, of a decoder.
        inputs: `(rows, ...)`, what its encoder reads before them; `None` where it has none.
    """

    ids: Tensor
    inputs: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, row: IntArray, source: AnyArray | None = None) -> "Reading":
        """Put one row, and the source before it, where a module is, features in its type."""
        ids = torch.from_numpy(np.ascontiguousarray(row, np.int64))[None].to(device_of(module))
        if source is None:
            return cls(ids)
        return cls(ids, as_read(module, torch.from_numpy(np.ascontiguousarray(source))[None]))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)

    def first(self) -> "Reading":
        """Give the first row alone."""
        return Reading(self.ids[:1], None if self.inputs is None else self.inputs[:1])

    def logits(self, module: nn.Module) -> Tensor:
        """Let a module read it; see `logits_of`."""
        return logits_of(module, self.ids, self.inputs)


@dataclass(frozen=True, slots=True)
class Stage:
    """Some linears of a model, and what they have read.

    Whoever iterates may change these linears before asking for the next stage, which sees the change.

    Attributes:
        statistics: By path; linears that read one tensor have one object.
        parts: Parts of the model among which is what makes the linears' inputs, as far as that may be scaled.
        run: Runs them on a piece of text.
    """

    statistics: dict[str, Statistics]
    parts: Sequence[nn.Module] = ()
    run: Callable[[], Tensor] | None = None

    def shared(self) -> list[list[str]]:
        """Group the linears by what they read."""
        return shared(self.statistics)


def shared(statistics: Mapping[str, Statistics]) -> list[list[str]]:
    """Group linears by what they read: those that read one tensor have one object."""
    groups: dict[int, list[str]] = {}
    for path, one in statistics.items():
        groups.setdefault(id(one), []).append(path)
    return list(groups.values())


def stages(module: nn.Module, setting: Setting, wanted: Sequence[str]) -> Iterator[Stage]:
    """Go through a model in the order of computation.

    Args:
        module: The model, in evaluation mode.
        setting: Has the calibration texts. Where they come after sources, the model is run as a whole: its decoder's
            blocks are told something else for each of them.
        wanted: Paths of the linears whose input is asked for.

    Yields:
        Every wanted linear once, as far as the texts reach it.
    """
    if len(setting.sources):
        yield from _stages_after_sources(module, setting, wanted)
        return
    stack = find_stack(module)
    inside: set[str] = set()
    run = None if stack is None else _Stack.of(module, stack, readings(module, setting, _BATCH_TOKENS))
    if run is not None:
        for number, (path, _) in enumerate(run.blocks):
            paths = [one for one in wanted if one.startswith(path + ".")]
            inside.update(paths)
            if paths:
                with gathering(module, paths) as gathered:
                    run.read(number)
                parts = list(run.blocks[number][1].modules())
                yield Stage(gathered(), parts, partial(run.sample, number))
            run.advance(number)
    rest = [one for one in wanted if one not in inside]
    yield from whole_passes(module, setting, rest)


def _stages_after_sources(module: nn.Module, setting: Setting, wanted: Sequence[str]) -> Iterator[Stage]:
    """Show linears of an encoder-decoder what they read in whole passes, those of each block together.

    The statistics are the unchanged model's. What linears of several blocks read, as all layers of a decoder read
    what the encoder gives, comes last, with the parts outside of the blocks and in the last of each list.
    """
    first = Reading.of(module, setting.rows[0], setting.sources[0])
    blocks: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    outside = dict.fromkeys(module.modules())
    for stack in find_stacks(module):
        for block in list(stack[1])[:-1]:
            for one in block.modules():
                outside.pop(one, None)
        if (run := _Stack.of(module, stack, [first])) is not None:
            for number, (path, block) in enumerate(run.blocks):
                blocks[path] = block, partial(run.sample, number)

    def home(path: str) -> str:
        return next((block for block in blocks if path.startswith(block + ".")), "")

    for stage in whole_passes(module, setting, wanted, together=lambda path: home(path) or path):
        found: dict[str, dict[str, Statistics]] = {block: {} for block in (*blocks, "")}
        for paths in stage.shared():
            homes = {home(path) for path in paths}
            found[homes.pop() if len(homes) == 1 else ""].update(
                (path, stage.statistics[path]) for path in paths
            )
        for path, statistics in found.items():
            if not statistics:
                continue
            if path:
                block, run_block = blocks[path]
                yield Stage(statistics, list(block.modules()), run_block)
            else:
                yield Stage(statistics, list(outside) if blocks else (), partial(_logits, module, first))


def whole_passes(
    module: nn.Module,
    setting: Setting,
    wanted: Sequence[str],
    together: Callable[[str], str] = str,
) -> Iterator[Stage]:
    """Run a whole model, as often as the statistics take to fit into memory.

    Args:
        module: As for `stages`.
        setting: As for `stages`.
        wanted: As for `stages`.
        together: Names what a path belongs to; neighbours of one name are watched in one run.
    """
    for paths in _affordable(module, wanted, together):
        with gathering(module, paths) as gathered:
            read_all(module, setting, tokens=1)
        yield Stage(gathered())


def read_all(
    module: nn.Module, setting: Setting, *, tokens: int, done: Callable[[int, int], None] | None = None
) -> None:
    """Let a module read every calibration text once; what it makes of them is seen by whoever watches its parts.

    Args:
        module: The model, in evaluation mode.
        setting: Has the texts, and what an encoder reads before each.
        tokens: As for `readings`.
        done: Called after each pass with the passes so far and their number.
    """
    passes = readings(module, setting, tokens)
    for place, one in enumerate(passes, 1):
        _logits(module, one)
        if done is not None:
            done(place, len(passes))


def readings(module: nn.Module, setting: Setting, tokens: int) -> list[Reading]:
    """Put the calibration texts into passes.

    Args:
        module: Says where they are read.
        setting: Has the texts, and what an encoder reads before each.
        tokens: Tokens that are read at once; after a source each text is read alone.
    """
    if len(setting.sources):
        given = zip(setting.rows, setting.sources, strict=True)
        return [Reading.of(module, row, source) for row, source in given]
    return [Reading(ids) for ids in batches_of(setting.rows, device_of(module), tokens)]


def find_stacks(module: nn.Module) -> list[tuple[str, Blocks]]:
    """Find all lists of blocks of one class that are in no other such list, in the model's order."""
    found: list[tuple[str, Blocks]] = []
    for path, blocks in _lists(module):
        if any(True for _ in blocks[0].children()) and not any(
            path.startswith(f"{one}.") for one, _ in found
        ):
            found.append((path, blocks))
    return found


def prefixes(stacks: Iterable[tuple[str, Blocks]]) -> list[str]:
    """Give what the paths of all parts of each block begin with."""
    return [f"{path}.{number}." for path, parts in stacks for number in range(len(parts))]


def find_stack(module: nn.Module) -> tuple[str, Blocks] | None:
    """Find the longest list of blocks of one class, `None` where there is none of two or more.

    A list is a `ModuleList` or a `Sequential`; the latter's members must have parts, as linears have not.
    """
    best: tuple[str, Blocks] | None = None
    for path, blocks in _lists(module):
        # An outer list comes before the lists inside its blocks.
        if len(blocks) > (1 if best is None else len(best[1])):
            best = path, blocks
    return best


def _lists(module: nn.Module) -> Iterator[tuple[str, Blocks]]:
    """Find lists of one or more parts of one class."""
    for path, part in module.named_modules():
        if type(part) is nn.Sequential:
            alike = all(any(True for _ in one.children()) for one in part)
        else:
            alike = isinstance(part, nn.ModuleList)
        if alike and isinstance(part, Blocks) and len({type(one) for one in part}) == 1:
            yield path, part


@contextmanager
def gathering(module: nn.Module, paths: Sequence[str]) -> Iterator[Callable[[], dict[str, Statistics]]]:
    """Watch what linears read; linears that read the same tensor share the work.

    Yields:
        A function that gives the statistics so far, of those that have read anything.
    """
    found: dict[str, _Sums] = {}
    # By identity, for as long as the model holds it and does not write into it: whose statistics it is in.
    known: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(part: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            read, version, owner = known.get(id(x), (None, 0, ""))
            if read is not None and read() is x and version == _version(x):
                found[path] = found[owner]
                return
            known[id(x)] = weakref.ref(x), _version(x), path
            found.setdefault(path, _Sums(x.shape[-1], x.device)).add(x)

        return hook

    with ExitStack() as hooks:
        for path in paths:
            handle = module.get_submodule(path).register_forward_pre_hook(watch(path))
            hooks.callback(handle.remove)
        yield lambda: {path: sums.statistics() for path, sums in found.items()}


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class _Sums:
    """Second moments and magnitudes of vectors, summed where they are computed."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._gram = torch.zeros(width, width, device=device)
        self._abs = torch.zeros(width, dtype=torch.float64, device=device)
        self._most = torch.zeros(width, device=device)
        self._tokens = 0
        self._made: Statistics | None = None

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self._gram.addmm_(flat.t(), flat)
        size = flat.abs()
        self._abs += size.sum(0)
        self._most = torch.maximum(self._most, size.amax(0))
        self._tokens += len(flat)
        self._made = None

    def statistics(self) -> Statistics:
        if self._made is None:
            self._made = Statistics(
                gram=(self._gram / self._tokens).cpu().numpy(),
                mean_abs=(self._abs / self._tokens).float().cpu().numpy(),
                max_abs=self._most.cpu().numpy(),
                tokens=self._tokens,
            )
        return self._made


class _NotNowError(Exception):
    """Ends a forward pass once what is wanted is known."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What a model hands to a block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def matches(self, other: "_Call") -> bool:
        return _same(self.args, other.args) and _same(self.kwargs, other.kwargs)


class _Stack:
    """Blocks that are run one by one on what those before them have made of the texts."""

    def __init__(self, blocks: list[tuple[str, nn.Module]]) -> None:
        self.blocks = blocks
        self._calls: dict[int, list[_Call]] = {}  # by size of the batch
        self._hidden: list[Tensor] = []

    @classmethod
    def of(cls, module: nn.Module, stack: tuple[str, Blocks], batches: list[Reading]) -> "_Stack | None":
        """Look how the model calls its blocks; `None` where it does more than call one after the other."""
        path, parts = stack
        run = cls([(f"{path}.{number}", part) for number, part in enumerate(parts)])
        # The first text by itself comes first, as the sample; it also shows whether blocks run more than once.
        for batch in [batches[0].first(), *batches]:
            seen = _record(module, parts, batch, only_first=len(batch) in run._calls)
            if not seen or seen[0][0] != 0:
                return None
            _, hidden, call = seen[0]
            if len(batch) not in run._calls:
                if [place for place, _, _ in seen] != list(range(len(parts))):
                    return None
                run._calls[len(batch)] = [call for _, _, call in seen]
                if not run._leads(hidden, seen[-1][1]):
                    return None
            elif not call.matches(run._calls[len(batch)][0]):
                return None
            run._hidden.append(hidden)
        return run

    def read(self, number: int) -> None:
        """Run a block for what its linears see."""
        for hidden in self._hidden[1:]:
            self._step(number, hidden)

    def sample(self, number: int) -> Tensor:
        """Run a block on the first text, and give what it makes of it."""
        return self._step(number, self._hidden[0])

    def advance(self, number: int) -> None:
        """Run a block for what it hands on."""
        for place, hidden in enumerate(self._hidden):
            self._hidden[place] = self._step(number, hidden)
        for part in quantized_parts(self.blocks[number][1]).values():
            part.forget()

    def _leads(self, hidden: Tensor, expected: Tensor) -> bool:
        """Whether the blocks, one after the other, hand the last one what the model hands it."""
        for number in range(len(self.blocks) - 1):
            hidden = self._step(number, hidden)
        return hidden.shape == expected.shape and torch.allclose(hidden, expected, rtol=1e-4, atol=1e-5)

    def _step(self, number: int, hidden: Tensor) -> Tensor:
        call = self._calls[len(hidden)][number]
        # Not around the whole loop: whoever changes weights between two stages must not be inside of it.
        with torch.no_grad(), own_attention():
            result = self.blocks[number][1](hidden, *call.args, **call.kwargs)
        given: Tensor = result[0] if isinstance(result, tuple) else result
        return given


def _record(
    module: nn.Module, parts: Blocks, batch: Reading, *, only_first: bool
) -> list[tuple[int, Tensor, _Call]]:
    """Run a model and note how it calls its blocks; nothing where that is not by hidden states."""
    seen: list[tuple[int, Tensor, _Call]] = []

    def watch(place: int) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = entering(args, kwargs)
            if hidden is None or len(hidden) != len(batch):
                raise _NotNowError
            rest = {name: one for name, one in kwargs.items() if args or name != "hidden_states"}
            seen.append((place, hidden, _Call(args[1:], rest)))
            # Behind the last block there are only logits, which of a large batch take more than the weights.
            if only_first or (place == len(parts) - 1 and len(batch) > 1):
                raise _NotNowError

        return hook

    with ExitStack() as hooks:
        for place, part in enumerate(parts):
            hooks.callback(part.register_forward_pre_hook(watch(place), with_kwargs=True).remove)
        with suppress(_NotNowError):
            _logits(module, batch)
    return seen


def batches_of(rows: Sequence[IntArray], device: torch.device, tokens: int) -> list[Tensor]:
    """Put rows of one length into `(rows, tokens)` batches of about so many tokens."""
    ids = torch.from_numpy(np.stack([np.asarray(row, np.int64) for row in rows])).to(device)
    step = max(1, tokens // ids.shape[1])
    return [ids[start : start + step] for start in range(0, len(ids), step)]


def logits_of(module: Any, ids: Tensor, inputs: Tensor | None = None) -> Tensor:
    """Run a module in its own way, without a cache.

    Args:
        module: A transformers model or a module of one's own.
        ids: `(batch, tokens)` int64.
        inputs: What the encoder of an encoder-decoder reads before them.
    """
    with own_attention():
        if is_transformers(module):
            given = {"input_ids": ids}
            if inputs is not None:
                given = {module.main_input_name: inputs, "decoder_input_ids": ids}
            result = module(**given, use_cache=False)
        else:
            result = module(ids) if inputs is None else module(ids, module.encode(inputs))
    found: Tensor = result[0] if isinstance(result, tuple) else getattr(result, "logits", result)
    return found


def _logits(module: nn.Module, reading: Reading) -> Tensor:
    # Not in inference mode, whose tensors do not tell when they are written into.
    with torch.no_grad():
        return reading.logits(module)


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Find the hidden states among what a block is called with."""
    x = args[0] if args else kwargs.get("hidden_states")
    return x if isinstance(x, Tensor) else None


def _same(one: Any, other: Any) -> bool:
    """Whether a block is told the same for other texts."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


def _affordable(
    module: nn.Module, paths: Sequence[str], together: Callable[[str], str]
) -> Iterator[list[str]]:
    """Cut paths into groups whose statistics fit into memory, or that belong together."""
    group: list[str] = []
    used = 0
    for _, several in itertools.groupby(paths, together):
        added = list(several)
        size = sum(4 * matrix_of(module.get_submodule(path)).shape[1] ** 2 for path in added)
        if group and used + size > _MOST_BYTES:
            yield group
            group, used = [], 0
        group += added
        used += size
    if group:
        yield group
