"""Let attention read each source once for all rows that hold it: beams of one text, above all.

Rows of a decoder ask what their sources hold, and the beams of one source all ask the same keys and values. As one row
with as many more queries they read them once, and nothing holds them once for each beam.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from lmopt.backends.torch.fused.edits import Edits
from lmopt.backends.torch.fused.operators import BIAS, KEY, MICROSOFT, MULTI_HEAD, PADDING, VALUE

_ROWS: Final = 3


def share_sources(edits: Edits, held: Sequence[ir.Value]) -> bool:
    """Let what is held of sources have fewer rows than the rest, each for as many rows that stand together.

    Args:
        edits: The graph of a decoder; changed in place.
        held: Its inputs that hold sources: keys and values, and the mask of them, if there is one.

    Returns:
        Whether it was done. It is not, and the graph is as before, where others than attention read them.
    """
    uses = [use for value in held for use in _uses(value)]
    if not uses or not all(_is_attention(node, place, held) for node, place in uses):
        return False
    asking = {node for node, _ in uses}
    readers = [node for node in edits.graph if node in asking]
    apply = edits.inserting(readers[0])
    query, key = readers[0].inputs[0], readers[0].inputs[KEY]
    assert query is not None
    assert key is not None
    rows, sources = apply("Shape", query), apply("Shape", key, start=0, end=1)
    for node in readers:
        query = node.inputs[0]
        assert query is not None
        assert query.shape is not None
        apply = edits.inserting(node)
        width = edits.constant(np.array([-1, query.shape[2]], np.int64), "queries")
        by_source = apply("Reshape", query, apply("Concat", sources, width, axis=0))
        seen = edits.node(MULTI_HEAD, [by_source, *node.inputs[1:]], node, domain=MICROSOFT, like=node)
        edits.replace(node.outputs[0], apply("Reshape", seen.outputs[0], rows))
        edits.graph.remove(node, safe=True)
    return True


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """List who reads a value, or what a Cast makes of it."""
    for node, place in value.uses():
        if node.op_type == "Cast":
            yield from node.outputs[0].uses()
        else:
            yield node, place


def _is_attention(node: ir.Node, place: int, held: Sequence[ir.Value]) -> bool:
    """Say whether a reader is attention to a source, with nothing in it that belongs to single rows."""
    inputs = [*node.inputs, *[None] * (BIAS + 1)]
    query = inputs[0]
    return (
        node.op_type == MULTI_HEAD
        and place in (KEY, VALUE, PADDING)
        and all(inputs[one] in held for one in (KEY, VALUE))
        and not any(value is not None for value in inputs[BIAS:])
        and query is not None
        and query.shape is not None
        and len(query.shape) == _ROWS
        and isinstance(query.shape[2], int)
    )
