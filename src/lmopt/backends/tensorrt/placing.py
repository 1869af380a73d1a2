"""Where the inputs and outputs of one call stand on the device."""

from collections.abc import Mapping

from lmopt.backends.tensorrt.best import IDS, VALUES
from lmopt.backends.tensorrt.blocks import Block, Group
from lmopt.backends.tensorrt.cuda import PinnedMemory, Stream
from lmopt.backends.tensorrt.loading import Loaded, Shape
from lmopt.backends.tensorrt.memory import Memory, aligned
from lmopt.signature import LOGITS
from lmopt.types import DTYPE_BYTES, AnyArray


class Placing:
    """Memory for ids, mask, positions, logits, the best of them and the next state of calls of one shape.

    Args:
        loaded: Engine.
        groups: Of its state.
        memory: Where it is taken from.
        shape: Sizes.

    Attributes:
        shape: The same.
        present: The state as the engine writes it: of `past + sequence` slots, the new ones last.
        logits: Address of the logits, `(batch, sequence, vocab_size)`.
        best: Address of the largest logits' values, `(batch, best)` float32, and of their ids, int64.
        input_bytes: Bytes of all inputs but the state, with gaps.

    Raises:
        InsufficientMemoryError: There is no room for it.
    """

    def __init__(self, loaded: Loaded, groups: tuple[Group, ...], memory: Memory, shape: Shape) -> None:
        self.shape = shape
        past = {one.past.name for one in loaded.signature.state}
        self._inputs = []
        self.input_bytes = 0
        for spec in loaded.plan.inputs:
            if spec.name not in past:
                sizes = shape.of(spec)
                self._inputs.append((spec.name, spec.dtype, sizes, self.input_bytes))
                self.input_bytes += aligned(_bytes(spec.dtype, sizes))
        logits = next(one for one in loaded.plan.outputs if one.name == LOGITS)
        rows = f"{shape.batch} rows of {shape.sequence} tokens"
        self._buffers = [
            memory.take(self.input_bytes, f"the input of {rows}"),
            memory.take(_bytes(logits.dtype, shape.of(logits)), f"the logits of {rows}"),
        ]
        self.logits = self._buffers[1].address
        self.best: tuple[int, int] | None = None
        if loaded.best:
            values = aligned(shape.batch * loaded.best * 4)
            self._buffers.append(memory.take(3 * values, f"the largest logits of {rows}"))
            self.best = self._buffers[2].address, self._buffers[2].address + values
        self.present = Block(groups, memory, shape.batch, shape.past + shape.sequence)

    def addresses(self, past: Block) -> dict[str, int]:
        """Address of every input and output, by name."""
        start = self._buffers[0].address
        found = {name: start + offset for name, _, _, offset in self._inputs}
        found[LOGITS] = self.logits
        if self.best is not None:
            found[VALUES], found[IDS] = self.best
        found.update({one.past.name: address for one, address in past.addresses().items()})
        found.update({one.present: address for one, address in self.present.addresses().items()})
        return found

    def send(self, feeds: Mapping[str, AnyArray], pinned: PinnedMemory, stream: Stream) -> None:
        """Queue the inputs' way to the device.

        Args:
            feeds: Name to array, of every input but the state.
            pinned: At least `input_bytes`; not to be touched until the stream was waited for.
            stream: Where the copy is queued.
        """
        for name, dtype, sizes, offset in self._inputs:
            pinned.array(dtype, sizes, offset)[...] = feeds[name]
        stream.copy(self._buffers[0].address, pinned.address, self.input_bytes)


def _bytes(dtype: str, sizes: tuple[int, ...]) -> int:
    count = DTYPE_BYTES[dtype]
    for size in sizes:
        count *= size
    return count
