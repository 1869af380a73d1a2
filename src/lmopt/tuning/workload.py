"""What a deployment is measured with: the sizes of a request, and how often."""

from dataclasses import dataclass, fields

from lmopt.errors import UnsupportedOptionError


@dataclass(frozen=True, slots=True)
class Workload:
    """A typical request, and how it is measured.

    Attributes:
        prompt_tokens: Tokens of the prompt, at least 1.
        new_tokens: Tokens that are generated, at least 2.
        rounds: Rounds that count in a process; one more warms up.
        starts: Fresh processes that the best candidates are measured in, in turn, before one is chosen: the same
            process gives the same speed all its life, another start of it does not.
        score_tokens: Tokens of text that quality is measured on, at least 64.
        quick_tokens: Tokens of it that a recipe is looked at with before anything is exported.
        patience_s: Seconds that the speed of a trial may take; what would take longer gets fewer and shorter
            rounds, and says so.

    Raises:
        UnsupportedOptionError: A number is too small.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 3
    starts: int = 3
    score_tokens: int = 2048
    quick_tokens: int = 512
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        """Check every number."""
        least = {"new_tokens": 2, "score_tokens": 64, "quick_tokens": 32}
        for one in fields(self):
            value = getattr(self, one.name)
            whole = isinstance(value, int) or (one.name == "patience_s" and isinstance(value, float))
            if not whole or isinstance(value, bool) or value < least.get(one.name, 1):
                raise UnsupportedOptionError(
                    f"{one.name} is {value!r}; expected a number of at least {least.get(one.name, 1)}"
                )
