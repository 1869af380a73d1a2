"""What both engines of this package have in common."""

from collections.abc import Mapping, Sequence

from lmopt.contracts import EngineReport
from lmopt.types import AnyArray, IntArray, ModelFacts
from lmopt_openvino.graph import Graph


class GraphEngine:
    """The part of `lmopt.contracts.Engine` that does not depend on how the state is kept.

    Args:
        graph: Compiled graph; closed by this engine.
        facts: Facts of the model.
    """

    def __init__(self, graph: Graph, facts: ModelFacts) -> None:
        self.facts = facts
        self._graph = graph
        self._signature = graph.signature

    @property
    def ragged(self) -> bool:
        """Whether rows may be unequal: whether the graph takes a mask."""
        return self._signature.has_mask

    @property
    def rewinds(self) -> bool:
        """Whether rows can forget their last tokens: whether the state is a cache and nothing else."""
        return self._signature.rewinds

    def report(self) -> EngineReport:
        """Say what the engine really does."""
        return self._graph.report()

    def close(self) -> None:
        """Release the compiled graph; states that are still held keep their memory."""
        self._graph.close()

    def tap_names(self) -> list[str]:
        """Names of the modules whose output the graph can show."""
        return self._graph.tap_names()

    def taps(self, input_ids: IntArray, names: Sequence[str]) -> Mapping[str, AnyArray]:
        """Run ids from an empty state and return the named modules' outputs."""
        return self._graph.taps(input_ids, names)
