"""What a recipe is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

from lmopt.types import AnyArray, IntArray, SourceFacts

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage of the work, the steps done and their total."""


class UnknownModuleWarning(UserWarning):
    """A model holds weights in modules of a type that a step does not know; they stay as they are."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody of progress."""


@runtime_checkable
class Step(Protocol):
    """A step of a recipe: a frozen dataclass named after its method, whose fields are the method's symbols.

    Attributes:
        name: What a recipe's file calls it; the name of its entry point of the group `lmopt.compressors`.
        needs_texts: Whether it must see the model read calibration texts.
        target: `"module:attribute"` of the function `(module, step, setting) -> module` that applies it
            to a copy of a module; the module itself stays as it is.

    Two more are optional. `takes_texts = True`: it can do without calibration texts, and uses them where there are
    some. `reads_sources = True`: it takes encoder-decoders too, whose `Setting.sources` has what stands before each of
    `Setting.rows`.
    """

    name: ClassVar[str]
    target: ClassVar[str]

    @property
    def needs_texts(self) -> bool:
        """A property, so that it may depend on the fields; a class variable will do."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data: `{"step": name, field: value, ...}`."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """What a step is given beside the module.

    Attributes:
        vocab_size: Width of the logits.
        rows: Calibration texts as `(tokens,)` int64 ids, all of one length; empty where no step needs them. After
            sources they are what the decoder reads, of any length.
        progress: Told what is done.
        errors: Receives, by path of each weight that was changed, the relative error of what it computes
            on the calibration texts, `||(W - W') X|| / ||W X||`; of the weight itself where there are none.
        original: The `lmopt.Model` that the recipe began with, for steps that recover towards it.
        current: The `lmopt.Model` of the module that the step is given: its tokenizer and facts.
        sources: For an encoder-decoder: what its encoder reads before each of `rows`, ids or features.
    """

    vocab_size: int
    rows: Sequence[IntArray] = ()
    progress: Progress = silent
    errors: dict[str, float] = field(default_factory=dict)
    original: Any = None
    current: Any = None
    sources: Sequence[AnyArray] = ()

    @property
    def source(self) -> SourceFacts | None:
        """What the model's encoder reads, `None` where it has none."""
        found: SourceFacts | None = None if self.current is None else self.current.facts.source
        return found


def plain_fields(step: Any) -> dict[str, Any]:
    """Give a dataclass step as plain data; what a step's `to_dict` returns."""
    return {"step": step.name, **{one.name: _plain(getattr(step, one.name)) for one in fields(step)}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.to_dict() if isinstance(value, Step) else value
