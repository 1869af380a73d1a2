"""Let a graph of ONNX Runtime's operators keep its keys and values in 8 bits.

The CPU kernel of `GroupQueryAttention` (ONNX Runtime 1.32) reads and writes `int8` caches with scales that are
fixed: one a channel of each head, or one a tensor. Measured on SmolLM2 (256 tokens of wiki, KL against the float
cache): one a channel with half as much room again 0.0015 to
0.0031 by the texts shown, without room 0.004 to 0.009, one a tensor 0.0032. So scales are
`1.5 * max|x| / 127` of each channel over the texts that the model is shown.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import onnx_ir as ir
import torch

from lmopt.backends.torch.language_model import Decoder, device_of
from lmopt.signature import Signature
from lmopt.types import FloatArray, IntArray

_MOST: Final = 127
# A text that was not shown may go further than those that were.
_ROOM: Final = 1.5
# Of a head's mean range, what a channel that was silent is given.
_LEAST: Final = 0.1
_RANDOM_TOKENS: Final = 256
# Places of the inputs of `GroupQueryAttention`: past key and value, and their scales.
_PAST: Final = (3, 4)
_SCALES: Final = (12, 13)


def cache_scales(decoder: Decoder, rows: Sequence[IntArray], context: int | None) -> list[FloatArray]:
    """Show a model some texts and see how large its keys and values become.

    Args:
        decoder: A transformers model.
        rows: `(tokens,)` ids each; a row of seeded random ids is added, since texts that go astray look so.
        context: Most tokens of a row.

    Returns:
        `(heads, width)` float32 for each tensor of the state, none of them 0.
    """
    vocabulary, device = decoder.signature.vocab_size, device_of(decoder)
    random = np.random.default_rng(0).integers(0, vocabulary, _RANDOM_TOKENS)
    most = [np.zeros(0, np.float32)] * len(decoder.signature.state)
    with torch.inference_mode():
        for row in (*rows, random):
            ids = torch.from_numpy(np.asarray(row[:context], np.int64))[None].to(device)
            for place, (_, tensor) in enumerate(decoder.start(ids)[1]):
                found = tensor[0].abs().amax(1).float().cpu().numpy()
                most[place] = np.maximum(most[place], found) if most[place].size else found
    floors = [_LEAST * one.mean(1, keepdims=True) + np.finfo(np.float32).tiny for one in most]
    return [np.maximum(_ROOM * one, floor) / _MOST for one, floor in zip(most, floors, strict=True)]


def keep_in_int8(model: ir.Model, signature: Signature, scales: Sequence[FloatArray]) -> Signature:
    """Change a finished graph so that past and present are `int8`.

    Args:
        model: The graph; it is changed.
        signature: Its signature.
        scales: From `cache_scales`.

    Returns:
        The signature of the changed graph.
    """
    places = {one.past.name: place for place, one in enumerate(signature.state)}
    for node in list(model.graph):
        if node.op_type != "GroupQueryAttention":
            continue
        node.resize_inputs(max(len(node.inputs), _SCALES[1] + 1))
        for past, place, kind in zip(_PAST, _SCALES, "kv", strict=True):
            source = node.inputs[past]
            assert source is not None
            assert source.name is not None
            values = np.ascontiguousarray(scales[places[source.name]][None, :, None], np.float32)
            value = ir.Value(name=f"{source.name}.scale")
            value.const_value = ir.tensor(values, name=value.name)
            value.shape, value.type = ir.Shape(values.shape), ir.TensorType(ir.DataType.FLOAT)
            model.graph.register_initializer(value)
            node.replace_input_with(place, value)
            node.attributes.add(ir.AttrString(f"{kind}_quant_type", "PER_CHANNEL"))
            # Outputs 1 and 2 are the present of inputs 3 and 4.
            for stored in (source, node.outputs[past - 2]):
                stored.type = ir.TensorType(ir.DataType.INT8)
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
    state = tuple(replace(one, past=replace(one.past, dtype="int8")) for one in signature.state)
    return replace(signature, state=state)
