"""What the requests of one engine share: limits, kept prefixes, measured costs."""

from dataclasses import dataclass, field, fields

from lmopt.errors import UnsupportedOptionError
from lmopt.generation.costs import CallCosts
from lmopt.generation.prefixes import PrefixStore


@dataclass(frozen=True)
class Limits:
    """How much one request may do at once; more of it waits for its turn.

    They change how the work is cut into calls of the engine, so results differ by rounding at most.

    Attributes:
        max_num_seqs: Most rows that are read or decoded at once.
        max_num_batched_tokens: Most tokens of prompts, padding included, that are read between two
            tokens of the running rows. A longer prompt is read in parts of this size.
        max_cache_tokens: Most tokens for which room is reserved at once: rows times the longest of
            them, prompt and new tokens. A row that is longer alone still runs, alone. Models without a
            context length, whose state does not grow, have no use for it.

    Raises:
        UnsupportedOptionError: One is not a whole number of at least 1.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_cache_tokens: int = 32768

    def __post_init__(self) -> None:
        """Check the numbers."""
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UnsupportedOptionError(
                    f"{one.name}={value!r} is not possible; expected an integer >= 1."
                )


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the requests of one engine share; every part may be used by several threads.

    Attributes:
        limits: How much is done at once.
        prefixes: States of texts that were read before; keeps nothing by default.
        costs: How long calls take, for prompt lookup.
    """

    limits: Limits = Limits()
    prefixes: PrefixStore = field(default_factory=lambda: PrefixStore(0))
    costs: CallCosts = field(default_factory=CallCosts)
