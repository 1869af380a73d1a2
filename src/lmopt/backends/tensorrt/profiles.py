"""Ranges of a graph's dynamic axes: one profile for reading prompts, one for single tokens, or one for sources.

TensorRT compiles kernels for the ranges that it is told. It takes ranges of tensors that do not exist, and
says of impossible ones only that the build failed, so they are checked here first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.types import BATCH, PAST, SEQUENCE, SOURCE, TOTAL, ModelFacts, TensorSpec

Range = tuple[int, int, int]
ENCODE: Final = "encode"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
LONGEST: Final = 4096
"""Most slots of the past that the default profiles take; more costs scratch memory and must be asked for."""
LONGEST_SOURCE: Final = 512
"""Most positions of a source that the default profiles take where nobody says more."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Least, best and largest size of each dynamic axis; the total length is sequence and past together.

    Attributes:
        name: What it is for: `"prefill"`, `"decode"`.
        batch: Rows of one call, at least 1.
        sequence: New tokens of a row, at least 1.
        past: Slots that a row is given; 0 is possible. `(0, 0, 0)` for a state of fixed size.
        source: Positions of the source of an encoder-decoder, where they vary.

    Raises:
        UnsupportedOptionError: A range is not `least <= best <= largest`, or begins too low.
    """

    name: str
    batch: Range
    sequence: Range
    past: Range
    source: Range = (1, 1, 1)

    def __post_init__(self) -> None:
        """Check the ranges, and make tuples of lists, which is what JSON has."""
        for name, least in (("batch", 1), ("sequence", 1), ("past", 0), ("source", 1)):
            given = getattr(self, name)
            whole = (
                isinstance(given, tuple | list) and len(given) == 3 and all(type(one) is int for one in given)
            )
            if not whole or not least <= given[0] <= given[1] <= given[2]:
                raise UnsupportedOptionError(
                    f"{name} of profile {self.name!r} is {given!r}; expected (least, best, largest), ascending, "
                    f"from {least}"
                )
            object.__setattr__(self, name, tuple(given))

    def covers(self, batch: int, sequence: int, past: int) -> bool:
        """Say whether one call fits."""
        sizes = ((self.batch, batch), (self.sequence, sequence), (self.past, past))
        return all(least <= size <= most for (least, _, most), size in sizes)

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Give least, best and largest shape of an input.

        Raises:
            UnsupportedError: It has a dynamic axis that no graph of lmopt's has.
        """
        total = tuple(new + old for new, old in zip(self.sequence, self.past, strict=True))
        known = {
            BATCH: self.batch,
            SEQUENCE: self.sequence,
            PAST: self.past,
            TOTAL: total,
            SOURCE: self.source,
        }
        for axis in spec.shape:
            if isinstance(axis, str) and axis not in known:
                raise UnsupportedError(
                    f"input {spec.name!r} has the dynamic axis {axis!r}; lmopt's graphs have {', '.join(known)}. "
                    "Export the model with lmopt.Exporter('onnx', target='portable')"
                )
        least, best, most = (
            tuple(known[axis][place] if isinstance(axis, str) else axis for axis in spec.shape)
            for place in range(3)
        )
        return least, best, most

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data for a key or a record."""
        return {one: getattr(self, one) for one in ("name", "batch", "sequence", "past", "source")}


def default_profiles(
    inputs: Sequence[TensorSpec],
    facts: ModelFacts,
    *,
    max_batch: int,
    max_sequence: int,
    max_past: int | None,
    max_source: int | None = None,
) -> tuple[Profile, ...]:
    """Make the profiles for prompts and for single tokens, or the one of an encoder.

    Args:
        inputs: Inputs of the graph; whether the state grows is read off their axes.
        facts: Of the model; its context bounds what is useful.
        max_batch: Most rows of a call.
        max_sequence: Most new tokens of a call; longer prompts are read in pieces.
        max_past: Most slots of the past; `None`: the context, but at most `LONGEST`.
        max_source: Most positions of a source; `None`: as many as the model takes, but at most `LONGEST_SOURCE`.

    Returns:
        Prefill and decode, in this order: the engine's profiles 0 and 1. One for an encoder.

    Raises:
        UnsupportedOptionError: A limit is not a whole number of at least 1.
    """
    limits = {
        "max_batch": max_batch,
        "max_sequence": max_sequence,
        "max_past": max_past,
        "max_source": max_source,
    }
    for name, value in limits.items():
        if value is not None and (type(value) is not int or value < 1):
            raise UnsupportedOptionError(f"{name} is {value!r}; expected a whole number of at least 1")
    context = facts.context_length
    sequence = max_sequence if context is None else min(max_sequence, context)
    grows = any(PAST in one.shape for one in inputs)
    past = 0
    if grows:
        past = min(context or LONGEST, LONGEST) if max_past is None else max_past
    batch = (1, 1, max_batch)
    longest = 1
    if any(SOURCE in one.shape for one in inputs):
        takes = facts.source.length if facts.source is not None else None
        longest = max_source or min(takes or LONGEST_SOURCE, LONGEST_SOURCE)
    source = (1, max(1, longest // 2), longest)
    if not any(SEQUENCE in one.shape for one in inputs):
        return (Profile(ENCODE, batch, (1, 1, 1), (0, 0, 0), source),)
    return (
        Profile(PREFILL, batch, (1, max(1, sequence // 2), sequence), (0, 0, past), source),
        Profile(DECODE, batch, (1, 1, 1), (0, past // 2, past), source),
    )


def add_profiles(
    builder: Any, config: Any, inputs: Sequence[TensorSpec], names: Sequence[str], profiles: Sequence[Profile]
) -> None:
    """Hand profiles to TensorRT, after everything that it would not check has been.

    Args:
        builder: `Builder`.
        config: `IBuilderConfig`; it is changed.
        inputs: What the graph is said to have.
        names: What the network has.
        profiles: In the order in which the engine is to number them.

    Raises:
        UnsupportedOptionError: There is no profile, or TensorRT refuses one.
        UnsupportedError: The network's inputs are not the graph's, or an axis is unknown.
    """
    if {one.name for one in inputs} != set(names):
        raise UnsupportedError(
            f"the graph has the inputs {sorted(one.name for one in inputs)}, TensorRT's network {sorted(names)}"
        )
    if not profiles:
        raise UnsupportedOptionError("there are no profiles; give at least one, or leave the option out")
    for place, profile in enumerate(profiles):
        native = builder.create_optimization_profile()
        for spec in inputs:
            if any(isinstance(axis, str) for axis in spec.shape):
                native.set_shape(spec.name, *profile.shapes(spec))
        if config.add_optimization_profile(native) != place:
            raise UnsupportedOptionError(f"TensorRT refuses profile {profile.name!r}: {profile.to_dict()}")
