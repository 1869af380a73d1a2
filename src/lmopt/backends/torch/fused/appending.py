"""Let attention append to its cache, and keep to what it may see, by itself.

A traced decoder appends keys and values to a cache by operators of its own and writes down what each query may see.
`MultiHeadAttention` does both: some forty small operators less in each step of a small decoder.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from lmopt.backends.torch.fused.edits import Edits
from lmopt.backends.torch.fused.operators import BIAS, CACHE, KEY, MICROSOFT, MULTI_HEAD, PADDING, VALUE
from lmopt.types import BATCH, PAST, SEQUENCE, SOURCE, TOTAL, AnyArray, FloatArray, TensorSpec

_HEADS_FIRST: Final = [0, 2, 1, 3]
_SLOTS: Final = (2, -2)
_SOME: Final = 7
# What a mask adds where nothing is to be seen is below this.
_HIDDEN: Final = -1e30
_LOWEST: Final = float(np.finfo(np.float32).min)


def append_inside(edits: Edits) -> None:
    """Hand attention the past and the new keys and values apart, where the graph appends one to the other."""
    for node in [one for one in edits.graph if one.op_type == MULTI_HEAD]:
        found = [_appended(node.inputs[place]) for place in (KEY, VALUE)]
        if None in found:
            continue
        (past_key, key), (past_value, value) = [one for one in found if one is not None]
        inputs = [*node.inputs, *[None] * (BIAS + 1 - len(node.inputs))]
        whole = inputs[KEY], inputs[VALUE]
        inputs[KEY], inputs[VALUE] = key, value
        joined = edits.node(
            MULTI_HEAD, [*inputs, past_key, past_value], node, domain=MICROSOFT, outputs=3, like=node
        )
        for old, new in zip((node.outputs[0], *whole), joined.outputs, strict=True):
            assert old is not None
            edits.replace(old, new)
        edits.graph.remove(node, safe=True)


def mask_inside(edits: Edits, inputs: Sequence[TensorSpec], padded: str, longest: int) -> None:
    """Let attention know by an attribute that it looks back only, and by a graph's own input what is padding.

    What a mask says is found by computing it alone, for several sizes; and that there is no window, of one that looks
    back by computing it once for the longest row, of padding by its having one line for all queries.

    Args:
        edits: The graph of an encoder or a decoder.
        inputs: Names and axes of its inputs, in their order.
        padded: Which of them tells tokens of sources from padding.
        longest: Tokens that a row may come to.
    """
    trial = _Trial(edits, inputs, padded, longest)
    known: dict[int, str] = {}
    padding: ir.Value | None = None
    for node in [one for one in edits.graph if one.op_type == MULTI_HEAD]:
        mask = node.inputs[BIAS] if len(node.inputs) > BIAS else None
        if mask is None:
            continue
        if id(mask) not in known:
            known[id(mask)] = trial.meaning(mask)
        # Only of keys that it has appended itself does the operator know which came before the queries.
        appends = len(node.inputs) > CACHE and node.inputs[CACHE] is not None
        if known[id(mask)] == "causal" and appends:
            node.attributes["unidirectional"] = ir.AttrInt64("unidirectional", 1)
        elif known[id(mask)] == "padding" and not appends:
            if padding is None:
                padding = edits.node(
                    "Cast", [trial.inputs[padded]], edits.graph[0], to=int(ir.DataType.INT32)
                ).outputs[0]
            node.replace_input_with(PADDING, padding)
            node.attributes["mask_filter_value"] = ir.AttrFloat32("mask_filter_value", _LOWEST)
        else:
            continue
        node.replace_input_with(BIAS, None)


class _Trial:
    """Computes masks apart from the graph that they stand in.

    Args:
        edits: The graph.
        inputs: Names and axes of its inputs.
        padded: Which of them tells tokens of sources from padding.
        longest: Tokens that a row may come to.

    Attributes:
        inputs: The graph's inputs by the names that they will have.
    """

    def __init__(self, edits: Edits, inputs: Sequence[TensorSpec], padded: str, longest: int) -> None:
        self._graph = edits.graph
        self._model = edits.model
        self._specs = {one.name: one for one in inputs}
        self._padded = padded
        self.inputs = dict(zip(self._specs, edits.graph.inputs, strict=True))
        self._longest = longest

    def meaning(self, mask: ir.Value) -> str:
        """Say what a mask lets be seen: `"causal"`, `"padding"`, or `""` where it is something else.

        Args:
            mask: What is added to the scores, `(batch or 1, 1, new, slots)`.
        """
        wide = _before_expand(mask)
        behind = _behind(mask)
        leaves = {
            name: [use for use in value.uses() if id(use.node) in behind]
            for name, value in self.inputs.items()
        }
        leaves = {name: uses for name, uses in leaves.items() if uses}
        by_value = [name for name, uses in leaves.items() if any(use.node.op_type != "Shape" for use in uses)]
        if by_value not in ([], [self._padded]):
            return ""
        part = ir.convenience.extract(self._graph, [self.inputs[name] for name in leaves], [mask])
        for given, name in zip(part.inputs, leaves, strict=True):
            given.name = name
        alone = ir.Model(part, ir_version=self._model.ir_version)
        try:
            evaluator = ReferenceEvaluator(ir.to_proto(alone))
        except (NotImplementedError, RuntimeError):  # an operator that only an engine has: no plain mask
            return ""

        def added(batch: int, past: int, new: int, seen: AnyArray) -> FloatArray:
            axes = {BATCH: batch, SEQUENCE: new, PAST: past, TOTAL: past + new, SOURCE: seen.shape[1]}
            feeds = {name: _zeros(self._specs[name], axes) for name in leaves}
            feeds |= {self._padded: seen} if self._padded in leaves else {}
            (found,) = evaluator.run(None, feeds)
            return np.asarray(found, np.float32)

        if by_value:
            # One line for all queries: a window, which only a long source would show, has a line for each.
            alike = wide.shape is not None and len(wide.shape) == len(_HEADS_FIRST) and wide.shape[2] == 1
            source = self._specs[self._padded].shape[1]
            width = source if isinstance(source, int) else _SOME
            return (
                "padding"
                if alike and all(_is_padding(added, *size, width) for size in ((2, 0, 1), (3, 2, 3)))
                else ""
            )
        sizes = ((1, 0, 1), (2, 0, 5), (2, 3, 1), (2, 3, 4), (1, self._longest - 1, 1))
        return "causal" if all(_is_causal(added, *size) for size in sizes) else ""


def _zeros(spec: TensorSpec, axes: Mapping[str, int]) -> AnyArray:
    return np.zeros([axes[axis] if isinstance(axis, str) else axis for axis in spec.shape], spec.dtype)


def _is_causal(added: Callable[..., FloatArray], batch: int, past: int, new: int) -> bool:
    seen = np.arange(past + new)[None] <= past + np.arange(new)[:, None]
    return _hides(added(batch, past, new, np.ones((batch, _SOME), np.int64)), seen[None, None])


def _is_padding(added: Callable[..., FloatArray], batch: int, past: int, new: int, width: int) -> bool:
    seen = np.random.default_rng(0).integers(0, 2, (batch, width))
    return _hides(added(batch, past, new, seen), seen[:, None, None])


def _hides(added: FloatArray, seen: AnyArray) -> bool:
    """Say whether a mask adds nothing to what is seen, and hides the rest, for all heads alike."""
    if added.ndim != seen.ndim or added.shape[1] != 1 or added.shape[3] != seen.shape[3]:
        return False
    added, seen = np.broadcast_arrays(added, seen)
    return bool((added[seen != 0] == 0).all() and (added[seen == 0] < _HIDDEN).all())


def _before_expand(value: ir.Value) -> ir.Value:
    """Give a value before it was repeated along axes of length 1."""
    node = value.producer()
    while node is not None and node.op_type in ("Expand", "Identity") and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _behind(value: ir.Value) -> set[int]:
    """Give the ids of all nodes that a value comes from."""
    found: set[int] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and id(node) not in found:
            found.add(id(node))
            waiting += [one for one in node.inputs if one is not None]
    return found


def _appended(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Find the past, an input of the graph, and what is appended to it, `(batch, new, heads * size)`."""
    append = None if value is None else value.producer()
    if append is None or append.op_type != "Concat" or append.attributes["axis"].as_int() not in _SLOTS:
        return None
    past, *more = append.inputs
    turn = more[0].producer() if len(more) == 1 and more[0] is not None else None
    if past is None or not past.is_graph_input() or turn is None or turn.op_type != "Transpose":
        return None
    split = turn.inputs[0].producer() if turn.inputs[0] is not None else None
    if split is None or split.op_type != "Reshape" or list(turn.attributes["perm"].as_ints()) != _HEADS_FIRST:
        return None
    new, apart = split.inputs[0], split.outputs[0]
    if new is None or new.shape is None or apart.shape is None:
        return None
    flat, heads = list(new.shape), list(apart.shape)
    # The reshape only takes heads apart.
    if flat[:2] != heads[:2] or not all(isinstance(size, int) for size in heads[2:]):
        return None
    return (past, new) if flat[2:] == [math.prod(heads[2:])] else None
