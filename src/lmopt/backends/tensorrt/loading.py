"""A plan that was loaded onto a device, checked against what its maker says of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lmopt.backends.tensorrt.best import VALUES
from lmopt.backends.tensorrt.building import Plan
from lmopt.backends.tensorrt.collecting import logger_for
from lmopt.backends.tensorrt.flavour import Flavour
from lmopt.errors import ContextLengthError, EngineError, UnsupportedError
from lmopt.signature import Signature
from lmopt.types import BATCH, PAST, SEQUENCE, TOTAL, TensorSpec

_TYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one call of an engine.

    Attributes:
        profile: Number of the optimisation profile.
        batch: Rows.
        sequence: New tokens of each row, padding included.
        past: Slots of each row that the call is given, hidden ones included.
    """

    profile: int
    batch: int
    sequence: int
    past: int

    def of(self, spec: TensorSpec) -> tuple[int, ...]:
        """Give the shape of a tensor."""
        total = self.past + self.sequence
        sizes = {BATCH: self.batch, SEQUENCE: self.sequence, PAST: self.past, TOTAL: total}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)


class Loaded:
    """A plan in the memory of the current device.

    Args:
        plan: Made by this process, or out of this user's cache, or trusted by name.
        flavour: The one that made it.
        cuda_graphs: Whether contexts may capture what they do, where TensorRT does that by itself (RTX does).

    Attributes:
        plan: The same.
        signature: Roles of inputs and outputs.
        log: What TensorRT says; the last words before a failure are its reason.
        best: How many of a row's largest logits it finds by itself; 0 where it was built without.
        workspace: Bytes that a context needs while it computes, for the largest profile.
        captures_itself: Whether contexts capture graphs by themselves.

    Raises:
        EngineError: TensorRT refuses the plan, or it is not what its maker says.
    """

    def __init__(self, plan: Plan, flavour: Flavour, *, cuda_graphs: bool) -> None:
        self.plan = plan
        self.signature = Signature.from_graph(plan.inputs, plan.outputs)
        self.best = next((int(one.shape[-1]) for one in plan.outputs if one.name == VALUES), 0)
        self.log: Any = logger_for(flavour.module)
        self._module = flavour.module
        # Whoever gets here has asked `lmopt.accelerators` for a device: without one the next line is a crash.
        self._runtime: Any = flavour.module.Runtime(self.log.native)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan.data)
        if self._engine is None or self.log.errors():
            raise self.failed(
                f"{flavour.name} {flavour.version} cannot load the plan of {len(plan.data)} bytes"
            )
        self._check()
        self.workspace = int(self._engine.device_memory_size_v2)
        # RTX compiles kernels for a shape while others run already; only it knows when a capture is worth it.
        self.captures_itself = cuda_graphs and hasattr(flavour.module, "CudaGraphStrategy")

    def new_context(self) -> Any:
        """Make an execution context, which is given its memory by the caller.

        Raises:
            EngineError: TensorRT cannot.
        """
        settings = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.captures_itself:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(settings)
            config.cuda_graph_strategy = self._module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            settings = config
        context = self._engine.create_execution_context(settings)
        if context is None:
            raise self.failed("TensorRT cannot make an execution context")
        return context

    def fit(self, rows: int, tokens: int, past: int) -> Shape:
        """Choose the profile for the next call, and how much of what is wanted it takes at once.

        Args:
            rows: Rows that are to be run.
            tokens: Tokens that each of them is to read.
            past: Slots that each of them has.

        Returns:
            A shape with at most as many rows and tokens, of the profile that was made for the fewest tokens
            among those that take most of them.

        Raises:
            ContextLengthError: No profile takes as many slots.
            UnsupportedError: No profile takes so few rows or tokens.
        """
        profiles = self.plan.profiles
        best: Shape | None = None
        for index, one in enumerate(profiles):
            batch, sequence = min(rows, one.batch[2]), min(tokens, one.sequence[2])
            if batch < one.batch[0] or sequence < one.sequence[0] or not one.past[0] <= past <= one.past[2]:
                continue
            narrower = best is None or one.sequence[2] < profiles[best.profile].sequence[2]
            if (
                best is None
                or (sequence, batch) > (best.sequence, best.batch)
                or ((sequence, batch) == (best.sequence, best.batch) and narrower)
            ):
                best = Shape(index, batch, sequence, past)
        if best is not None:
            return best
        longest = self.most_past()
        if past > longest:
            raise ContextLengthError(
                f"a row has {past} tokens behind it; this engine was built for at most {longest}. "
                f"Open it with max_past={past} or more"
            )
        built = ", ".join(
            f"{one.name} (rows {one.batch}, tokens {one.sequence}, past {one.past})" for one in profiles
        )
        raise UnsupportedError(
            f"no profile of this engine takes {rows} rows of {tokens} tokens behind {past}; it has (least, "
            f"best, most): {built}. Open it with other profiles, or without the option"
        )

    def most_past(self) -> int:
        """Most slots that any profile takes."""
        return max(one.past[2] for one in self.plan.profiles)

    def most_tokens(self) -> int:
        """Most tokens that a row can hold: the last are read with all others behind them."""
        return max(max(one.past[2] + 1, one.sequence[2]) for one in self.plan.profiles)

    def failed(self, what: str) -> EngineError:
        """Say what went wrong, with TensorRT's own words."""
        words = "; ".join(self.log.errors()[-3:]) or "TensorRT gave no reason"
        self.log.clear()
        return EngineError(f"{what}: {words}")

    def _check(self) -> None:
        """Compare names, types and places of tensors, which decide what addresses mean."""
        engine, trt = self._engine, self._module
        found: dict[str, str] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            enters = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            kind = engine.get_tensor_dtype(name).name
            found[name] = f"{'input' if enters else 'output'} of type {_TYPES.get(kind, kind)}"
            if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                raise EngineError(
                    f"the engine reads {name!r} on the host; lmopt's graphs have no such tensor"
                )
        told = {one.name: f"input of type {one.dtype}" for one in self.plan.inputs}
        told |= {one.name: f"output of type {one.dtype}" for one in self.plan.outputs}
        if found != told or engine.num_optimization_profiles != len(self.plan.profiles):
            raise EngineError(
                f"the engine is not what its record says. Engine: {_sorted(found)}, "
                f"{engine.num_optimization_profiles} profiles; record: {_sorted(told)}, "
                f"{len(self.plan.profiles)} profiles"
            )


def _sorted(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({what})" for name, what in sorted(tensors.items()))
